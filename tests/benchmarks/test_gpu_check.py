"""What of `make gpu-check` can be tested without a GPU: its parts, their order and limits, against stand-ins for Python
and compute-sanitizer; what it says in the end; and the training that it does, on the CPU."""

import csv
import os
import stat
import time
from pathlib import Path

import pytest
import torch
from helpers import DEVICE

from vrm_kernels import backends
from vrm_kernels.backends import device_record

check = pytest.importorskip("benchmarks.gpu.check", reason="the benchmarks are not here")

ROOT = Path(__file__).parents[2]
PARTS = ["build", "tests", "sanitize", "bench", "train"]
# Writes what it is asked for into a log; FAIL and HANG are words of a command that fails, or that never ends.
STUB = """#!/usr/bin/env bash
echo "$TORCH_CUDA_ARCH_LIST|$*" >>"$LOG"
for word in "$@"; do
  case "$word" in --junitxml=*) printf '%s' "$XML" >"${word#--junitxml=}" ;; esac
done
if [ -n "$HANG" ] && [[ "$*" == *$HANG* ]]; then sleep 60; fi
[ -z "$FAIL" ] || [[ "$*" != *$FAIL* ]]
"""
CASE = '<testcase classname="tests.backends.{0}" name="{1}">{2}</testcase>'
PASSED = {
    "cuda": CASE.format("cuda.test_device", "a", ""),
    "triton": CASE.format("triton.test_device.TestForms", "a", ""),
}
RIGHT = f"<x>{''.join(PASSED.values())}{CASE.format('triton.test_device', 'b', '<skipped/>')}</x>"


class Device:
    """A GPU that is not there."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU")


@pytest.fixture
def gpu_check(tmp_path, monkeypatch):
    """Runs it: ``(exit status, commands, each after the targets that it was to compile for)``."""
    Device(monkeypatch)
    for name in ("python", "compute-sanitizer"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(device_record, "PATH", tmp_path / "record.json")

    def run(*words, fail="", hang="", xml=RIGHT):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        for name, value in {"LOG": log, "FAIL": fail, "HANG": hang, "XML": xml}.items():
            monkeypatch.setenv(name, str(value))
        status = check.main([str(tmp_path / "results"), *words], python=str(tmp_path / "python"))
        return status, log.read_text().splitlines()

    return run


def part_of(command: str) -> str:
    words = {"setup.py": "build", "describe()": "build", "gpu.warm": "tests", "-m pytest": "tests"}
    words |= {"gpu.sanitize": "sanitize", "gpu.run": "bench", "gpu.profile": "bench", "gpu.train": "train"}
    return next(part for word, part in words.items() if word in command)


def test_all_parts_in_their_order(gpu_check, tmp_path, capsys):
    status, commands = gpu_check()
    assert status == 0, capsys.readouterr().out
    order = list(dict.fromkeys(map(part_of, commands)))
    assert order == PARTS == list(check.PARTS)
    assert sum(check.PARTS.values()) <= 420
    assert commands[0].startswith("9.0|setup.py") and "build_ext" in commands[0]  # for the GPU at hand
    tests = [command for command in commands if part_of(command) == "tests"]
    assert "benchmarks.gpu.warm" in tests[0]  # the compilers before what would compile
    assert all(file in tests[1] and (ROOT / file).exists() for file in check.BACKENDS.values())
    assert "triton or cuda or torch" in tests[2]
    bench = [command for command in commands if part_of(command) == "bench"]
    # own figures before the peers'
    assert "--peers cuda triton torch" in bench[0] and "gpu.profile" in bench[1]
    assert [command.split("--peers ")[1] for command in bench[2:]] == ["eager chunked", "eager+compile eager+graphs"]
    said = capsys.readouterr().out
    assert said.rstrip().endswith("0 failures") and "| build | ok |" in said
    assert said in (tmp_path / "results" / "log.txt").read_text()


def test_every_tool_watches_what_is_ours(gpu_check):
    _, commands = gpu_check("--parts", "sanitize")
    found = {
        (command.split("benchmarks.gpu.sanitize ")[1].split()[0], command.split("--tool ")[1].split()[0]): command
        for command in commands
        if "--tool" in command
    }
    assert set(found) == {(name, tool) for name, tools in check.TOOLS.items() for tool in tools}
    assert {key for key, command in found.items() if "--own" in command} == check.OWN


@pytest.mark.parametrize("part", PARTS)
def test_a_part_alone(gpu_check, part):
    status, commands = gpu_check("--parts", part)
    assert status == 0 and set(map(part_of, commands)) == {part}


@pytest.mark.parametrize(
    "broken",
    [
        "build_ext",
        "gpu.warm",
        "test_device",
        "triton or cuda",
        "initcheck",
        "--peers eager",
        "gpu.profile",
        "gpu.train",
    ],
)
def test_a_failure_is_told_and_stops_nothing(gpu_check, capsys, broken):
    everything = set(gpu_check()[1])
    capsys.readouterr()
    status, commands = gpu_check(fail=broken)
    said = capsys.readouterr().out
    assert status == 1 and {part_of(command) for command in commands} == {part_of(command) for command in everything}
    assert "0 failures" not in said and "failed (1)" in said.split("failures")[1]


def test_a_peer_that_takes_its_process_with_it_leaves_the_others(gpu_check):
    _, commands = gpu_check("--parts", "bench", fail="--peers eager chunked")
    alone = [command.split("--peers ")[1] for command in commands if "--peers" in command]
    ours = "cuda triton torch"
    assert alone == [ours, "eager chunked", "eager", "chunked", "eager+compile eager+graphs"]


def test_a_part_that_hangs_is_ended_and_its_time_is_not_the_others(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(check, "PARTS", {"build": 1, "tests": 2, "sanitize": 1, "bench": 2, "train": 2})
    start = time.monotonic()
    status, commands = gpu_check(hang="test_device")
    assert time.monotonic() - start < 30
    assert status == 1 and "device tests: stopped after" in capsys.readouterr().out
    assert set(map(part_of, commands)) == set(PARTS)


def test_time_that_a_part_leaves_is_there_for_the_next(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(check.time, "monotonic", lambda: now[0])
    run = check.Check(tmp_path, PARTS, "python", "9.0")
    assert run.left("build") == check.PARTS["build"]
    now[0] = 10.0
    assert run.left("tests") == check.PARTS["build"] - 10 + check.PARTS["tests"]
    now[0] = 400.0
    assert run.left("train") == sum(check.PARTS.values()) - 400


# ---- the record -----------------------------------------------------------------------------------------------------


def test_the_record_says_what_ran_and_how_it_ended(gpu_check, tmp_path):
    failed = RIGHT.replace(PASSED["triton"], PASSED["triton"].replace("></", "><failure/></"))
    status, _ = gpu_check("--parts", "tests", xml=failed)
    entries = {entry["backend"]: entry for entry in device_record.read()}
    assert status == 1
    assert {name: entry["result"] for name, entry in entries.items()} == {
        "cuda": "right", "triton": "1 of 1 tests failed",
    }  # fmt: skip
    assert all(entry["device"] == "A GPU" and entry["torch"] == torch.__version__ for entry in entries.values())
    assert (tmp_path / "results" / "record.json").read_text() == device_record.PATH.read_text()
    gpu_check("--parts", "tests")
    assert [entry["result"] for entry in device_record.read()] == ["right"] * 2  # in the place of the old


@pytest.mark.parametrize("xml", ["<x/>", "", f"<x>{CASE.format('cuda.test_device', 'a', '<skipped/>')}</x>"])
def test_tests_that_did_not_run_are_not_right(gpu_check, xml):
    status, _ = gpu_check("--parts", "tests", xml=xml)
    assert status == 1 and "right" not in {entry["result"] for entry in device_record.read()}


def test_the_record_goes_stale_by_itself(tmp_path, monkeypatch):
    kernel = tmp_path / "csrc" / "cuda" / "kernel.cu"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("// one")
    monkeypatch.setattr(device_record.build_record, "source_tree", lambda: tmp_path)
    monkeypatch.setattr(device_record, "PATH", tmp_path / "record.json")
    entry = {"backend": "cuda", "device": "A GPU", "commit": "abc", "result": "right"}
    device_record.write(entry | {"sources": device_record.sources("cuda")})
    note = device_record.note.__wrapped__
    assert note("cuda") == "right on A GPU at commit abc" and note("triton") == "not yet run on a device"
    kernel.write_text("// two")
    assert note("cuda") == "right on A GPU at commit abc, and has changed since"


def test_every_triton_kernel_is_in_the_hash(tmp_path, monkeypatch):
    folder = tmp_path / "triton" / "folder"
    folder.mkdir(parents=True)
    monkeypatch.setattr(device_record, "__file__", str(tmp_path / "device_record.py"))
    hashes = set()
    for text in ("one", "two"):
        (folder / "kernels.py").write_text(text)
        hashes.add(device_record.sources("triton"))
    assert len(hashes) == 2


# ---- benchmarks and training ----------------------------------------------------------------------------------------


def row(peer, b, c, **columns):
    return {"peer": peer, "batch": b, "classes": c, "mode": "forward+backward", "dtype": "float32"} | columns


def test_arguments_of_the_benchmark():
    from benchmarks.gpu import run

    args = run.arguments(["--csv", "x.csv", "--sizes", "64x100", "4096x1000", "--peers", "triton", "eager"])
    assert args.sizes == [(64, 100), (4096, 1000)] and args.peers == ["triton", "eager"]
    assert set(run.arguments([]).sizes) >= {(64, 100), (4096, 1000), (65536, 1000), (1024, 21841)}
    assert sorted(run.GPU_PEERS) == sorted(name for group in run.GROUPS for name in group)
    assert run.GPU_PEERS["eager+graphs"].mode == "reduce-overhead"
    for words in (["--sizes", "64"], ["--peers", "cpp"]):
        with pytest.raises(SystemExit):
            run.arguments(words)


def test_only_what_can_be_captured_is_captured():
    from benchmarks.gpu.run import GPU_PEERS, is_captured
    from benchmarks.harness.problem import Case

    captured = {name: is_captured(peer, Case(name, 64, 100)) for name, peer in GPU_PEERS.items()}
    assert captured == dict.fromkeys(GPU_PEERS, True) | {"chunked": False, "eager+graphs": False}
    assert not is_captured(GPU_PEERS["torch"], Case("torch", 4096, 1000))


def test_a_benchmark_goes_on_where_it_was(monkeypatch):
    from benchmarks.gpu import run

    monkeypatch.setattr(run, "describe_gpu", dict)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    sizes, far = [(64, 100), (65536, 1000)], time.monotonic() - 1  # out of time: nothing is measured
    rows = list(run.run(sizes, run.DTYPES, ("cuda", "torch"), 0.1, far))
    assert {row["note"] for row in rows} == {"not run: out of time"} and len(
        rows
    ) == 12  # the largest in bfloat16 alone
    key = ("peer", "batch", "classes", "inputs", "dtype", "threads", "mode")
    done = {tuple(row[name] for name in key) for row in rows[:5]}
    assert list(run.run(sizes, run.DTYPES, ("cuda", "torch"), 0.1, far, done)) == rows[5:]


def test_training_is_compared_with_the_same_on_the_cpu(tmp_path, monkeypatch):
    from benchmarks.gpu import train

    monkeypatch.setattr(train, "command", lambda device: {"variant": "vrm-distill", "backend": "auto", "status": "ok"})
    recipe = train.Recipe("resnet8", "resnet8", batch=8, classes=10, size=8)
    variants = tuple(variant for variant in train.VARIANTS if not variant.compiled and variant.precision != "fp16")
    assert len(variants) >= 3
    monkeypatch.setattr(train, "VARIANTS", variants)
    monkeypatch.setattr(train, "TIMED", 1)
    with pytest.raises(SystemExit) as ended:
        train.main([str(tmp_path / "train.csv"), "--budget", "3000"], "cpu", recipe)
    with (tmp_path / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert not ended.value.code and {row["status"] for row in rows} == {"ok"}, rows
    names = [row["variant"] for row in rows]
    assert names[:2] == ["float32", "bf16 autocast"] and "process group of one, gather_distributed" in names
    assert rows[0]["backend"] == backends.resolve("auto", torch.device("cpu")) and float(rows[0]["loss_error"]) < 0.02
    monkeypatch.setattr(train, "VARIANTS", (train.Variant("float32", tolerance=-1.0), *variants[1:]))
    assert next(train.rows(recipe, "cpu", 3000, 1))["status"] == "wrong"  # the comparison can fail
    assert next(train.rows(recipe, "cpu", 0, 1))["status"] == "not run"


def test_the_command_is_run_on_both_devices():
    """Both are the CPU here: the same losses."""
    from benchmarks.gpu import train

    row = train.command("cpu")
    if row["status"] == "not run":
        pytest.skip(row["note"])
    assert row["status"] == "ok" and row["loss_error"] == 0.0, row
    assert train.command("cpu", ("--alpha=-1",))["status"] == "failed"


@pytest.mark.skipif(DEVICE != "cpu" or torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        check.main([str(tmp_path / "results")])
    assert ended.value.code == 1 and "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
