"""Where a measurement was made: the columns that make it mean something elsewhere. Never the machine's name."""

import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import vrm_kernels
from vrm_kernels.backends import cpp

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def describe() -> dict[str, str]:
    """One value for each of ``records.ENVIRONMENT``."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": f"{_kilobytes('/proc/meminfo', 'MemTotal') / 2**20:.0f}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": _output(os.environ.get("CXX") or shutil.which("g++") or "c++", "--version").split("\n")[0],
        "package": vrm_kernels.__version__,
        "extension": " ".join(cpp.status()[1].split()),
        "commit": _output("git", "rev-parse", "--short=12", "HEAD") or "none",
        # Results are written while measuring: they alone do not make the code another.
        "dirty": "yes" if _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results") else "no",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S"),
    }


def results_file(kind: str, described: dict[str, str], folder: Path = RESULTS) -> Path:
    """A new file's name: what was measured, on what, and when."""
    stamp = described["date"].replace("-", "").replace(":", "").replace(" ", "-")
    isa = "".join(letter for letter in described["isa"].lower() if letter.isalnum())
    return folder / f"{kind}-{isa}-{described['cores']}cores-{stamp}.csv"


def available_bytes() -> int:
    """Memory that can be had without swapping; 0 where the system does not say."""
    return _kilobytes("/proc/meminfo", "MemAvailable") * 1024


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _kilobytes(path: str, name: str) -> int:
    return int((_field(path, name) or "0").split()[0])


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
