"""The recipe's images: splits that cannot leak, views that are augmented and normalised, faults named file by file."""

import gzip
import struct

import numpy
import pytest
import torch
from distill_helpers import QUICK, train
from PIL import Image

from vrm_distill.data import AUGMENTATIONS, Views, mixup, open_dataset, plain_loader
from vrm_distill.seeding import seed_everything

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    return open_dataset("digits", train_images=300)


def _rows(dataset):
    return {tuple(image.mul(16).round().flatten().tolist()) for image in dataset.tensors[0]}


def test_split_is_fixed_stratified_and_disjoint(data):
    assert [len(part) for part in (data.train, data.validation, data.test)] == [300, 297, 600]
    for part in (data.train, data.validation, data.test):
        counts = part.tensors[1].bincount(minlength=10)
        assert counts.max() - counts.min() <= 0.05 * len(part)
    parts = [_rows(part) for part in (data.train, data.validation, data.test)]
    # The images are all different, so that a shared row would be a shared image.
    assert [len(part) for part in parts] == [300, 297, 600]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    again = open_dataset("digits")
    assert len(again.train) == 900 and torch.equal(again.test.tensors[1], data.test.tensors[1])
    assert parts[0] < _rows(again.train)


@pytest.mark.parametrize("count", [0, 19, 901])
def test_training_images_out_of_range_are_refused(count):
    with pytest.raises(ValueError, match=rf"20 to 900.*{count}"):
        open_dataset("digits", train_images=count)


@pytest.mark.parametrize("count", [20, 890, 891, 900])
def test_training_images_at_the_limits(count):
    assert len(open_dataset("digits", train_images=count).train) == count


def test_views_are_augmented_and_normalised(data):
    images = data.train.tensors[0]
    seed_everything(CPU, 0)
    real, virtual = Views(data)(images)
    assert real.shape == virtual.shape == images.shape and real.dtype == virtual.dtype == torch.float32
    # The virtual view is the stronger one.
    clean = data.normalized(images)
    assert abs(clean.mean()) < 1e-4 and clean.std() == pytest.approx(1, abs=0.01)
    distance = [(view - clean).square().mean() for view in (real, virtual)]
    assert 0 < distance[0] < distance[1]
    seed_everything(CPU, 0)
    again = Views(data)(images)
    assert torch.equal(real, again[0]) and torch.equal(virtual, again[1])
    seed_everything(CPU, 0)
    assert torch.equal(Views(data)(images, virtual=False)[0], real)
    seed_everything(CPU, 0, 1)
    assert not torch.equal(Views(data)(images)[0], real)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_every_augmentation_of_colour_images(kind, tmp_path):
    _folder(tmp_path, mode="RGB")
    data = open_dataset(f"folder:{tmp_path}")
    images, _ = data.train[torch.arange(6)]
    real, virtual = Views(data, kind)(images)
    assert real.shape == virtual.shape == (6, 3, 12, 12) and real.isfinite().all() and virtual.isfinite().all()
    assert torch.equal(real, data.normalized(images)) == torch.equal(real, virtual) == (kind == "none")


def test_mixup_mixes_both_views_alike():
    real, virtual, labels = torch.arange(4.0).view(4, 1), 10 * torch.arange(4.0).view(4, 1), torch.arange(4)
    mixed_real, mixed_virtual, targets = mixup(real, virtual, labels, 4, 1.0)
    torch.testing.assert_close(mixed_virtual, 10 * mixed_real)
    torch.testing.assert_close(targets @ real, mixed_real)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_plain_loader_gives_everything_once_in_order(data):
    images, labels = (torch.cat(parts) for parts in zip(*plain_loader(data.test, 256), strict=True))
    assert torch.equal(images, data.test.tensors[0]) and torch.equal(labels, data.test.tensors[1])
    shares = [torch.cat([y for _, y in plain_loader(data.test, 64, rank=r, world=3)]) for r in range(3)]
    assert sorted(torch.cat(shares).tolist()) == sorted(labels.tolist())


# ---- a folder of images ---------------------------------------------------------------------------------------------


def _folder(root, mode="L", count=12, size=12, splits=("train", "test")):
    rng = numpy.random.default_rng(0)
    for split in splits:
        for name, shade in (("dark", 40), ("light", 200)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                shape = (size, size) if mode == "L" else (size, size, 3)
                pixels = (shade + rng.integers(-30, 30, shape)).astype("uint8")
                Image.fromarray(pixels, mode=None).save(root / split / name / f"{i}.png")


def test_folder_of_images_is_split_and_distilled(tmp_path):
    _folder(tmp_path / "images")
    data = open_dataset(str(tmp_path / "images"))
    assert (data.classes, data.in_channels, data.size, data.name) == (2, 1, (12, 12), "images")
    assert len(data.test) == 24 and len(data.train) + len(data.validation) == 24 and len(data.validation) == 2
    bright = [
        float(images.float().mean()) for images, _ in (data.test[torch.arange(12)], data.test[torch.arange(12, 24)])
    ]
    labels = data.test[torch.arange(24)][1]
    assert bright[0] < 100 < bright[1] and labels.tolist() == [0] * 12 + [1] * 12
    arguments = [*QUICK[2:], f"--dataset=folder:{tmp_path / 'images'}", "--batch-size=8", "--seeds=1"]
    assert train(*arguments, "--output-dir", tmp_path / "run") == 0


def test_broken_images_are_reported_file_by_file(tmp_path):
    _folder(tmp_path)
    bad = tmp_path / "train" / "dark"
    (bad / "0.png").write_bytes(b"")
    (bad / "1.png").write_bytes(b"no picture at all")
    (bad / "2.png").write_bytes((bad / "3.png").read_bytes()[:80])
    with pytest.raises(ValueError, match="3 of 48 images cannot be read") as error:
        open_dataset(f"folder:{tmp_path}")
    message = str(error.value)
    assert f"{bad / '0.png'}: empty" in message and str(bad / "1.png") in message and str(bad / "2.png") in message
    assert str(bad / "3.png") not in message


def test_images_of_another_size_are_reported_and_an_image_size_takes_them(tmp_path):
    _folder(tmp_path)
    odd = tmp_path / "test" / "light" / "5.png"
    Image.new("L", (7, 9)).save(odd)
    with pytest.raises(ValueError, match=r"1 of 48 images are not 12x12 like the others.*--image-size") as error:
        open_dataset(f"folder:{tmp_path}")
    assert f"{odd}: 7x9" in str(error.value)
    data = open_dataset(f"folder:{tmp_path}", image_size=8)
    assert data.size == (8, 8) and data.test[torch.arange(24)][0].shape == (24, 1, 8, 8)


def test_sixteen_bits_are_scaled_and_more_are_refused_by_name(tmp_path):
    _folder(tmp_path)
    grey = numpy.linspace(0, 65535, 144).round().astype("uint16").reshape(12, 12)
    Image.fromarray(grey).save(tmp_path / "test" / "dark" / "0.png")
    data = open_dataset(f"folder:{tmp_path}")
    found = data.test[torch.tensor([0])][0][0, 0].numpy()
    assert data.in_channels == 1 and numpy.abs(found - grey / 257).max() <= 0.5
    for mode, said in (("I", "32-bit integers"), ("F", "floating-point numbers")):
        file = tmp_path / "train" / "dark" / f"{mode}.tiff"
        Image.fromarray(grey.astype("int32" if mode == "I" else "float32")).save(file)
        with pytest.raises(ValueError, match=rf"{mode}.tiff: holds {said}"):
            open_dataset(f"folder:{tmp_path}")
        file.unlink()


def test_class_without_training_images_is_refused_and_without_test_images_is_told(tmp_path):
    _folder(tmp_path)
    (tmp_path / "test" / "light").rename(tmp_path / "test" / "lights")
    with pytest.raises(ValueError, match="train has no images of lights, test has: is a folder's name misspelt"):
        open_dataset(f"folder:{tmp_path}")
    (tmp_path / "test" / "lights").rename(tmp_path.with_name(f"{tmp_path.name}-aside"))
    assert open_dataset(f"folder:{tmp_path}").notes == ("test has no images of light",)


@pytest.mark.parametrize("where", ["train", "train/dark/more"])
def test_stray_image_is_named(where, tmp_path):
    _folder(tmp_path)
    (tmp_path / where).mkdir(exist_ok=True)
    Image.new("L", (12, 12)).save(tmp_path / where / "stray.png")
    with pytest.raises(ValueError, match="expected SPLIT/CLASS/IMAGE") as error:
        open_dataset(f"folder:{tmp_path}")
    named = tmp_path / where if where.endswith("more") else tmp_path / where / "stray.png"
    assert str(error.value).endswith(f":\n  {named}")


def test_local_folder_shows_no_bar_of_a_download(tmp_path, capfd):
    import datasets

    _folder(tmp_path)
    open_dataset(f"folder:{tmp_path}")
    captured = capfd.readouterr()
    assert captured.err == captured.out == "" and not datasets.are_progress_bars_disabled()


def test_parquet(tmp_path):
    import datasets

    _folder(tmp_path / "images")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "images"))
    for split in ("train", "test"):
        loaded[split].to_parquet(tmp_path / f"{split}-0.parquet")
    a, b = open_dataset(f"parquet:{tmp_path}"), open_dataset(f"folder:{tmp_path / 'images'}")
    assert a.classes == 2 and torch.equal(a.train.tensors[0], b.train.tensors[0])


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("imagenet", "names no dataset"),
        ("digits:8", "names no dataset"),
        ("folder:", "names no dataset"),
        ("folder:nowhere", "nowhere does not exist"),
        ("zip:nowhere", "names no dataset"),
        ("torchvision:_Private", "no dataset"),
    ],
)
def test_unknown_sources_are_refused(source, wanted):
    if source.startswith("torchvision"):
        pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match=wanted):
        open_dataset(source)


def test_empty_folder_and_folder_without_classes(tmp_path):
    with pytest.raises(ValueError, match="cannot open"):
        open_dataset(f"folder:{tmp_path}")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"expected SPLIT/CLASS/IMAGE.*\n.*a.png"):
        open_dataset(f"folder:{tmp_path}")


def test_torchvision(tmp_path):
    pytest.importorskip("torchvision")
    _idx_files(tmp_path / "FashionMNIST" / "raw")
    data = open_dataset("torchvision:FashionMNIST", data_dir=tmp_path)
    assert data.in_channels == 1 and data.classes == 3 and len(data.test) == 6
    with pytest.raises(ValueError, match="download=True"):
        open_dataset("torchvision:CIFAR10", data_dir=tmp_path)


# ---- IDX files ------------------------------------------------------------------------------------------------------


def _idx_files(folder, compressed=False):
    folder.mkdir(parents=True, exist_ok=True)
    rng = numpy.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 6)):
        images = rng.integers(0, 256, (count, 5, 4), dtype="uint8")
        labels = (numpy.arange(count) % 3).astype("uint8")
        for kind, x in (("images-idx3", images), ("labels-idx1", labels)):
            content = struct.pack(f">HBB{x.ndim}I", 0, 8, x.ndim, *x.shape) + x.tobytes()
            name = f"{part}-{kind}-ubyte"
            (folder / (f"{name}.gz" if compressed else name)).write_bytes(
                gzip.compress(content) if compressed else content
            )
    return images


@pytest.mark.parametrize("compressed", [False, True])
def test_idx(compressed, tmp_path):
    test_images = _idx_files(tmp_path, compressed)
    data = open_dataset(f"idx:{tmp_path}")
    assert (len(data.train), len(data.validation), len(data.test)) == (54, 6, 6)
    assert data.size == (5, 4) and data.classes == 3
    assert numpy.array_equal(data.test.tensors[0][:, 0].numpy(), test_images)


def test_damaged_idx_files_are_all_named(tmp_path):
    _idx_files(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    images = tmp_path / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-7])
    with pytest.raises(
        ValueError, match=r"train-images-idx3-ubyte holds 1193 bytes where its header says 1200.*no t10k-labels"
    ):
        open_dataset(f"idx:{tmp_path}")


# ---- Omniglot -------------------------------------------------------------------------------------------------------


def test_omniglot_counts_a_drawing_of_both_archives_once(tmp_path):
    import io
    import zipfile

    for number, alphabets in ((1, "AB"), (2, "BC")):
        with zipfile.ZipFile(tmp_path / f"images_background_small{number}.zip", "w") as archive:
            for alphabet in alphabets:
                for drawing in range(1, 21):
                    buffer = io.BytesIO()
                    Image.new("1", (105, 105), drawing % 2).save(buffer, "png")
                    name = f"images_background_small{number}/{alphabet}/character01/0001_{drawing:02}.png"
                    archive.writestr(name, buffer.getvalue())
    data = open_dataset(f"omniglot:{tmp_path}")
    assert data.classes == 3 and data.size == (28, 28)
    assert (len(data.train), len(data.validation), len(data.test)) == (39, 6, 15)
    # Drawings alternate: the test's, 16 to 20, start on a white ground, which becomes black... and so on.
    assert data.test.tensors[0][:5, 0, 0, 0].tolist() == [255, 0, 255, 0, 255]
    (tmp_path / "images_background_small2.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"small2.zip cannot be read"):
        open_dataset(f"omniglot:{tmp_path}")
