"""``make compare`` tunes, judges, goes on where it was stopped, and refuses what is wrong before it trains."""

import distill_helpers  # noqa: F401 (skips these tests without the extra)
import pytest

from benchmarks.methods import results
from benchmarks.methods import train as compare
from benchmarks.methods.methods import METHODS

SMALL = ["--train-images=128", "--epochs=1", "--teacher-epochs=1", "--trials=2", "--processes=1"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(compare.cost, "measure", lambda name, task: [])
    return ["--output-dir", str(tmp_path / "out"), "--scratch", str(tmp_path / "scratch")]


def test_command_tunes_then_judges_and_goes_on_where_it_was(tmp_path, capsys, folders):
    arguments, path = [*SMALL, *folders, "--methods", "ce", "vrm"], tmp_path / "out" / "compare.csv"
    assert compare.main([*arguments, "--seeds=1"]) == 0
    rows = results.read(path)
    trials, tests = ([row for row in rows if row["phase"] == phase] for phase in (results.TRIAL, results.TEST))
    assert {(row["method"], row["trial"]) for row in trials} == {(m, t) for m in ("ce", "vrm") for t in "01"}
    assert all(row["test"] == "" and row["seed"] == "1000" for row in trials)
    assert [(row["method"], row["seed"]) for row in tests] == [("ce", "0"), ("vrm", "0")]
    for row in tests:
        best = compare.choose(trial for trial in trials if trial["method"] == row["method"])
        settings = METHODS[row["method"]].trials(2)[best]
        assert row["trial"] == str(best) and row["settings"] == compare.written(settings)
        assert 0 <= float(row["test"]) <= 1
    assert not list((tmp_path / "scratch").glob("bank-*"))

    # Nothing is left, then a seed more, then a row that a kill cut off: trained again, to the same accuracies.
    before = path.read_bytes()
    assert compare.main([*arguments, "--seeds=1"]) == 0 and path.read_bytes() == before
    assert compare.main([*arguments, "--seeds=2"]) == 0
    whole = results.read(path)
    assert whole[:6] == rows and [(row["method"], row["seed"]) for row in whole[6:]] == [("ce", "1"), ("vrm", "1")]
    path.write_bytes(path.read_bytes()[:-30])
    assert compare.main([*arguments, "--seeds=2"]) == 0
    again = results.read(path)
    last, was = ({**row, "seconds": ""} for row in (again[-1], whole[-1]))
    assert again[:-1] == whole[:-1] and last == was

    # A better teacher is another comparison.
    capsys.readouterr()
    assert compare.main([*arguments, "--seeds=3", "--teacher-epochs=5"]) == 1
    assert "take another --output-dir" in capsys.readouterr().err and results.read(path) == again


def test_other_trials_are_not_put_beside_these(tmp_path, capsys, folders, monkeypatch):
    arguments = [*SMALL, *folders, "--methods", "ce", "--seeds=1"]
    assert compare.main(arguments) == 0
    monkeypatch.setitem(METHODS, "ce", METHODS["vrm"])
    with pytest.raises(SystemExit):
        compare.main([*arguments, "--seeds=2"])
    assert "was lr=0.01 and is lr=0.01 alpha=4 beta=2: take another --output-dir" in capsys.readouterr().err


def test_the_chosen_trial_is_the_best_on_validation_images_and_never_one_that_diverged():
    def trial(number, accuracy, cross_entropy):
        numbers = {"validation": f"{accuracy}", "validation_ce": f"{cross_entropy}"}
        return {"phase": results.TRIAL, "trial": f"{number}", **numbers}

    assert compare.choose([trial(0, 0.9, 0.1), trial(1, 0.95, 0.5), trial(2, 0.95, 0.4)]) == 2
    assert compare.choose([trial(0, 0.1, float("inf")), trial(1, 0.1, 3.0)]) == 1


def test_a_student_that_diverges_is_a_guess(tmp_path):
    task = compare.replace(compare.TASKS["digits"], epochs=2, teacher_epochs=1, train_images=128)
    compare.bank_file(task, tmp_path, 0)
    job = compare.Job("digits", task, tmp_path, "vrm", results.TEST, 0, 0, {"lr": 1e30, "alpha": 4.0, "beta": 2.0})
    row = compare.student(job)
    assert (row["validation"], row["validation_ce"], row["test"]) == ("0.100000", "inf", "0.100000")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--seeds", "0"], "--seeds: must be at least 1"),
        (["--trials", "0"], "--trials: must be at least 1"),
        (["--epochs", "-1"], "--epochs: must be at least 1"),
        (["--processes", "0"], "--processes: must be at least 1"),
        (["--datasets", "imagenet"], "--datasets: invalid choice"),
        (["--methods", "magic"], "--methods: invalid choice"),
        (["--datasets", "digits", "omniglot", "--omniglot", "nowhere"], "--omniglot: omniglot:nowhere: nowhere does"),
        (["--datasets", "digits", "fashion", "--fashion", "nowhere"], "--fashion: idx:nowhere: nowhere does not"),
        (["--train-images", "5"], "--train-images: digits has 20 to 900"),
        (["--train-images", "50"], "--train-images: digits has 50 images to train on, a batch has 64"),
    ],
)
def test_bad_arguments_are_refused_before_any_training(arguments, wanted, tmp_path, capsys, folders, monkeypatch):
    monkeypatch.setattr(compare.Comparison, "run", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(compare, "teacher", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit) as status:
        compare.main([*folders, *arguments])
    assert status.value.code == 2
    message = capsys.readouterr().err.split("error: ")[1]
    assert f"argument {wanted}" in message and message.count("\n") == 1


HEADER = ",".join(results.FIELDS)
LINE = "digits,test,ce,3,0,lr=0.01,0.9,0.3,0.95,0.99,6.1,0.1.0,2.13.0"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"a,b\n", "its columns are a, b"),
        (b"\xff\xfe\n", "cannot be read"),
        (f"{HEADER}\n{LINE}\ndigits,ce\n".encode(), "line 3: 2 columns of 13"),
        (f"{HEADER}\n{LINE.replace('0.9,0.3', 'high,0.3')}\n".encode(), "line 2: could not convert"),
        (f"{HEADER}\n{LINE.replace('0.95', '')}\n".encode(), "line 2: could not convert"),
    ],
)
def test_a_csv_that_cannot_be_read_is_refused(content, wanted, tmp_path, capsys, folders):
    path = tmp_path / "out" / "compare.csv"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(SystemExit) as status:
        compare.main(folders)
    assert status.value.code == 2
    message = capsys.readouterr().err.split("error: ")[1]
    assert wanted in message and message.count("\n") == 1
    assert path.read_bytes() == content


def test_a_row_that_a_kill_cut_off_is_dropped(tmp_path):
    """Wherever the file ends, reading finds the whole rows, and the next row stands on a line of its own."""
    path = tmp_path / "compare.csv"
    rows = [dict(zip(results.FIELDS, LINE.replace("3,0", f"3,{seed}").split(","), strict=True)) for seed in range(3)]
    for row in rows[:2]:
        results.append(path, row)
    whole = path.read_bytes()
    assert results.read(path) == rows[:2]
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = rows[: max(0, sum(end <= length for end in ends) - 1)]
        assert results.read(path) == kept
        results.append(path, rows[2])
        assert results.read(path) == [*kept, rows[2]]
