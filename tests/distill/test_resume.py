"""A run that was killed and resumed ends in the same bits; its checkpoints are whole, plain and good."""

import errno
import os
import pickle
import random
import signal
import time

import pytest
import torch
from distill_helpers import QUICK, SHORT, comparable, finish, read_log, same_weights, start, train

from vrm_distill import checkpoint, recipe
from vrm_distill.cli import main

# Everything that has a state of its own: momentum, a schedule, a running mean, micro-batches, mixed images. Gradients
# are clipped in most steps.
RUN = [*QUICK, *SHORT, "--baselines=alone_both", "--optimizer=sgd", "--schedule=step", "--milestones=1", "--ema=0.9"]
RUN += ["--accumulate=2", "--mixup=0.2", "--label-smoothing=0.1", "--relation-warmup=2", "--checkpoint-steps=1"]
RUN += ["--clip-grad=0.05"]
KILLS = 3


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / "undisturbed"
    assert train(*RUN, "--output-dir", folder) == 0
    assert all(0 < float(row["clipped"]) <= 1 for row in read_log(folder) if row["method"] == "distilled")
    return folder


def _assert_same(folder, undisturbed):
    for name in ("teacher.safetensors", "student.safetensors"):
        assert same_weights(folder / name, undisturbed / name), name
    assert comparable(read_log(folder)) == comparable(read_log(undisturbed))
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_killed_at_random_and_resumed_ends_in_the_same_bits(undisturbed, tmp_path):
    """kill -9, each time a random while after the last checkpoint; then to the end, with a teacher cache."""
    folder, draw, killed = tmp_path / "run", random.Random(0), 0
    run = [*RUN, f"--teacher-cache={tmp_path / 'cache'}", "--resume", "--output-dir", folder]
    while killed < KILLS:
        process = start(*run)
        try:
            seen = _checkpoint_time(folder)
            deadline = time.monotonic() + 60
            while _checkpoint_time(folder) == seen and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.1))
            assert process.poll() is None, "the run ended before it could be killed: make it longer"
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        checkpoint.load_state(folder / "resume.pt")  # whole, whenever the kill came
        killed += 1
    finish(start(*run))
    _assert_same(folder, undisturbed)


def _checkpoint_time(folder):
    try:
        return (folder / "resume.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return None


@pytest.mark.filterwarnings("error:Detected call of")
def test_stopped_after_each_of_some_checkpoints(undisturbed, tmp_path, monkeypatch):
    """Every kind of place: within an epoch, at its end, between models, and before the last row was logged."""
    # A model has 8 checkpoints for its steps and one more: 4 is at the end of an epoch, 6 within one, 8 at the end of a
    # model's last one, 9 between models, 30 in the second seed.
    for stop, workers in ((4, 0), (6, 2), (8, 0), (9, 0), (30, 1)):
        folder, calls = tmp_path / str(stop), 0
        save = checkpoint.save_state

        def stopping(path, state, save=save, stop=stop):
            nonlocal calls
            save(path, state)
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_state", stopping)
            assert train(*RUN, f"--workers={workers}", "--output-dir", str(folder)) == 130
        torch.rand(stop)  # the resumed process's generators are anywhere
        assert train(*RUN, "--resume", f"--workers={workers}", "--output-dir", str(folder)) == 0
        _assert_same(folder, undisturbed)


def test_run_of_few_steps_is_saved_between_epochs(undisturbed, tmp_path, monkeypatch, capsys):
    """With no checkpoint due for its steps, a run that was stopped a while after an epoch goes on after it."""
    folder, calls = tmp_path / "run", 0
    arguments = [*RUN, "--checkpoint-steps=1000", "--output-dir", str(folder)]
    monkeypatch.setattr(recipe, "SAVE_SECONDS", 0.0)
    save = checkpoint.save_state

    def stopping(path, state):
        nonlocal calls
        save(path, state)
        calls += 1
        if calls in (1, 3):  # after an epoch of the teacher, and of the first student
            raise KeyboardInterrupt

    assert _stopped_at_once(arguments, monkeypatch) == 130 and not (folder / "resume.pt").exists()
    assert "nothing was saved yet that --resume could go on from" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "save_state", stopping)
    assert train(*arguments, "--resume") == 130
    said = capsys.readouterr()
    assert f"nothing to resume in {folder}: starting" in said.out
    assert f"stopped; --resume goes on from {folder / 'resume.pt'}" in said.err
    assert train(*arguments, "--resume") == 130
    assert "resuming teacher, seed 5 at epoch 2\n" in capsys.readouterr().out
    assert train(*arguments, "--resume") == 0
    assert "resuming alone_both, seed 5 at epoch 2\n" in capsys.readouterr().out
    assert calls == 10
    _assert_same(folder, undisturbed)


def _stopped_at_once(arguments, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe.Trainer, "epoch", stop)
        return train(*arguments)


def test_resuming_a_finished_run_changes_nothing_and_other_settings_are_refused(undisturbed, tmp_path, capsys):
    before = (undisturbed / "student.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        main([*RUN, "--alpha=3", "--resume", "--output-dir", str(undisturbed)])
    errors = capsys.readouterr().err
    assert "--alpha is 3.0 and was 2.0" in errors and "--beta" not in errors.split("argument --resume")[1]
    assert train(*RUN, "--resume", "--checkpoint-steps=9", "--output-dir", str(undisturbed)) == 0
    assert (undisturbed / "student.safetensors").read_bytes() == before


def test_full_disk_keeps_the_last_checkpoint(undisturbed, tmp_path, monkeypatch, capsys):
    folder, fsync, calls = tmp_path / "run", os.fsync, 0

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert train(*RUN, "--output-dir", str(folder)) == 1
    assert f"no space is left on the disk of {folder}" in capsys.readouterr().err
    assert checkpoint.load_state(folder / "resume.pt")["trainer"] is not None
    assert train(*RUN, "--resume", "--output-dir", str(folder)) == 0
    _assert_same(folder, undisturbed)


def test_killed_within_a_write_keeps_the_last_checkpoint(tmp_path):
    """The process dies with half of the new file written: the old one is whole, and the half is cleared away."""
    path = tmp_path / "resume.pt"
    checkpoint.save_state(path, {"step": 1})

    def half(file):
        file.write(b"half of it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        checkpoint.write_atomically(path, half)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert checkpoint.load_state(path) == {"step": 1} and len(list(tmp_path.iterdir())) == 2
    checkpoint.remove_leftovers(path)
    assert list(tmp_path.iterdir()) == [path]


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_loading_executes_nothing(tmp_path):
    path, proof = tmp_path / "resume.pt", tmp_path / "executed"
    torch.save({"state_dict": _Bomb(str(proof))}, path)
    with pytest.raises(ValueError, match="cannot be read as plain tensors: it holds more than tensors") as error:
        checkpoint.load_state(path)
    with pytest.raises(ValueError, match=r"save a state dict: torch\.save\(model\.state_dict\(\), FILE\)$") as other:
        checkpoint.read_weights(path)
    for message in (str(error.value), str(other.value)):
        assert "weights_only" not in message and "\x1b" not in message
    path.write_bytes(pickle.dumps(_Bomb(str(proof))))
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        checkpoint.read_weights(path)
    assert not proof.exists()


def test_divergence_names_step_term_and_last_good_checkpoint(tmp_path, capsys):
    """Weights blow up at a known step: the run names it, and what was saved before is finite and can be resumed."""
    folder = tmp_path / "run"
    arguments = [*QUICK, "--baselines=none", "--checkpoint-steps=1", "--output-dir", str(folder)]
    assert train(*arguments, "--lr=1e30") == 1
    errors = capsys.readouterr().err
    assert "became NaN or infinite at step" in errors and "of epoch 1 (distilled, seed 5)" in errors
    assert "ce_real" in errors and "inter_sample" in errors and "try a smaller --lr than 1e+30" in errors
    assert "a longer --relation-warmup, or a smaller --alpha and --beta" in errors and "--precision" not in errors
    assert f"the last good checkpoint is of epoch 1, step 1 of distilled, seed 5, in {folder / 'resume.pt'}" in errors
    model = checkpoint.load_state(folder / "resume.pt")["trainer"]["model"]
    assert all(x.isfinite().all() for x in model.values())


ONE = [*QUICK, *SHORT, "--baselines=none", "--seeds=1", "--checkpoint-steps=1"]


def _stopped_at_a_checkpoint(monkeypatch, arguments):
    save = checkpoint.save_state

    def stopping(path, state):
        save(path, state)
        if state["trainer"] is not None and state["rows"]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_state", stopping)
        assert train(*arguments) == 130


def _refusal(capsys, arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(arguments)
    return capsys.readouterr().err


def test_other_images_or_another_teacher_are_refused_by_name(tmp_path, monkeypatch, capsys):
    import numpy
    from PIL import Image

    from vrm_distill import create_model

    photos, teacher = tmp_path / "photos", tmp_path / "teacher.pth"
    numbers = numpy.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype="uint8")

    def add(first, last):
        for i in range(first, last):
            path = photos / "train" / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(numbers[i]).save(path)

    def write_teacher(seed, path):
        torch.manual_seed(seed)
        torch.save(create_model("conv_8_16_16", 1, 2).state_dict(), path)

    add(0, 50)
    write_teacher(0, teacher)
    arguments = [x for x in ONE if not x.startswith(("--train-images", "--batch-size"))]
    arguments += [f"--dataset=folder:{photos}", "--batch-size=8", f"--output-dir={tmp_path / 'run'}"]
    taught = [*arguments, f"--teacher-checkpoint={teacher}"]
    _stopped_at_a_checkpoint(monkeypatch, taught)
    add(50, 55)
    said = _refusal(capsys, [*taught, "--resume"])
    assert (
        f"argument --resume: {tmp_path / 'run' / 'resume.pt'} is of another run: the images of folder:{photos}" in said
    )
    for i in range(50, 55):
        (photos / "train" / "ab"[i % 2] / f"{i}.png").unlink()
    write_teacher(1, teacher)
    assert f"the weights in {teacher} are not those of then" in _refusal(capsys, [*taught, "--resume"])
    # The same weights elsewhere are the same teacher.
    teacher.unlink()
    write_teacher(0, tmp_path / "moved.pth")
    assert train(*arguments, f"--teacher-checkpoint={tmp_path / 'moved.pth'}", "--resume") == 0


def test_another_number_of_processes_is_told(tmp_path, monkeypatch, capsys):
    arguments = [*ONE, f"--output-dir={tmp_path / 'run'}"]
    _stopped_at_a_checkpoint(monkeypatch, arguments)
    state = checkpoint.load_state(tmp_path / "run" / "resume.pt")
    checkpoint.save_state(tmp_path / "run" / "resume.pt", {**state, "processes": 2})
    assert train(*arguments, "--resume") == 0
    said = capsys.readouterr().out
    assert "resuming with 1 process what 2 began: the order of the images stays" in said
    assert "and the relations are of other shares of a batch" in said


def test_checkpoint_of_another_version_is_refused(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    checkpoint.save_state(tmp_path / "run" / "resume.pt", {"settings": {}})
    said = _refusal(capsys, [*ONE, "--resume", f"--output-dir={tmp_path / 'run'}"])
    assert "is of another version of vrm-distill" in said


def test_ctrl_c_within_a_write_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "resume.pt"
    checkpoint.save_state(path, {"step": 1})

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_state(path, {"step": 2})
    assert checkpoint.load_state(path) == {"step": 1} and len(list(tmp_path.iterdir())) == 1
