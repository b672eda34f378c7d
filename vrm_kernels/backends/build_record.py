"""What the build left beside the extensions, and the sentences for one that is missing, does not load or is outdated.

setup.py loads this file by its path: it needs the standard library alone.
"""

import hashlib
import json
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# {"cpp": {"reason": why it is missing, "torch": the version it was built beside, "sources": fingerprint}, "cuda": ...}
NAME = "_build.json"
FOLDERS = {"cpp": "cpu", "cuda": "cuda"}  # of csrc, by backend


def fingerprint(csrc: Path, backend: str) -> str:
    """A hash of the sources of a backend's extension."""
    state = hashlib.sha256()
    for path in sorted((*csrc.glob("*"), *(csrc / FOLDERS[backend]).rglob("*"))):
        if path.is_file():
            state.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()[:16]


def source_tree() -> Path | None:
    """The folder of the project, where the package is used from its sources: in place, or as an editable install."""
    root = PACKAGE.parent
    return root if (root / "csrc").is_dir() and (root / "setup.py").is_file() else None


def why_outdated(backend: str, built_from: str) -> str:
    """Empty, or the sentence that refuses an extension that was not built from the sources that lie here."""
    root = source_tree()
    if root is None or fingerprint(root / "csrc", backend) == built_from:
        return ""
    return f"the extension was built from other sources than those in {root / 'csrc'}: run 'make build' in {root}"


def why_left_out(backend: str) -> str:
    """Empty where the extension was built."""
    if record := _read():
        return record[backend]["reason"]
    root = source_tree()
    if root is None:
        return "the package was installed without its build record: install it again"
    return (
        f"Python uses the source tree {root}, whose extensions were never built: run 'make build' in it, or start "
        "Python elsewhere to use a package that is installed"
    )


def why_it_does_not_load(backend: str, torch_version: str, error: Exception) -> str:
    """The sentence for ``error``, which importing the extension raised."""
    beside = _read()[backend]["torch"]
    if beside != torch_version:
        return (
            f"the extension was built beside torch {beside} and does not load beside torch {torch_version}: reinstall "
            "vrm-kernels, which needs torch 2.11 or newer"
        )
    return f"the extension was built but does not load: reinstall vrm-kernels ({error})"


def _read() -> dict:
    path = PACKAGE / NAME
    return json.loads(path.read_text()) if path.exists() else {}
