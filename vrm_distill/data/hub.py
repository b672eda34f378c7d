"""Anything that Hugging Face ``datasets`` opens: a folder of images, parquet files, or a dataset of the hub."""

import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Dataset, TensorDataset

from vrm_distill.data.decoded import SHOWN, DecodedImages, inspect
from vrm_distill.data.folders import HELD_OUT, SPLITS, read_folder
from vrm_distill.data.images import ImageData, from_parts, split_indices, subset

_VALIDATION_FRACTION = 0.1
# Sets of this many bytes and fewer, decoded, are kept in memory; larger ones are decoded batch by batch.
_IN_MEMORY = 2**30
# A file of one split: train.parquet, train-00000-of-00002.parquet, train_0.parquet.
_PART = re.compile(rf"({'|'.join(SPLITS)})([-_.]?\d[\w.-]*)?\.parquet")


def folder(path: str, **options) -> ImageData:
    """Images in ``path/train/CLASS/*`` and perhaps ``path/test/CLASS/*`` and ``path/validation/CLASS/*``.

    With a validation and no test, the validation is what is tested on.
    """
    datasets = _datasets()
    rows, names, notes = read_folder(path)
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)})
    splits = {
        split: datasets.Dataset.from_dict({"image": files, "label": labels}, features=features)
        for split, (files, labels) in rows.items()
    }
    return _make(
        Path(path).resolve().name, splits, {split: files for split, (files, _) in rows.items()}, notes, **options
    )


def parquet(path: str, **options) -> ImageData:
    """Parquet files with a column of images and one of labels; those of a folder are named ``SPLIT.parquet`` or
    ``SPLIT-NUMBER.parquet``."""
    here, files = Path(path), {"train": [path]}
    if here.is_dir():
        named = {file: _PART.fullmatch(file.name) for file in sorted(here.glob("*.parquet"))}
        if strange := [file.name for file, match in named.items() if match is None]:
            raise ValueError(f"{path}: of which split is {_some(strange)}? Name it train-0.parquet, or move it away")
        files = {split: [str(f) for f, match in named.items() if match[1] == split] for split in SPLITS}
        files = {split: there for split, there in files.items() if there}
        if "train" not in files:
            raise ValueError(f"{path} holds no train*.parquet")
    return _open(here.resolve().stem, "parquet", files=files, data_files=files, **options)


def hub(name: str, **options) -> ImageData:
    """A dataset of the hub, ``NAME`` or ``OWNER/NAME``: needs a network the first time."""
    return _open(name.rpartition("/")[2], name, **options)


def _open(name: str, source: str, *, data_files: dict | None = None, files: dict | None = None, **options) -> ImageData:
    datasets = _datasets()
    try:
        # A bar that counts files of this machine as "downloading" is silenced.
        with _no_bars(datasets) if data_files else nullcontext():
            splits = datasets.load_dataset(source, **({"data_files": data_files} if data_files else {}))
    except Exception as error:  # datasets' own, the hub's, the network's and the parsers' have no common ancestor
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot open {name}: {reason}") from error
    if "train" not in splits:
        raise ValueError(f"{name} has no part called train: it has {', '.join(splits)}")
    return _make(name, dict(splits), files or {}, [], **options)


def _make(
    name: str,
    splits: dict,
    files: dict[str, list[str]],
    notes: list[str],
    *,
    train_images: int | None = None,
    image_size: int | None = None,
    skip_broken: bool = False,
) -> ImageData:
    image, label = _columns(name, splits["train"])
    splits = {key: rows.cast_column(image, _datasets().Image(decode=False)) for key, rows in splits.items()}
    splits, labels, secret = _labelled(name, splits, label, files)
    feature = splits["train"].features[label]
    titles = [str(x) for x in labels]
    if getattr(feature, "names", None):
        labels, titles = list(range(len(feature.names))), list(feature.names)
    channels, size, good, told = inspect(name, splits, image, image_size, skip_broken)
    splits = {k: rows if len(good[k]) == len(rows) else rows.select(good[k]) for k, rows in splits.items()}
    missing = _missing_classes(name, labels, titles, {key: set(rows.unique(label)) for key, rows in splits.items()})
    number = {x: i for i, x in enumerate(labels)}
    parts = {key: DecodedImages(rows, image, label, channels, size, number, key) for key, rows in splits.items()}
    counts = tuple(_counts(key, list(rows[label]), number, titles) for key, rows in splits.items())
    train, validation, test = _split(name, parts)
    if sum(map(len, (train, validation, test))) * channels * size[0] * size[1] <= _IN_MEMORY:
        train, validation, test = (TensorDataset(*part[torch.arange(len(part))]) for part in (train, validation, test))
    data = from_parts(name, len(labels), train, validation, test, train_images=train_images)
    return replace(data, notes=(*secret, *notes, *told, *missing), counts=counts, class_names=tuple(titles))


def _datasets():
    try:
        import datasets
    except ImportError as error:
        from vrm_distill.data import HOW_TO_INSTALL

        raise ValueError(f"this source needs Hugging Face datasets: {HOW_TO_INSTALL}") from error
    return datasets


@contextmanager
def _no_bars(datasets):
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not silent:
            datasets.enable_progress_bars()


def _labelled(name: str, splits: dict, label: str, files: dict[str, list[str]]) -> tuple[dict, list, list[str]]:
    """The splits that have labels, all labels in order, and what the user should be told.

    Raises:
        ValueError: naming the rows whose label is missing or negative, or labels that are no classes.
    """
    kept, notes, found = {}, [], set()
    for key, rows in splits.items():
        values = list(rows[label])
        if strange := [x for x in values if not (x is None or isinstance(x, (int, str)))][:1]:
            raise ValueError(
                f"{name}: column {label} of {key} must hold a class a row, a number or a name, got {strange[0]!r}"
            )
        if key != "train" and set(values) == {-1}:
            notes.append(f"left out {key}: its labels are -1, which stands for kept secret")
            continue
        bad = [i for i, x in enumerate(values) if x is None or (isinstance(x, int) and x < 0)]
        if bad:
            lines = [f"{_place(key, i, files.get(key, ()))}: {values[i]}" for i in bad[:SHOWN]]
            more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
            raise ValueError(f"{name}: {len(bad)} rows have no label, {', '.join(lines)}{more}")
        kept[key] = rows
        found |= set(values)
    if len({type(x) for x in found}) > 1:
        raise ValueError(f"{name}: column {label} holds both numbers and names")
    return kept, sorted(found), notes


def _place(split: str, row: int, files: list[str]) -> str:
    """The file that a row of a split is in, and its number there, both where they are known."""
    import pyarrow.parquet

    for file in files:
        if not file.endswith(".parquet"):
            return files[row]
        count = pyarrow.parquet.read_metadata(file).num_rows
        if row < count:
            return f"{file} row {row}"
        row -= count
    return f"{split} row {row}"


def _counts(split: str, values: list, number: dict, titles: list[str]) -> str:
    """How many images of each class a split has; of many classes only the fewest and the most."""
    counts = torch.tensor([number[x] for x in values]).bincount(minlength=len(titles)).tolist()
    if len(titles) > 2 * SHOWN:
        return f"{split}: {sum(counts):,} images, {min(counts)} to {max(counts)} in each of {len(titles)} classes"
    return f"{split}: " + ", ".join(f"{title} {count:,}" for title, count in zip(titles, counts, strict=True))


def _missing_classes(name: str, labels: list, titles: list[str], found: dict[str, set]) -> list[str]:
    """What to tell the user about classes that a split has no image of.

    Raises:
        ValueError: one that there is to test on and not to train on: most often a name that is spelt in two ways.
    """
    missing = {
        key: [title for x, title in zip(labels, titles, strict=True) if x not in seen] for key, seen in found.items()
    }
    absent = missing["train"]
    if holders := [key for key, lacking in missing.items() if not set(absent) <= set(lacking)]:
        raise ValueError(
            f"{name}: train has no images of {_some(absent)}, {' and '.join(holders)} "
            f"{'has' if len(holders) == 1 else 'have'}: is a folder's name misspelt?"
        )
    return [f"{key} has no images of {_some(lacking)}" for key, lacking in missing.items() if lacking]


def _some(titles: list[str]) -> str:
    more = f" and {len(titles) - SHOWN} more" if len(titles) > SHOWN else ""
    return ", ".join(titles[:SHOWN]) + more


def _columns(name: str, rows) -> tuple[str, str]:
    """The columns of the images and of the labels."""
    datasets = _datasets()
    columns = rows.features
    images = [key for key, kind in columns.items() if isinstance(kind, datasets.Image)]
    # Parquet files that datasets did not write hold an image as a struct, or as its bytes alone.
    images = images or [key for key in ("image", "img", "images") if key in columns]
    labels = [key for key, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
    labels = [key for key in ("label", "fine_label", "labels") if key in columns] or labels
    if not images or not labels:
        missing = "images" if not images else "labels (a column called label)"
        raise ValueError(f"{name} has no {missing}: its columns are {', '.join(columns)}")
    return images[0], labels[0]


def _split(name: str, parts: dict[str, DecodedImages]) -> tuple[Dataset, Dataset, Dataset]:
    """Train, validation and test; what is missing is set apart from the training images, the same ones every time."""
    train, held_out = parts["train"], [parts[key] for key in HELD_OUT if key in parts]
    while len(held_out) < 2:
        count = max(1, int(_VALIDATION_FRACTION * len(train)))
        if count * 2 > len(train):
            raise ValueError(f"{name} has {len(train)} training images: too few to set some apart for validation")
        rest, apart = split_indices(len(train), len(train) - count)
        # A test set that comes with the data is used as it is; images are set apart only to choose the student.
        train, held_out = subset(train, rest), [*held_out, subset(train, apart)]
    test, validation = held_out[:2]
    return train, validation, test
