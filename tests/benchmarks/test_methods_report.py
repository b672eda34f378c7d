"""The tables, picture and page of the comparison: paired by seed, of whatever rows there are."""

import math
import statistics

import distill_helpers  # noqa: F401 (skips these tests without the extra)
import pytest

from benchmarks.methods import cost, page, report, results
from benchmarks.methods.methods import METHODS, TASKS


def _row(method, seed, test, dataset="digits", phase=results.TEST):
    numbers = {"trial": "1", "seed": f"{seed}", "settings": "lr=0.02", "validation": "0.91", "validation_ce": "0.3"}
    versions = {"teacher": "0.998", "seconds": "60", "vrm_kernels": "0.1.0", "torch": "2.13.0"}
    return {"dataset": dataset, "phase": phase, "method": method, "test": f"{test}", **numbers, **versions}


def _trials(*methods, dataset="digits"):
    return [_row(method, 1000, "", dataset, results.TRIAL) | {"trial": f"{i}"} for method in methods for i in range(3)]


CE, VRM = {0: 0.90, 1: 0.92, 2: 0.94}, {2: 0.95, 1: 0.95, 3: 0.5}
ROWS = [*_trials("ce", "vrm"), *(_row("vrm", seed, x) for seed, x in VRM.items())]
ROWS += [_row("ce", seed, x) for seed, x in CE.items()]


def _cells(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_differences_are_paired_by_seed_with_students_interval():
    """Seeds that only one of two methods has count for its own mean, and not for the difference."""
    text = report.render(ROWS)
    assert _cells(text, "| `ce` ")[2:] == ["3 trials", "lr=0.02", "91.0 %", "3", "92.0 ± 2.0 %", ""]
    cells = _cells(text, "| `vrm` ")
    assert cells[5] == "3" and cells[6].startswith("80.0 ± ")
    # Seed 1: 95 - 92; seed 2: 95 - 94. Student's t of one degree of freedom is 12.706 at 97.5 %.
    half = 12.7062 * statistics.stdev([3, 1]) / math.sqrt(2)
    assert cells[7] == f"+2.00 ({2 - half:+.2f} to {2 + half:+.2f})"
    assert _cells(text, "| Does relation matching help")[2] == f"{cells[7]}, 2 of 2 above"
    assert "Over KD?" not in text  # nobody ran it
    assert "12 students, 12 minutes" in text and "(99.8 % of the test images)" in text
    assert "Not judged yet: `ce real view`" in text


def test_equal_accuracies_are_not_above():
    rows = [*_trials("ce", "kd", "vrm"), *(_row("kd", seed, 0.9) for seed in range(2))]
    rows += [_row("vrm", 0, 0.9), _row("vrm", 1, 0.91)]
    assert _cells(report.render(rows), "| Over KD?")[2].endswith("1 of 2 above")


def test_trials_alone_are_no_answer(tmp_path):
    assert report.render(_trials("ce")) == "No student has been judged on test images yet."
    assert not report.draw(_trials("ce"), tmp_path / "x.png") and not (tmp_path / "x.png").exists()


def test_the_same_rows_give_the_same_picture(tmp_path):
    rows = [*ROWS, *_trials("ce", "rkd", dataset="omniglot")]
    rows += [_row(method, seed, 0.8, "omniglot") for method in ("ce", "rkd") for seed in range(2)]
    pictures = []
    for name in ("a.png", "b.png"):
        assert report.draw(rows, tmp_path / name)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1] and pictures[0][:4] == b"\x89PNG"


def test_costs_are_measured_of_every_method_and_told(tmp_path):
    task = TASKS["digits"]
    rows = cost.measure("digits", task, repeats=1)
    assert [row["what"] for row in rows] == ["two views", "two views and teacher", *METHODS]
    assert all(float(row["ms"]) > 0 for row in rows)
    cost.append(tmp_path / "cost.csv", rows)
    assert cost.read(tmp_path / "cost.csv") == rows
    rows[2]["ms"] = "1.234"
    assert _cells(report.render(ROWS, rows).split("What a step costs")[1], "| `ce real view`")[1] == "1.23 ms"


def test_page_is_rewritten_between_its_markers(tmp_path, capsys):
    folder, written = tmp_path / "results", tmp_path / "docs" / "compare.md"
    folder.mkdir()
    written.parent.mkdir()
    for row in ROWS:
        results.append(folder / "compare.csv", row)
    written.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    for _ in range(2):
        page.main([str(folder / "compare.csv"), "--page", str(written)])
        text = written.read_text()
        assert text.startswith(f"before\n{page.BEGIN}\n") and text.endswith(f"{page.END}\nafter\n")
        assert "old" not in text and "### digits" in text and "(../results/compare.png)" in text
    for bad, wanted in (("none.csv", "no students yet"), ("page.csv", "not of a comparison")):
        (tmp_path / "page.csv").write_text("x\n")
        with pytest.raises(SystemExit):
            page.main([str(tmp_path / bad), "--page", str(written)])
        assert wanted in capsys.readouterr().err and written.read_text() == text


def test_the_projects_page_has_the_markers_and_every_method():
    text = (page.environment.ROOT / "docs" / "compare.md").read_text()
    assert text.count(page.BEGIN) == text.count(page.END) == 1
    assert all(f"`{name}`" in text for name in METHODS)
