"""A folder of images: ``SPLIT/CLASS/IMAGE``. Names are taken as they are: nothing is guessed, and nothing lost."""

from pathlib import Path

from vrm_distill.data.decoded import listed

# The names that splits go by.
HELD_OUT = ("test", "validation", "valid", "val", "dev")
SPLITS = ("train", *HELD_OUT)


def read_folder(root: str) -> tuple[dict[str, tuple[list[str], list[int]]], list[str], list[str]]:
    """The files of each split with the number of their class, the classes' names, and what the user should be told.

    A split is a folder in ``root`` with exactly one of the names in ``SPLITS``; a class is a folder in it, of any name;
    links are followed. If no folder in ``root`` is a split, they are the classes of ``train``.

    Raises:
        ValueError: listing what lies where it has no meaning, or classes without an image to train on.
    """
    from PIL import Image

    kinds = set(Image.registered_extensions())
    here, top = Path(root), _folders(Path(root))
    splits = {name: here / name for name in SPLITS if here / name in top}
    stray = [folder for folder in top if folder.name not in SPLITS] if splits else []
    if splits and "train" not in splits:
        raise ValueError(f"{root} has no folder called train: it has {', '.join(folder.name for folder in top)}")
    splits = splits or {"train": here}
    stray += [file for file in _files(here) if file.suffix.lower() in kinds]
    found: dict[str, dict[str, list[Path]]] = {}
    others = []
    for split, folder in splits.items():
        found[split] = {}
        if folder != here:
            stray += [file for file in _files(folder) if file.suffix.lower() in kinds]
        for label in _folders(folder):
            files = _files(label)
            found[split][label.name] = [file for file in files if file.suffix.lower() in kinds]
            others += [file for file in files if file.suffix.lower() not in kinds]
            stray += _folders(label)
    if stray:
        raise ValueError(
            f"{root}: expected SPLIT/CLASS/IMAGE, a split being one of {', '.join(SPLITS)}; move away what is not of "
            f"that form:\n{listed([str(path) for path in stray])}"
        )
    if not any(found["train"].values()):
        raise ValueError(f"cannot open {root}: no images in {splits['train']}/CLASS/")
    names = sorted(set().union(*found.values()))
    if empty := [name for name in names if not any(classes.get(name) for classes in found.values())]:
        raise ValueError(f"{root}: no images in the folders of these classes, fill or remove them:\n{listed(empty)}")
    rows = {
        split: (
            [str(file) for name in names for file in classes.get(name, ())],
            [number for number, name in enumerate(names) for _ in classes.get(name, ())],
        )
        for split, classes in found.items()
    }
    notes = [f"left alone {len(others)} files that are no images:\n{listed([str(path) for path in others])}"]
    return rows, names, notes if others else []


def _folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not path.is_dir() and not path.name.startswith(".")]
