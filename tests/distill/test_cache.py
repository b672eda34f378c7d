"""A teacher's logits on disk are what the teacher would say, or are refused or computed anew."""

import json
import os
import shutil
import zlib

import numpy
import pytest
import torch
from distill_helpers import QUICK, SHORT, comparable, read_log, same_weights, train

from vrm_distill import cli, create_model, save_checkpoint
from vrm_distill.cache import TeacherCache
from vrm_distill.trainer import Place

B, C, EPOCHS, STEPS = 4, 3, 2, 5
DEPENDS = {"teacher weights": "abc", "--augment": "affine"}
IMAGES = torch.zeros(B, 1)


def _open(folder, depends=DEPENDS, **changes):
    shape = {"seed": 0, "epochs": EPOCHS, "steps": STEPS, "parts": 2, "first_part": 0, "rows": 3 * B, "classes": C}
    return TeacherCache(folder, depends, **{**shape, "dtype": "float32", **changes})


class Teacher:
    """Other logits each time it is asked: real ones, and of two virtual views."""

    def __init__(self):
        self.asked = 0

    def __call__(self):
        self.asked += 1
        generator = torch.Generator().manual_seed(self.asked)
        return torch.randn(B, C, generator=generator), torch.randn(2 * B, C, generator=generator)


def test_logits_are_computed_once_for_every_place_and_epochs_repeat(tmp_path):
    teacher, first = Teacher(), {}
    cache = _open(tmp_path / "cache")
    for epoch in range(2 * EPOCHS):
        for step in range(STEPS):
            for part in range(2):
                real, virtual = cache.logits(Place(epoch, step, part, STEPS), IMAGES, teacher)
                assert real.shape == (B, C) and virtual.shape == (2 * B, C)
                said = first.setdefault((epoch % EPOCHS, step, part), (real, virtual))
                assert torch.equal(said[0], real) and torch.equal(said[1], virtual)
    assert teacher.asked == EPOCHS * STEPS * 2
    again = _open(tmp_path / "cache")
    for (epoch, step, part), said in first.items():
        found = again.logits(Place(epoch, step, part, STEPS), IMAGES, lambda: pytest.fail("asked"))
        assert all(torch.equal(x, y) for x, y in zip(said, found, strict=True))
    _open(tmp_path / "cache", seed=1).logits(Place(0, 0, 0, STEPS), IMAGES, teacher)
    assert teacher.asked == EPOCHS * STEPS * 2 + 1
    # Another process of the same run has the other part of a step.
    other = _open(tmp_path / "cache", first_part=1)
    assert torch.equal(other.logits(Place(0, 2, 0, STEPS), IMAGES, teacher)[0], first[0, 2, 1][0])


def test_half_is_what_is_read_and_what_is_given_at_first(tmp_path):
    cache, teacher = _open(tmp_path / "cache", dtype="float16"), Teacher()
    first = cache.logits(Place(0, 0, 0, STEPS), IMAGES, teacher)
    second = cache.logits(Place(0, 0, 0, STEPS), IMAGES, teacher)
    expected = torch.cat(Teacher()()).half().float()
    for said in (first, second):
        assert torch.equal(torch.cat(said), expected) and said[0].dtype == torch.float32
    assert teacher.asked == 1
    with pytest.raises(ValueError, match="float16 does not hold the teacher's logits, up to 7e\\+04"):
        cache.logits(Place(0, 1, 0, STEPS), IMAGES, lambda: (torch.full((B, C), 7e4), torch.zeros(2 * B, C)))


def test_damaged_logits_are_computed_anew(tmp_path):
    """Any byte of them; the others are read."""
    place, teacher = Place(1, 3, 1, STEPS), Teacher()
    _open(tmp_path / "cache").logits(place, IMAGES, teacher)
    path = tmp_path / "cache" / "logits-0.bin"
    content = bytearray(path.read_bytes())
    at = next(i for i, byte in enumerate(content) if byte)
    content[at + 7] ^= 1
    path.write_bytes(content)
    real, _ = _open(tmp_path / "cache").logits(place, IMAGES, teacher)
    assert teacher.asked == 2
    generator = torch.Generator().manual_seed(2)
    assert torch.equal(real, torch.randn(B, C, generator=generator))


@pytest.mark.parametrize(
    ("depends", "changes", "wanted"),
    [
        ({**DEPENDS, "teacher weights": "abd"}, {}, "teacher weights is abd and was abc"),
        ({**DEPENDS, "--augment": "crop"}, {}, "--augment is crop and was affine"),
        ({**DEPENDS, "--mixup": 0.2}, {}, "--mixup is 0.2 and was None"),
        (DEPENDS, {"dtype": "float16"}, "dtype is float16 and was float32"),
        (DEPENDS, {"epochs": 3}, "shape is [3, 5, 2, 12, 3] and was [2, 5, 2, 12, 3]"),
    ],
)
def test_other_logits_are_refused_by_name(depends, changes, wanted, tmp_path):
    _open(tmp_path / "cache")
    before = sorted(os.listdir(tmp_path / "cache"))
    with pytest.raises(ValueError) as error:
        _open(tmp_path / "cache", depends, **changes)
    assert str(error.value).endswith(wanted) and sorted(os.listdir(tmp_path / "cache")) == before


def test_what_is_no_cache_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and has no cache.json: name a new folder"):
        _open(tmp_path)
    folder = tmp_path / "cache"
    _open(folder)
    (folder / "logits-0.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="logits-0.bin has 5 bytes and not 2880: remove it"):
        _open(folder)
    for damaged in ("{", "[1]"):
        (folder / "cache.json").write_text(damaged)
        with pytest.raises(ValueError, match="cannot be read: name a new folder"):
            _open(folder)


def test_a_full_disk_is_found_before_anything_is_computed(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="logits-0.bin needs 0 MiB, which cannot be had: No space left on device"):
        _open(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == ["cache.json"]


def test_what_it_depends_on_is_readable(tmp_path):
    _open(tmp_path / "cache")
    assert json.loads((tmp_path / "cache" / "cache.json").read_text()).items() >= DEPENDS.items()


RUN = [*QUICK, *SHORT, "--baselines=none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds ``teacher.safetensors``, and what the fixtures below put there."""
    folder = tmp_path_factory.mktemp("cache")
    torch.manual_seed(0)
    keys = {"model": "conv_8_16_16", "in_channels": 1, "classes": 10}
    save_checkpoint(folder / "teacher.safetensors", create_model("conv_8_16_16", 1, 10), keys)
    return folder


@pytest.fixture(scope="module")
def filled(folder):
    """A run that fills the cache ``folder / "cache"``."""
    return _run(folder, folder / "filled", f"--teacher-cache={folder / 'cache'}")


def _run(folder, output, *options):
    taught = f"--teacher-checkpoint={folder / 'teacher.safetensors'}"
    assert train(*RUN, taught, *options, f"--output-dir={output}") == 0
    return output


def _same(a, b):
    return same_weights(a / "student.safetensors", b / "student.safetensors")


def test_students_with_a_cache_are_those_without_bit_for_bit(tmp_path, folder, filled):
    """Filled while it trains, read, and filled by the command: the same students; another alpha reads it, too."""
    cache = f"--teacher-cache={folder / 'cache'}"
    files = {path: path.read_bytes() for path in (folder / "cache").iterdir()}
    names = {f"{what}-{seed}.bin" for what in ("logits", "checksums") for seed in (5, 6)}
    assert {path.name for path in files} == {"cache.json", *names}
    plain, again = _run(folder, tmp_path / "plain"), _run(folder, tmp_path / "again", cache)
    for run in (filled, again):
        assert _same(plain, run) and comparable(read_log(run)) == comparable(read_log(plain))
    assert not _same(plain, _run(folder, tmp_path / "other", cache, "--alpha=3", "--student=conv_3_6_6"))
    assert {path: path.read_bytes() for path in (folder / "cache").iterdir()} == files

    before = [f"--teacher-checkpoint={folder / 'teacher.safetensors'}", f"--teacher-cache={tmp_path / 'before'}"]
    assert cli.main(["cache", *RUN, *before]) == 0
    for path, content in files.items():
        assert (tmp_path / "before" / path.name).read_bytes() == content


def test_a_run_reads_the_cache_and_not_the_teacher(tmp_path, folder, filled):
    """Other logits, with their checksums, make another student."""
    cache = shutil.copytree(folder / "cache", tmp_path / "cache")
    for seed in (5, 6):
        shape = json.loads((cache / "cache.json").read_text())["shape"]
        logits = numpy.memmap(cache / f"logits-{seed}.bin", "float32", "r+", shape=tuple(shape))
        checksums = numpy.memmap(cache / f"checksums-{seed}.bin", "uint64", "r+", shape=tuple(shape[:3]))
        logits[:] = logits[..., ::-1].copy()
        for at in numpy.ndindex(*shape[:3]):
            checksums[at] = (1 << 32) | zlib.crc32(logits[at])
    assert not _same(filled, _run(folder, tmp_path / "swapped", f"--teacher-cache={cache}"))


def test_views_that_repeat_are_those_of_all_seeds_and_need_one_file(tmp_path, folder):
    options = ["--view-epochs=2", "--epochs=3", "--mixup=0.2", "--virtual-views=2", "--accumulate=2"]
    plain = _run(folder, tmp_path / "plain", *options)
    cached = _run(folder, tmp_path / "cached", *options, f"--teacher-cache={tmp_path / 'cache'}")
    assert _same(plain, cached)
    assert {path.name for path in (tmp_path / "cache").glob("*.bin")} == {"logits-5.bin", "checksums-5.bin"}
    # 2 epochs of 4 steps of 2 parts of 16 images in 3 views with 10 logits each.
    assert (tmp_path / "cache" / "logits-5.bin").stat().st_size == 2 * 4 * 2 * 16 * 3 * 10 * 4
    assert not _same(plain, _run(folder, tmp_path / "once", *options[1:]))


def test_half_of_the_bytes_is_an_option(tmp_path, folder, filled):
    options = [f"--teacher-cache={tmp_path / 'cache'}", "--teacher-cache-dtype=float16"]
    first, second = (_run(folder, tmp_path / name, *options) for name in ("first", "second"))
    assert _same(first, second) and not _same(first, filled)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--augment=none"], "--augment is none and was auto"),
        (["--batch-size=64"], "--batch-size is 64 and was 32"),
        (["--train-images=100"], "the images is "),
        (["--mean=0.5"], "--mean is [0.5] and was ["),
        (["--epochs=3"], "shape is [3, 4, 1, 64, 10] and was [2, 4, 1, 64, 10]"),
    ],
)
def test_other_views_are_refused_before_anything_is_trained(options, wanted, tmp_path, folder, filled, capsys):
    with pytest.raises(SystemExit):
        _run(folder, tmp_path / "run", f"--teacher-cache={folder / 'cache'}", *options)
    message = capsys.readouterr().err
    assert "--teacher-cache" in message and wanted in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["cache"], "--teacher-cache: name the folder to fill"),
        (["cache", "--teacher-cache=x"], "--teacher-checkpoint: name a trained teacher"),
        (["--teacher-cache-dtype=float16"], "--teacher-cache-dtype: is for the logits in --teacher-cache"),
        (["--view-epochs=0"], "--view-epochs: must be at least 1"),
    ],
)
def test_options_that_lack_something_are_refused(arguments, wanted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert wanted in capsys.readouterr().err and not list(tmp_path.iterdir())
