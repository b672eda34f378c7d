"""``vrm-distill`` under torchrun, on gloo: one run of the global batch, and the same student after a killed worker."""

import os
import signal
import sys
import time

import pytest
import torch
from distill_helpers import QUICK, comparable, finish, read_log, same_weights, start
from safetensors.torch import load_file

from vrm_distill.cli import main
from vrm_distill.data import ShardedBatches

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
MODULE = ["-m", "vrm_distill.cli"]
# No batch norm, whose statistics are of each process's own share.
PLAIN = [
    "--teacher=distill_helpers:without_batch_norm",
    "--student=distill_helpers:without_batch_norm",
    "--augment=none",
]
FEW = [*QUICK, "--baselines=alone_both", "--seeds=1"]


def test_shares_of_the_processes_are_the_batch_of_one():
    whole = ShardedBatches(103, 24, seed=3)
    whole.seek(2, 0)
    for world, accumulate in ((2, 1), (3, 2), (4, 3)):
        shares = [ShardedBatches(103, 24, 3, rank, world, accumulate) for rank in range(world)]
        for share in shares:
            share.seek(2, 0)
        dealt = [[torch.cat(parts) for parts in zip(*[iter(share)] * accumulate, strict=True)] for share in shares]
        assert all(len(parts) == 4 for parts in dealt)
        for step, batch in enumerate(whole):
            assert torch.equal(torch.cat([parts[step] for parts in dealt]), batch)
    resumed = ShardedBatches(103, 24, seed=3)
    resumed.seek(2, 2)
    assert torch.equal(torch.cat(list(resumed)), torch.cat(list(whole)[2:]))
    other = ShardedBatches(103, 24, seed=3)
    assert not torch.equal(next(iter(other)), next(iter(whole)))


def test_a_batch_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(ValueError, match=r"batch of 10.*3 processes.*multiple of 3"):
        ShardedBatches(100, 10, 0, 0, 3)
    with pytest.raises(ValueError, match="200 is larger than the 100"):
        ShardedBatches(100, 200, 0)


def test_two_processes_train_the_student_of_one(tmp_path):
    """Sums over two processes and over two micro-batches are the sums over the batch: the same weights, to rounding."""
    # Cross-entropy alone: relations of two shares are not those of their union, which --gather-distributed is for.
    arguments = [*FEW, *PLAIN, "--alpha=0", "--beta=0", "--optimizer=sgd", "--output-dir"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    output = finish(start(*MODULE, *arguments, tmp_path / "two", launcher=TORCHRUN))
    assert output.count("teacher: ") == 1 and output.count("128 images to train") == 1  # one log on the screen,
    assert len(read_log(tmp_path / "two")) == len(read_log(tmp_path / "one"))  # and one in the folder
    summary = (tmp_path / "two" / "summary.md").read_text()
    assert "ms in one process, without what processes send each other," in summary and ", 2 processes." in summary
    assert "in one process" not in (tmp_path / "one" / "summary.md").read_text()
    assert main([*arguments, str(tmp_path / "parts"), "--accumulate=2"]) == 0
    expected = load_file(tmp_path / "one" / "student.safetensors")
    for other in ("two", "parts"):
        found = load_file(tmp_path / other / "student.safetensors")
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-6)
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-4)
        assert a["test_accuracy"] == b["test_accuracy"]  # judged in shares, counted together


def test_killed_worker_restarts_from_the_checkpoint_and_ends_in_the_same_student(tmp_path):
    arguments = [*MODULE, *FEW, "--epochs=12", "--checkpoint-steps=1"]
    finish(start(*arguments, "--output-dir", tmp_path / "undisturbed", launcher=TORCHRUN))
    folder = tmp_path / "killed"
    process = start(*arguments, "--output-dir", folder, launcher=[*TORCHRUN, "--max-restarts=1"])
    try:
        deadline = time.monotonic() + 60
        while not (folder / "log.csv").exists() or len(read_log(folder)) < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(max(_children(process.pid)), signal.SIGKILL)
        output = finish(process)
    finally:
        process.kill()
    assert "exitcode: -9" in output  # torchrun did see a worker die
    for name in ("teacher.safetensors", "student.safetensors"):
        assert same_weights(folder / name, tmp_path / "undisturbed" / name)
    assert comparable(read_log(folder)) == comparable(read_log(tmp_path / "undisturbed"))


def _children(parent):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found.append(int(entry))
    assert found
    return found


def test_gather_distributed_reaches_the_loss(tmp_path, monkeypatch):
    """The option builds a loss of the global batch; what that computes is tested where the loss is."""
    from vrm_distill import recipe
    from vrm_distill.options import parse, settings_of

    options = parse(["--gather-distributed", "--output-dir", str(tmp_path)])
    assert recipe.make_loss(settings_of(options)).gather_distributed is True
    options = parse(["--output-dir", str(tmp_path)])
    assert recipe.make_loss(settings_of(options)).gather_distributed is False


def test_under_torchrun_the_folder_must_be_named():
    process = start(*MODULE, *FEW, launcher=TORCHRUN)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "argument --output-dir: name it under torchrun" in output


def test_parameter_without_a_gradient_names_the_option(tmp_path):
    arguments = [*MODULE, *QUICK, "--baselines=none", "--seeds=1", "--epochs=1", "--teacher-epochs=1"]
    arguments += ["--student=distill_helpers:idle_parameter", "--output-dir"]
    process = start(*arguments, tmp_path / "refused", launcher=TORCHRUN)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "add --find-unused-parameters" in output
    said = finish(start(*arguments, tmp_path / "run", "--find-unused-parameters", launcher=TORCHRUN), timeout=300)
    assert "warning: relations are those of each of 2 processes' own share" in said
