"""``vrm-distill`` under torchrun, on gloo: one run of the global batch, one teacher cache, and the same student after a
killed worker."""

import json
import sys

import numpy
import pytest
import torch
from distill_helpers import QUICK, comparable, finish, read_log, same_weights, start, train
from safetensors.torch import load_file

from vrm_distill.data import ShardedBatches

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
MODULE = ["-m", "vrm_distill.cli"]
# Two processes compute what one does: no batch norm, whose statistics are of each one's share; no augmentation, which
# each draws for its own; relations of the whole batch, and of all edges, since rounding decides which are kept.
RUN = [*QUICK, "--teacher=distill_helpers:without_batch_norm", "--student=distill_helpers:mortal", "--baselines=none"]
RUN += ["--augment=none", "--gather-distributed", "--percentile=100", "--find-unused-parameters", "--optimizer=sgd"]
RUN += ["--seeds=1", "--checkpoint-steps=1"]


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


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two processes, which fill one teacher cache."""
    folder = tmp_path_factory.mktemp("distributed")
    output = finish(
        start(*MODULE, *RUN, f"--teacher-cache={folder / 'cache'}", "--output-dir", folder / "two", launcher=TORCHRUN)
    )
    assert output.count("teacher: ") == 1 and output.count("128 images to train") == 1  # one log on the screen
    return folder


def _assert_close(folder, other):
    """Equal to rounding, which sums over shares have of their own."""
    expected, found = (load_file(run / "student.safetensors") for run in (folder, other))
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5)
    for a, b in zip(read_log(folder), read_log(other), strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-4)
        assert a["test_accuracy"] == b["test_accuracy"]  # judged in shares, counted together


def test_two_processes_train_the_student_of_one(two, tmp_path):
    """Gradients of two shares add up to those of the batch, and the relations are those of the whole batch."""
    assert train(*RUN, "--output-dir", tmp_path / "one") == 0
    _assert_close(tmp_path / "one", two / "two")
    summary = (two / "two" / "summary.md").read_text()
    assert "ms in one process, without what processes send each other," in summary and ", 2 processes." in summary


def test_micro_batches_train_the_student_of_one_batch(tmp_path):
    # Cross-entropy alone: relations are those within a part.
    arguments = [*RUN, "--alpha=0", "--beta=0", "--output-dir"]
    assert train(*arguments, tmp_path / "one") == 0 and train(*arguments, tmp_path / "parts", "--accumulate=2") == 0
    _assert_close(tmp_path / "one", tmp_path / "parts")


def test_processes_share_a_teacher_cache(two, tmp_path, capsys):
    """Every place of it was filled, half of them by either; another number of processes is refused by name."""
    shape = json.loads((two / "cache" / "cache.json").read_text())["shape"]
    assert shape == [4, 4, 2, 2 * 16, 10]  # epochs, steps, processes, two views of a share, classes
    checksums = numpy.fromfile(two / "cache" / "checksums-5.bin", "uint64")
    assert len(checksums) == 4 * 4 * 2 and len(set(checksums)) == len(checksums)
    taught = ["--teacher-checkpoint", two / "two" / "teacher.safetensors", f"--teacher-cache={two / 'cache'}"]
    with pytest.raises(SystemExit):
        train(*RUN, *taught, "--output-dir", tmp_path / "run")
    assert "the number of processes is 1 and was 2" in capsys.readouterr().err


def test_killed_worker_restarts_from_the_checkpoint_and_ends_in_the_same_student(two, monkeypatch, capsys):
    """torchrun starts both again: the same bits. One process that goes on alone: the same to rounding, and told."""
    folder = two / "killed"
    monkeypatch.setenv("MORTAL_RUN", str(folder))
    arguments = [*MODULE, *RUN, f"--teacher-cache={two / 'cache'}", "--output-dir", folder]
    output = finish(start(*arguments, launcher=[*TORCHRUN, "--max-restarts=1"]))
    assert "exitcode: -9" in output  # torchrun did see a worker die
    for name in ("teacher.safetensors", "student.safetensors"):
        assert same_weights(folder / name, two / "two" / name)
    assert comparable(read_log(folder)) == comparable(read_log(two / "two"))

    alone = two / "killed-then"
    assert train(*RUN, "--resume", "--output-dir", alone) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "resuming with 1 process what 2 began: the order of the images stays" in said
    assert "resuming distilled, seed 5 at epoch" in said
    _assert_close(two / "two", alone)


def test_under_torchrun_the_folder_must_be_named(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit):
        train(*QUICK)
    assert "argument --output-dir: name it under torchrun" in capsys.readouterr().err


def test_parameter_without_a_gradient_names_the_option(tmp_path):
    arguments = [*MODULE, *QUICK, "--baselines=none", "--epochs=1", "--teacher-epochs=1"]
    arguments += ["--student=distill_helpers:idle_parameter", "--output-dir", tmp_path / "refused"]
    process = start(*arguments, launcher=TORCHRUN)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "add --find-unused-parameters" in output
