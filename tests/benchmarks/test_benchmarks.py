"""The benchmark suite tells the truth: nothing wrong is timed, and what does not fit or takes too long is a result."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.cpu import run
from benchmarks.harness import environment, memory, oracle, peers, problem, records
from benchmarks.harness.measure import call_once, failure, measure, start
from benchmarks.harness.problem import MODES, Case
from benchmarks.report import compare, summary, table

MEMORY = 4 * 2**30
PROBLEM = Case("torch", 12, 7, threads=1)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def solved() -> oracle.Oracle:
    return oracle.solve(PROBLEM, MEMORY)


def measured(case: Case, solved: oracle.Oracle) -> list[records.Row]:
    return list(measure(case, solved, seconds=0.01, memory_limit=MEMORY))


def result(case: Case = PROBLEM, mode: str = MODES[1], **values) -> records.Row:
    """A row as a run writes it, with made-up measurements."""
    numbers = {"time_ms": 10.0, "time_p20_ms": 9.0, "time_p80_ms": 11.0, "repeats": 20, "gemm_unit_ms": 2.0}
    numbers |= {"gemm_units": 5.0, "gemm_drift": 1.0, "peak_mb": 3.0, "verified_against": "eager float64"}
    row = start(case, mode) | {"status": "ok"} | numbers | environment.describe() | values
    if row["status"] != "ok":
        row |= dict.fromkeys(numbers)
    return row


def written(path: Path, rows: list[records.Row]) -> Path:
    records.append(path, rows)
    return path


# ---- verified before it is timed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, peer in peers.PEERS.items() if not peer.compiled])
@pytest.mark.parametrize("inputs", problem.INPUTS)
def test_peers_agree_with_the_oracle(name, inputs, monkeypatch):
    usable, reason = peers.PEERS[name].status()
    if not usable:
        pytest.skip(reason)
    monkeypatch.setattr(peers, "CHUNK_ELEMENTS", 150)  # several chunks, the last one short
    case = dataclasses.replace(PROBLEM, peer=name, inputs=inputs)
    logits, labels = problem.make_inputs(case)
    value, grads = call_once(peers.PEERS[name].build(), logits, labels, MODES[1])
    loss_error, grad_error = oracle.solve(case, MEMORY).errors(float(value), grads)
    assert loss_error < 1e-5 and grad_error < 1e-4
    assert all(x.grad is None for x in logits)


def test_the_compiled_peers_are_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda loss, **settings: ("compiled", loss))
    built = {name: peer.build() for name, peer in peers.PEERS.items()}
    compiled = {name: loss[1].backend for name, loss in built.items() if isinstance(loss, tuple)}
    assert compiled == {"eager+compile": "reference", "torch+compile": "torch"}


def test_both_literal_oracles_agree(solved):
    other = oracle._solve(PROBLEM, "chunked", "float64", PROBLEM.batch)
    assert max(solved.errors(other.loss, other.grads)) < 1e-12
    assert solved.source == "eager float64"


class Altered(nn.Module):
    """A peer that is nearly right."""

    def __init__(self, loss: nn.Module, forward: float = 1.0, backward: float = 1.0) -> None:
        super().__init__()
        self.loss, self.value, self.slope = loss, forward, backward

    def forward(self, *inputs):
        loss = self.loss(*inputs)
        return self.value * loss.detach() + self.slope * (loss - loss.detach())


@pytest.mark.parametrize(
    "alteration",
    [
        lambda loss: Altered(loss, forward=1.01),
        lambda loss: Altered(loss, backward=1.03),
        lambda loss: Altered(loss, forward=float("nan")),
        lambda loss: Altered(loss, backward=float("nan")),
        lambda loss: peers.VRMLoss(problem.ALPHA, problem.BETA, unreliable_pruning_percentile=40, backend="torch"),
        lambda loss: peers.VRMLoss(problem.ALPHA, problem.BETA * 1.05, backend="torch"),
    ],
    ids=["loss", "gradient", "nan loss", "nan gradient", "percentile", "beta"],
)
def test_a_wrong_peer_is_not_timed(alteration, monkeypatch, solved):
    peer = peers.PEERS["torch"]
    wrong = dataclasses.replace(peer, make=lambda: alteration(peer.make()))
    monkeypatch.setitem(peers.PEERS, "torch", wrong)
    rows = measured(PROBLEM, solved)
    assert [row["status"] for row in rows] == ["wrong", "wrong"]
    assert not any(name in row for row in rows for name in ("time_ms", "gemm_units"))


def test_a_large_problem_is_verified_on_its_first_samples(monkeypatch):
    monkeypatch.setattr(oracle, "candidates", lambda case, limit: iter([("chunked", "float64", 5)]))
    part = oracle.solve(PROBLEM, MEMORY)
    assert part.source == "chunked float64, first 5 samples"
    rows = measured(PROBLEM, part)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert {row["verified_against"] for row in rows} == {part.source}


def test_large_problems_do_not_ask_for_the_literal_oracle():
    literal = {name for name, *_ in oracle.candidates(Case("", 1024, 1000), MEMORY)} & {"eager", "chunked"}
    assert not literal
    assert list(oracle.candidates(Case("", 32768, 100), MEMORY)) == [("torch", "float64", oracle.FIRST_SAMPLES)]


# ---- what is written ------------------------------------------------------------------------------------------------


def test_rows_have_the_columns_and_come_back_as_they_were(tmp_path, solved):
    rows = [row | environment.describe() for row in measured(PROBLEM, solved)]
    assert [row["mode"] for row in rows] == list(MODES)
    assert all(set(row) <= set(records.COLUMNS) and row["status"] == "ok" for row in rows)
    assert all(row["time_p20_ms"] <= row["time_ms"] <= row["time_p80_ms"] and row["repeats"] >= 5 for row in rows)
    back = records.read(written(tmp_path / "cpu.csv", rows))
    for row, read in zip(rows, back, strict=True):
        for name in records.COLUMNS:
            value = row.get(name)
            assert read[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value or None), name


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "cpu.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="lacks the columns peer, batch"):
        records.read(tmp_path / "cpu.csv")


def test_newest_goes_by_the_date_inside(tmp_path):
    late = written(tmp_path / "cpu-a.csv", [result(date="2031-01-02 00:00:00")])
    written(tmp_path / "cpu-b.csv", [result(date="2030-01-02 00:00:00")])
    assert records.newest(tmp_path) == late
    with pytest.raises(FileNotFoundError, match="make bench"):
        records.newest(tmp_path / "none")


def test_peak_memory_counts_what_was_alive_at_once():
    block = 2**24  # floats: 64 MiB

    def call():
        first = torch.ones(block)
        del first
        return torch.ones(block) + 1

    size, peak = memory.peak_of(lambda: call().numel())
    if peak is None:
        pytest.skip("this system cannot reset the high-water mark of a process")
    assert size == block
    assert 1.95 * 4 * block < peak < 2.3 * 4 * block


class Hoarding(nn.Module):
    """A peer that keeps a workspace of 32 MiB from its first real call on."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss, self.workspace = loss, None

    def forward(self, *inputs):
        if len(inputs[0]) == PROBLEM.batch and self.workspace is None:
            self.workspace = torch.ones(2**23)
        return self.loss(*inputs)


def test_a_workspace_that_is_kept_is_counted_in_both_modes(monkeypatch, solved):
    peer = peers.PEERS["torch"]
    monkeypatch.setitem(peers.PEERS, "torch", dataclasses.replace(peer, make=lambda: Hoarding(peer.make())))
    peaks = [row["peak_mb"] for row in measured(PROBLEM, solved)]
    if None in peaks:
        pytest.skip("this system cannot reset the high-water mark of a process")
    assert all(31 < peak < 45 for peak in peaks), peaks


# ---- what does not work is a result ---------------------------------------------------------------------------------


def statuses(case: Case, output: Path, slow=60.0, memory_limit=MEMORY) -> dict[str, records.Row]:
    rows = list(run.run([case], run.Limits(0.01, slow, memory_limit), output))
    assert records.read(output)[0]["status"] == rows[0]["status"]
    return {row["mode"]: row for row in rows}


def test_a_problem_that_cannot_fit_is_out_of_memory(tmp_path):
    rows = statuses(Case("eager", 1024, 1000), tmp_path / "cpu.csv")
    assert {row["status"] for row in rows.values()} == {"out of memory"}
    assert rows[MODES[1]]["note"] == "not run: needs at least 42.5 GB"


def test_running_out_of_memory_is_noticed():
    script = (
        "import torch; from benchmarks.harness import memory; memory.limit_address_space(2**28)\n"
        "try: torch.ones(2**28)\n"
        "except RuntimeError as error: assert memory.is_exhausted(error); print('noticed')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=environment.ROOT, capture_output=True, text=True)
    assert done.stdout == "noticed\n", done.stderr
    assert failure(MemoryError(), 2**31) == {"status": "out of memory", "note": "needs more than 2 GB"}
    assert failure(ValueError("odd"), 2**31) == {"status": "failed", "note": "odd"}


def test_a_process_over_time_is_too_slow(tmp_path):
    why = run._run(
        ["benchmarks.harness.oracle", json.dumps(vars(PROBLEM)), str(tmp_path / "o")], PROBLEM, 0.05, MEMORY, tmp_path
    )
    assert why == {"status": "too slow", "note": "stopped after 0.05 s"}


def test_a_slow_peer_is_not_run_at_a_larger_size():
    slow = result(Case("chunked", 128, 1000), time_ms=8000.0)
    larger = Case("chunked", 1024, 1000)
    row = run.too_slow(larger, MODES[1], [slow], 60.0)
    assert row["status"] == "too slow"
    assert row["note"] == "not run: about 115 s a call, going by 128x1000; limit 60 s"
    assert run.too_slow(larger, MODES[1], [slow], 120.0) is None
    assert run.too_slow(larger, MODES[0], [slow], 60.0) is None, "another mode says nothing"
    assert run.too_slow(Case("torch", 1024, 1000), MODES[1], [slow], 60.0) is None, "nor does another peer"


def test_a_backend_that_is_not_here_is_unavailable(tmp_path, monkeypatch):
    registry = peers.backends.REGISTRY
    missing = dataclasses.replace(registry["cpp"], status=lambda device=None: (False, "no compiler was found"))
    monkeypatch.setitem(registry, "cpp", missing)
    rows = statuses(Case("cpp", 8, 6), tmp_path / "cpu.csv")
    assert {row["status"] for row in rows.values()} == {"unavailable"}
    assert "no compiler was found" in rows[MODES[0]]["note"]


def test_a_run_from_the_command_line(tmp_path, capsys):
    options = ["--sizes", "8x6", "--peers", "torch", "--threads", "1", "--seconds", "0.01", "--memory", "4"]
    path = run.main([*options, "--output", str(tmp_path)])
    assert [(row["peer"], row["mode"], row["status"]) for row in records.read(path)] == [
        ("torch", mode, "ok") for mode in MODES
    ], path.read_text()
    assert path.name.startswith("cpu-") and path.name in capsys.readouterr().out


def test_the_suite_has_every_peer_on_every_size():
    cases = run.suite(threads=2, dtype="float32")
    sizes = ["64x100", "256x100", "512x100", "128x1000", "1024x1000", "4096x100", "16384x100", "64x21841"]
    assert {(case.peer, case.size) for case in cases} >= {(peer, size) for peer in peers.PEERS for size in sizes}
    scaling = {case.batch for case in cases if (case.peer, case.classes) == ("cpp", 100)}
    assert scaling >= {2048, 4096, 8192, 16384, 32768}
    assert {case.threads for case in cases if (case.peer, case.size) == ("cpp", "1024x1000")} == {1, 2}
    assert {case.inputs for case in cases if case.peer == "cpp"} == set(problem.INPUTS)


# ---- the readers of results -----------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path) -> Path:
    rows = []
    for b, c in ((64, 100), (1024, 1000)):
        times = {
            "eager": 400.0,
            "eager+compile": 90.0,
            "chunked": 500.0,
            "torch": 20.0,
            "torch+compile": 21.0,
            "cpp": 2.0,
        }
        for peer, time in times.items():
            status = "out of memory" if b == 1024 and peer == "eager" else "ok"
            rows.append(result(Case(peer, b, c, threads=2), status=status, time_ms=time, note="because"))
    for b in (2048, 4096, 8192):
        rows.append(result(Case("cpp", b, 100, threads=2), time_ms=b**2 / 1e4))
    rows.append(result(Case("cpp", 1024, 1000, threads=1), time_ms=3.8))
    return written(tmp_path / "cpu-x.csv", rows)


def test_the_page_of_tables(results, tmp_path, capsys):
    page = tmp_path / "benchmarks.md"
    page.write_text(f"# Title\n\n{table.BEGIN}\nstale\n{table.END}\n\ntail\n")
    table.main([str(results), "--page", str(page)])
    once = page.read_text()
    table.main([str(results), "--page", str(page)])
    assert page.read_text() == once
    assert once.startswith(f"# Title\n\n{table.BEGIN}\n") and once.endswith(f"{table.END}\n\ntail\n")
    assert "stale" not in once
    assert "| 64 x 100 | 400 ms | 90.0 ms | 500 ms | 20.0 ms | 21.0 ms | 2.00 ms | 200x | 45.0x | 5.00 |" in once
    assert "| 1024 x 1000 | out of memory | 90.0 ms |" in once
    assert "grows as B to the power 2.00" in once
    assert "From 1 to 2 threads, `cpp` at 1024 x 1000 is 1.90 times as fast." in once
    assert "[cpu-x.csv](cpu-x.csv)" in once


@pytest.mark.parametrize(
    "text", ["nothing", f"{table.BEGIN}", f"{table.END} {table.BEGIN}", table.BEGIN * 2 + table.END]
)
def test_a_page_without_its_markers_is_left_alone(text, results, tmp_path, capsys):
    page = tmp_path / "benchmarks.md"
    page.write_text(text)
    with pytest.raises(SystemExit):
        table.main([str(results), "--page", str(page)])
    assert page.read_text() == text
    assert "must have one line" in capsys.readouterr().err


def test_the_rows_of_readme_and_the_gpu_table(results, tmp_path, capsys):
    gpu = {"threads": 1, "commit": "abc", "gpu": "a GPU", "date": "2031-01-02 00:00:00"}
    both = {**gpu, "time_ms": 4.0, "replay_ms": 0.5}
    lines = [
        result(Case("eager", 64, 100), **{**both, "time_ms": 8.0}),
        result(Case("cuda", 64, 100), **both),
        result(Case("cuda", 4096, 1000), **gpu, status="too slow", note="not run: out of time"),
    ]
    records.append(tmp_path / "gpu-new.csv", lines, records.GPU_COLUMNS)
    older = result(Case("cuda", 64, 100), **{**both, "commit": "old", "date": "2030-01-02 00:00:00", "time_ms": 99.0})
    records.append(tmp_path / "gpu-old.csv", [older], records.GPU_COLUMNS)
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    readme.write_text("\n".join(summary.ROWS))
    page.write_text("\n".join(summary.GPU))
    summary.main(["--results", str(tmp_path), "--readme", str(readme), "--page", str(page)])
    assert "| 64 x 100 | 400 ms | 2.00 ms | 200x | 8.00 ms | 4.00 ms | 2.00x |" in readme.read_text()
    assert "| 4096 x 1000 |  |  |  |  |  |  |" in readme.read_text()
    assert "| 64 x 100 | 8.00 ms / 0.50 ms | 4.00 ms / 0.50 ms |" in page.read_text()
    assert "gpu-new.csv](gpu-new.csv)" in page.read_text() and "gpu-old" not in page.read_text()


def test_compare_says_what_changed(tmp_path, capsys):
    cases = [Case(peer, 64, 100, threads=2) for peer in ("eager", "torch", "cpp", "chunked")]
    old = [result(case) for case in cases]
    new = [
        result(cases[0], time_ms=10.5, time_p20_ms=9.5, time_p80_ms=12.0),
        result(cases[1], time_ms=5.0, time_p20_ms=4.0, time_p80_ms=6.0, gemm_units=2.5, peak_mb=6.0),
        result(cases[2], status="wrong"),
        result(Case("cpp", 99, 98), compiler="another"),
    ]
    files = [str(written(tmp_path / name, rows)) for name, rows in (("a.csv", old), ("b.csv", new))]
    compare.main(files)  # returns: a difference is not a failure
    lines = capsys.readouterr().out.splitlines()
    eager, torch_, cpp = (next(line for line in lines if f" {name} " in line) for name in ("eager", "torch", "cpp"))
    assert "1.05" in eager and "within noise" in eager
    assert torch_.split()[6:] == ["10.000", "5.000", "0.50", "0.50", "2.00", "faster"]
    assert cpp.endswith("status changed") and "wrong" in cpp
    assert lines[-2:] == [
        "only in the old file: 64x100 chunked forward+backward",
        "only in the new file: 99x98 cpp forward+backward",
    ]


def test_plots_are_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.report import plot

    plot.main([str(results)])
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["cpu-batch.png", "cpu-classes.png"]
    assert all(path.stat().st_size > 10_000 for path in tmp_path.glob("*.png"))
