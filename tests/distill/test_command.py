"""``vrm-distill`` end to end on a small run: what it writes, that it repeats itself, that its comparison is fair."""

import contextlib
import io
import os
import signal
import subprocess
import time

import pytest
import torch
from distill_helpers import COMMAND, QUICK, comparable, read_log, train

from vrm_distill import load_checkpoint, validate
from vrm_distill.cli import main
from vrm_distill.data import open_dataset, plain_loader

SHOWN = {"config.yaml", "curves.png", "report.html", "relations.png", "log.csv", "summary.md"}
SHOWN |= {"student.safetensors", "teacher.safetensors"}
OUTPUTS = SHOWN | {"resume.pt"}


@pytest.fixture(autouse=True, scope="module")
def _threads():
    """The command sets the process's thread count."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill") / "first"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setenv("COLUMNS", "120")
        assert main([*QUICK, "--output-dir", str(folder)]) == 0
    return folder, output.getvalue()


def test_writes_what_it_says(finished):
    folder, output = finished
    assert set(os.listdir(folder)) == OUTPUTS
    assert str(folder) in output.replace("\n", "")
    assert all(name in output for name in SHOWN)
    for name in ("curves.png", "relations.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_log_is_tidy_and_complete(finished):
    rows = read_log(finished[0])
    runs = [(row["method"], int(row["seed"]), int(row["epoch"])) for row in rows]
    methods = ("alone_real", "alone_both", "distilled")
    assert runs == [("teacher", 5, e) for e in (1, 2, 3)] + [
        (method, seed, epoch) for seed in (5, 6) for method in methods for epoch in (1, 2, 3, 4)
    ]
    for row in rows:
        assert row["run"] == "first"
        assert 0 <= float(row["test_accuracy"]) <= 1 and 0 <= float(row["validation_accuracy"]) <= 1
        assert float(row["seconds"]) > 0
        assert (row["ce_virtual"] == "") == (row["method"] == "alone_real")
        assert (row["inter_sample"] == "") == (row["method"] != "distilled")
        if row["method"] == "distilled":
            assert float(row["kept_inter_sample"]) == pytest.approx(0.3, abs=0.01)
            total = float(row["ce_real"]) + float(row["ce_virtual"])
            total += 2 * float(row["inter_sample"]) + float(row["inter_class"])
            assert float(row["train_loss"]) == pytest.approx(total, rel=1e-4)
            assert 0 < float(row["loss_share"]) <= 1


def test_every_model_learns(finished):
    rows = read_log(finished[0])
    for run in {(row["method"], row["seed"]) for row in rows}:
        losses = [float(row["train_loss"]) for row in rows if (row["method"], row["seed"]) == run]
        assert losses[-1] < 0.9 * losses[0], run


def test_table_reports_the_last_epoch(finished):
    folder, output = finished
    summary = (folder / "summary.md").read_text()
    rows = read_log(folder)
    for method, title in (("teacher", "| teacher"), ("distilled", "| student distilled")):
        finals = [100 * float(row["test_accuracy"]) for row in rows if row["method"] == method][-1:]
        if method == "distilled":
            finals = [100 * float(r["test_accuracy"]) for r in rows if r["method"] == method and r["epoch"] == "4"]
        line = next(line for line in summary.splitlines() if line.startswith(title))
        assert f"{sum(finals) / len(finals):.1f}" in line
        assert line in output
    assert "the loss" in summary and "eager class" in summary


def test_checkpoints_reload_with_the_reported_accuracy(finished):
    folder, _ = finished
    rows = read_log(folder)
    data = open_dataset("digits", train_images=128)
    loader = [(data.normalized(images), labels) for images, labels in plain_loader(data.test)]
    for name, method in (("student", "distilled"), ("teacher", "teacher")):
        model, metadata = load_checkpoint(folder / f"{name}.safetensors")
        measured = validate(model, loader, "cpu")
        assert measured == pytest.approx(float(metadata["test_accuracy"]), abs=1e-9)
        last = [r for r in rows if r["method"] == method and r["seed"] == metadata["seed"]][-1]
        assert measured == pytest.approx(float(last["test_accuracy"]), abs=1e-5)
        if method == "distilled":  # chosen by validation, not by test accuracy
            finals = [float(r["validation_accuracy"]) for r in rows if r["method"] == method and r["epoch"] == "4"]
            assert float(last["validation_accuracy"]) == max(finals)


def test_same_seed_same_results_and_no_relations_no_difference(finished, tmp_path):
    """A second run repeats the first; at alpha = beta = 0 distilling is training alone on both views, to rounding."""
    folder, _ = finished
    again = [*QUICK, "--seeds", "1", "--output-dir"]
    assert train(*again, tmp_path / "same") == 0
    first = [row for row in comparable(read_log(folder)) if row["seed"] == "5"]
    assert comparable(read_log(tmp_path / "same")) == first

    assert train(*again, tmp_path / "zero", "--alpha=0", "--beta=0", "--epochs=2") == 0
    losses = {
        method: [float(r["train_loss"]) for r in read_log(tmp_path / "zero") if r["method"] == method]
        for method in ("alone_both", "distilled")
    }
    assert losses["distilled"] == pytest.approx(losses["alone_both"], rel=1e-3)


def test_ctrl_c_leaves_the_finished_epochs(tmp_path):
    folder = tmp_path / "run"
    command = [*COMMAND, *QUICK, "--epochs=100000", "--teacher-epochs=1", f"--output-dir={folder}"]

    def heed_ctrl_c():  # which what a shell starts in the background does not
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, preexec_fn=heed_ctrl_c, **pipes)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "log.csv").exists() or len(read_log(folder)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopped" in errors and str(folder / "log.csv") in errors and "Traceback" not in errors
    assert {row["method"] for row in read_log(folder)} == {"teacher", "alone_real"}


def test_divergence_is_a_sentence(tmp_path, capsys):
    status = main([*QUICK, "--lr", "1e30", "--output-dir", str(tmp_path / "run")])
    errors = capsys.readouterr().err
    assert status == 1
    assert "became NaN or infinite at step" in errors and "try a smaller --lr than 1e+30" in errors
    assert "log.csv" in errors
