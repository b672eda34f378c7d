"""A folder of images is read by the names that it has: no split is guessed, no class is lost, no image leaks."""

import os
import subprocess

import distill_helpers  # noqa: F401 (skips these tests without the extra)
import numpy
import pytest
import torch
from PIL import Image

from vrm_distill.data import check_views, decoded, from_parts, open_dataset


def _image(path, shade, size=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numpy.full((size, size), shade, "uint8")).save(path)


def test_classes_that_are_called_like_splits(tmp_path):
    """Each image says by its grey which split it is of: train 10, test 200."""
    classes = ("bus", "train", "test", "test tube", "valid", "cat")
    for split, shade, count in (("train", 10, 10), ("test", 200, 3)):
        for name in classes:
            for i in range(count):
                _image(tmp_path / split / name / f"{i}.png", shade)
    data = open_dataset(str(tmp_path))
    assert data.class_names == tuple(sorted(classes)) and data.classes == 6
    assert (len(data.train), len(data.validation), len(data.test)) == (54, 6, 18)
    for part, shade in ((data.train, 10), (data.validation, 10), (data.test, 200)):
        assert set(part.tensors[0].unique().tolist()) == {shade}
    assert data.test.tensors[1].tolist() == [label for label in range(6) for _ in range(3)]
    assert data.counts[0] == "train: bus 10, cat 10, test 10, test tube 10, train 10, valid 10"
    assert data.summary.endswith("\n  test: bus 3, cat 3, test 3, test tube 3, train 3, valid 3")


@pytest.mark.parametrize("stray", ["train_old", "Test", "training"])
def test_folder_that_is_no_split_is_refused(stray, tmp_path):
    for split in ("train", stray):
        for name in "ab":
            _image(tmp_path / split / name / "0.png", 10)
    with pytest.raises(ValueError, match=r"expected SPLIT/CLASS/IMAGE, a split being one of train, test") as error:
        open_dataset(str(tmp_path))
    assert str(error.value).endswith(f"\n  {tmp_path / stray}")


def test_linked_classes_are_followed_and_empty_ones_named(tmp_path):
    for name in ("cat", "dog"):
        for i in range(10):
            _image(tmp_path / "elsewhere" / name / f"{i}.png", 10)
    root = tmp_path / "photos"
    (root / "train").mkdir(parents=True)
    for name in ("cat", "dog"):
        (root / "train" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert open_dataset(str(root)).class_names == ("cat", "dog")
    (root / "train" / "newt").mkdir()
    with pytest.raises(ValueError, match="no images in the folders of these classes, fill or remove them:\n  newt"):
        open_dataset(str(root))
    _image(root / "test" / "newt" / "0.png", 10)
    with pytest.raises(ValueError, match="train has no images of newt, test has"):
        open_dataset(str(root))
    (root / "train" / "newt" / "notes.txt").write_text("mine")
    (root / "test" / "newt" / "0.png").rename(root / "train" / "newt" / "0.png")
    (root / "test" / "newt").rmdir()
    (root / "test").rmdir()
    assert "left alone 1 files that are no images" in open_dataset(str(root)).notes[0]


def test_grey_png_that_opens_as_integers_is_scaled(tmp_path, monkeypatch):
    """Older versions of Pillow open a grey PNG of 16 bits in mode I."""
    grey = numpy.linspace(0, 65535, 144).round().astype("uint16").reshape(12, 12)
    for i in range(20):
        _image(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", 10)
    Image.fromarray(grey).save(tmp_path / "train" / "a" / "0.png")
    opened = Image.open

    def older(*arguments):
        image = opened(*arguments)
        if image.mode.startswith("I;16"):
            kind, image = image.format, image.convert("I")
            image.format = kind
        return image

    monkeypatch.setattr(Image, "open", older)
    data = open_dataset(str(tmp_path))
    images = torch.cat([part.tensors[0] for part in (data.train, data.validation, data.test)])
    assert data.in_channels == 1 and images.max() == 255


def test_exif_orientation_is_applied(tmp_path):
    pixels = numpy.zeros((8, 16, 3), "uint8")
    pixels[:, :8] = 255
    for i in range(20):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter: the left half is then the upper one
        Image.fromarray(pixels).save(path, exif=exif)
    data = open_dataset(str(tmp_path))
    assert data.size == (16, 8)
    image = data.train[torch.tensor([0])][0][0, 0]
    assert (image[:8] == 255).all() and (image[8:] == 0).all()


def _jpegs(root, count=20):
    rng = numpy.random.default_rng(0)
    for i in range(count):
        path = root / "train" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype="uint8")).save(path)
    broken = root / "train" / "b" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:-400])
    return broken


def test_image_cut_off_is_found_among_many_and_can_be_left_out(tmp_path, monkeypatch):
    broken = _jpegs(tmp_path)
    monkeypatch.setattr(decoded, "DECODE_ALL", 10)  # as if there were more than are all decoded
    with pytest.raises(ValueError, match=r"1 of 20 images cannot be read \(--skip-broken leaves") as error:
        open_dataset(str(tmp_path))
    assert str(broken) in str(error.value)
    data = open_dataset(str(tmp_path), skip_broken=True)
    assert sum(map(len, (data.train, data.validation, data.test))) == 19
    assert (
        data.notes[0].startswith("left out 1 of 20 images that cannot be read (1 of train):\n")
        and str(broken) in (data.notes[0])
    )
    assert "b 9" in data.counts[0]


def test_image_that_breaks_in_mid_training_is_named(tmp_path, monkeypatch):
    from vrm_distill.data import batches_loader, hub
    from vrm_distill.failures import explain

    broken = _jpegs(tmp_path)
    whole = broken.with_name("3.jpg").read_bytes()
    content = broken.read_bytes()
    broken.write_bytes(whole)
    monkeypatch.setattr(hub, "_IN_MEMORY", 0)
    data = open_dataset(str(tmp_path))
    broken.write_bytes(content)
    for workers in (0, 1):
        with pytest.raises(ValueError) as error:
            for part in (data.train, data.validation, data.test):
                list(batches_loader(part, [[i] for i in range(len(part))], workers))
        said = explain(error.value)
        assert said.startswith(f"{broken} cannot be decoded (") and "--skip-broken" in said and "Traceback" not in said


@pytest.mark.parametrize("size", [1, 2])
def test_images_that_are_too_small_for_an_augmentation(size):
    part = torch.utils.data.TensorDataset(torch.rand(6, 1, size, size), torch.arange(6) % 2)
    data = from_parts("small", 2, part, part, part)
    with pytest.raises(ValueError, match=f"images of {size}x{size} are too small"):
        check_views(data, "auto")
    check_views(data, "none")


# ---- parquet --------------------------------------------------------------------------------------------------------


def _parquet(path, labels, kind=None):
    import io

    import datasets

    buffer = io.BytesIO()
    Image.new("L", (8, 8), 30).save(buffer, "png")
    rows = {"image": [{"bytes": buffer.getvalue(), "path": None}] * len(labels), "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": kind or datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.mark.parametrize(
    ("split", "labels", "wanted"),
    [
        ("train", [0, 1] * 10 + [-1], "train-1.parquet row 20: -1"),
        ("train", [0, 1, None] * 4, "train-1.parquet row 2: None"),
        ("test", [0, -1, 1], "test.parquet row 1: -1"),
        ("test", [0, 1, 2], "train has no images of 2, test has"),
    ],
)
def test_labels_that_are_none_are_refused_by_file_and_row(split, labels, wanted, tmp_path):
    _parquet(tmp_path / "train-0.parquet", [0, 1] * 10)
    _parquet(tmp_path / f"{split}{'-1' if split == 'train' else ''}.parquet", labels)
    with pytest.raises(ValueError, match=wanted):
        open_dataset(f"parquet:{tmp_path}")


def test_secret_test_set_and_file_of_no_split(tmp_path):
    _parquet(tmp_path / "train.parquet", [0, 1] * 10)
    _parquet(tmp_path / "test.parquet", [-1] * 4)
    data = open_dataset(f"parquet:{tmp_path}")
    assert data.notes[0].startswith("left out test: its labels are -1") and len(data.test) == 2
    (tmp_path / "test.parquet").rename(tmp_path / "train_old.parquet")
    with pytest.raises(ValueError, match=r"of which split is train_old\.parquet"):
        open_dataset(f"parquet:{tmp_path}")


def test_nothing_is_left_beside_the_images(tmp_path):
    """Reading a folder writes nothing into it."""
    for i in range(20):
        _image(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", 10)
    before = subprocess.run(["find", tmp_path], capture_output=True, text=True, check=True).stdout
    open_dataset(str(tmp_path))
    assert subprocess.run(["find", tmp_path], capture_output=True, text=True, check=True).stdout == before
    assert os.listdir(tmp_path) == ["train"]
