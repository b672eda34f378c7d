"""What has been run on a device: device_record.json beside this file, which ``make gpu-check`` writes.

An entry holds a hash of the kernels that ran, so that it shows when they have changed.
"""

import functools
import hashlib
import json
from datetime import datetime, timezone
from pathlib import Path

import torch

from vrm_kernels.backends import build_record

PATH = Path(__file__).with_name("device_record.json")


def sources(backend: str) -> str:
    """A hash of the backend's kernels; empty where they are not here, as C++ is not in an installed package."""
    if backend == "cuda":
        root = build_record.source_tree()
        return build_record.fingerprint(root / "csrc", "cuda") if root else ""
    state = hashlib.sha256()
    folder = Path(__file__).parent / backend
    for file in sorted(folder.rglob("*.py")):
        state.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return state.hexdigest()[:16]


def entry(backend: str, result: str, commit: str) -> dict[str, str]:
    """An entry for the current device and the installed versions; ``result`` is "right", or says what is wrong."""
    triton = __import__("triton").__version__ if backend == "triton" else ""
    return {
        "backend": backend,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit,
        "result": result,
        "sources": sources(backend),
    }


def write(new: dict[str, str]) -> None:
    """Replaces the entry of the same backend on the same device."""
    same = ("backend", "device")
    kept = [old for old in read() if any(old[name] != new[name] for name in same)]
    PATH.write_text(json.dumps(sorted([*kept, new], key=lambda x: [x[name] for name in same]), indent=1) + "\n")


def read() -> list[dict[str, str]]:
    return json.loads(PATH.read_text()) if PATH.exists() else []


@functools.cache
def note(backend: str) -> str:
    """What :func:`vrm_kernels.backends.describe` says: on which devices the backend has run, and whether it was
    right."""
    said = []
    for old in read():
        if old["backend"] == backend:
            now = sources(backend)
            changed = ", and has changed since" if now and now != old["sources"] else ""
            said.append(f"{old['result']} on {old['device']} at commit {old['commit']}{changed}")
    return "; ".join(said) or "not yet run on a device"
