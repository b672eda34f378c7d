"""The tables, pictures and page of the comparison: paired by seed, of whatever rows there are."""

import statistics

import distill_helpers  # noqa: F401 (skips these tests without the extra)
import pytest

from benchmarks.methods import page as methods
from benchmarks.methods import report as compare_report
from benchmarks.methods import train as compare


def _row(method, seed, last, dataset="digits", batch=64):
    return {
        "dataset": dataset, "method": method, "seed": str(seed), "batch_size": str(batch), "epochs": "30",
        "last": f"{last}", "best": f"{last + 0.01}", "teacher": "0.998", "seconds": "60", "vrm_kernels": "0.1.0",
        "torch": "2.13.0",
    }  # fmt: skip


CE, VRM = {0: 0.90, 1: 0.92, 2: 0.94}, {2: 0.95, 1: 0.95, 3: 0.5}
ROWS = [_row("vrm", seed, x) for seed, x in VRM.items()] + [_row("ce", seed, x) for seed, x in CE.items()]
ROWS += [_row("vrm no pruning", 1, 0.96)]
BATCHES = [_row(method, 0, last, batch=16) for method, last in (("ce", 0.8), ("kd", 0.7), ("vrm", 0.75))]


def _cells(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_differences_are_paired_by_seed():
    """Seeds that only one of two methods has count for its own mean, and not for the difference."""
    text = compare_report.render(ROWS)
    methods_table, ablations = text.split("Relation matching's ablations:")
    spread = statistics.stdev([90, 92, 94])
    assert _cells(methods_table, "| `ce`") == ["`ce`", "3", f"92.0 ± {spread:.1f} %", f"93.0 ± {spread:.1f} %", "", ""]
    cells = _cells(methods_table, "| `vrm`")
    assert cells[:2] == ["`vrm`", "3"] and cells[2].startswith("80.0 ± ")
    # Seed 1: 95 - 92; seed 2: 95 - 94.
    assert cells[4:] == [f"+2.00 ± {statistics.stdev([3, 1]):.2f}", "2 of 2"]
    assert _cells(ablations, "| `vrm no pruning`")[1:] == [
        "1",
        "96.0 %",
        "97.0 %",
        "+4.00",
        "1 of 1",
        "+1.00",
        "1 of 1",
    ]
    assert text.index("| `ce`") < text.index("| `vrm`")
    assert "7 students, trained in 7 minutes" in text and "(99.8 %)" in text


def test_equal_accuracies_are_not_above():
    rows = [_row("ce", 0, 0.9), _row("ce", 1, 0.9), _row("kd", 0, 0.9), _row("kd", 1, 0.91)]
    assert _cells(compare_report.render(rows), "| `kd`")[-1] == "1 of 2"


def test_batch_sizes_are_compared_each_by_itself():
    text = compare_report.render([*ROWS, *BATCHES])
    cells = _cells(text, "| 16 ")
    assert cells == ["16", "80.0 %", "70.0 %", "75.0 %", "-5.00", "0 of 1", "+5.00", "1 of 1"]
    assert _cells(text, "| 64 ")[2] == ""  # nobody ran kd there
    assert _cells(text.split("### digits")[1], "| `ce`")[1] == "3"  # those of batch 64 alone


def test_pictures_are_those_that_the_rows_are_enough_for(tmp_path):
    assert compare_report.draw([], tmp_path) == []
    assert [path.name for path in compare_report.draw(ROWS[:1], tmp_path)] == ["compare.png"]
    rows = [*ROWS, *BATCHES, *(_row("rkd", seed, 0.8, "omniglot") for seed in range(2))]
    written = compare_report.draw(rows, tmp_path)
    assert [path.name for path in written] == ["compare.png", "compare-batch.png"]
    before = [path.read_bytes() for path in written]
    assert all(picture[:4] == b"\x89PNG" for picture in before)
    compare_report.draw(rows, tmp_path)
    assert [path.read_bytes() for path in written] == before


def test_page_is_rewritten_between_its_markers(tmp_path, capsys):
    results, page = tmp_path / "results", tmp_path / "docs" / "compare.md"
    results.mkdir()
    page.parent.mkdir()
    for row in [*ROWS, *BATCHES]:
        compare.append(results / "compare.csv", row)
    page.write_text(f"before\n{methods.BEGIN}\nold\n{methods.END}\nafter\n")
    for _ in range(2):
        methods.main([str(results / "compare.csv"), "--page", str(page)])
        text = page.read_text()
        assert text.startswith(f"before\n{methods.BEGIN}\n") and text.endswith(f"{methods.END}\nafter\n")
        assert "old" not in text and "### digits" in text and "![accuracy by method](../results/compare.png)" in text
    assert (results / "compare-batch.png").exists()
    for bad, wanted in (("none.csv", "no students yet"), ("page.csv", "not of a comparison")):
        (tmp_path / "page.csv").write_text("x\n")
        with pytest.raises(SystemExit):
            methods.main([str(tmp_path / bad), "--page", str(page)])
        assert wanted in capsys.readouterr().err and page.read_text() == text


def test_the_projects_page_has_the_markers():
    page = (methods.environment.ROOT / "docs" / "compare.md").read_text()
    assert page.count(methods.BEGIN) == page.count(methods.END) == 1
    assert all(f"| `{name}` |" in page for name in compare.METHODS)
    assert all(name.removeprefix("vrm ") in page for name in compare.ABLATIONS if "percentile" not in name)
