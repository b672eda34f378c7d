"""``make gpu-check FOLDER=...``: on a machine with a GPU, build, test, sanitize, measure and train, in seven minutes.

``python -m benchmarks.gpu.check FOLDER [--parts build tests sanitize bench train]``. It needs nvcc, and the torch and
Triton of the Python that runs it; no network. Results are on the disk as they come: log.txt with all output, tests.xml,
gpu-*.csv, profile.txt, train.csv and record.json. What fails or runs out of time stops nothing; the last lines are a
table that names it, and the exit status is then 1.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import environment, records
from vrm_kernels.backends import device_record

ROOT = environment.ROOT
# Seconds that a part may take; what an earlier part leaves is there for the later ones.
PARTS = {"build": 80, "tests": 120, "sanitize": 45, "bench": 110, "train": 65}
# The tests of each backend on a device.
BACKENDS = {
    "cuda": "tests/backends/cuda/test_device.py",
    "triton": "tests/backends/triton/test_device.py",
}
# Of the suite: what runs on any device. Hypothesis draws a new shape each time, and the compilers need a CPU.
SUITE = (
    "parity/test_extremes.py", "parity/test_settings.py", "parity/test_shapes.py", "graph/test_mask.py",
    "loss/test_nan.py", "loss/test_relation_loss.py", "ops/test_autograd.py",
)  # fmt: skip
TOOLS = {
    "cuda": ("memcheck", "racecheck", "initcheck", "synccheck"),
    "triton": ("memcheck", "racecheck"),
}
# Whose library's kernels are not ours to judge.
OWN = {("cuda", "racecheck"), ("cuda", "initcheck")}
FOUND = 9  # what compute-sanitizer exits with


class Check:
    """One run: its commands, what they said, and what failed."""

    def __init__(self, folder: Path, parts: list[str], python: str, capability: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.parts, self.python, self.capability = folder, parts, python, capability
        self.log = (folder / "log.txt").open("a")
        self.failures: list[str] = []
        self.table: list[tuple[str, str, float]] = []
        self.deadline = time.monotonic() + sum(PARTS[part] for part in parts)

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def left(self, part: str) -> float:
        """Seconds for a part that begins: up to the deadline, less those of the parts after it."""
        later = self.parts[self.parts.index(part) + 1 :]
        return max(1.0, self.deadline - time.monotonic() - sum(PARTS[name] for name in later))

    def start(self, command: list[str], **variables: str) -> subprocess.Popen:
        """A Python of this machine, in a group of its own, so that all of it can be ended."""
        environ = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            # Without it torch refuses products where algorithms must be deterministic.
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", self.capability),
        }
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environ | variables,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen, what: str, limit: float, since: float) -> int | None:
        """The exit status, or ``None`` where time ran out; either is told and remembered."""
        try:
            status = process.wait(max(0.1, since + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
        said = "ok" if status == 0 else f"stopped after {limit:.0f} s" if status is None else f"failed ({status})"
        self.table.append((what, said, time.monotonic() - since))
        self.say(f"== {what}: {said}, {time.monotonic() - since:.1f} s")
        if status != 0:
            self.failures.append(f"{what}: {said}")
        return status

    def run(self, what: str, limit: float, *words: str, **variables: str) -> int | None:
        """``python WORDS``, up to ``limit`` seconds."""
        since = time.monotonic()
        return self.finish(self.start([self.python, *words], **variables), what, limit, since)


# ---- the parts ------------------------------------------------------------------------------------------------------


def build(check: Check, limit: float) -> None:
    """In place, without an environment of its own: what is missing cannot be fetched here. For this GPU alone."""
    check.run("build", limit, "setup.py", "--quiet", "build_ext", "--inplace")
    check.run("describe", 30, "-c", "import vrm_kernels; print(vrm_kernels.backends.describe())")


def tests(check: Check, limit: float) -> None:
    """The compilers first, in parallel: each variant once, and not by every worker that meets it."""
    end = time.monotonic() + limit
    check.run("compile the variants", limit / 3, "-m", "benchmarks.gpu.warm")
    parallel = ["-n", str(os.cpu_count() or 1), "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
    report = check.folder / "tests.xml"
    words = ["-m", "pytest", *parallel, *BACKENDS.values(), f"--junitxml={report}"]
    check.run("device tests", 0.75 * (end - time.monotonic()), *words)
    for name in BACKENDS:
        says = result_of_tests(report, name)
        if says != "right":
            check.failures.append(f"{name}: {says}")
        check.table.append((f"tests of {name}", says, 0.0))
    check.run(
        "the suite on the GPU", end - time.monotonic(), "-m", "pytest", *parallel,
        *(f"tests/{name}" for name in SUITE), "-k", "triton or cuda or torch", VRM_TEST_DEVICE="cuda",
    )  # fmt: skip
    leave_record(check, report)


def result_of_tests(report: Path, backend: str) -> str:
    """What the device tests say of a backend: "right" where each ran and passed."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return "its tests did not end"
    module = BACKENDS[backend].removesuffix(".py").replace("/", ".")
    mine = [case for case in cases if (case.get("classname", "") + ".").startswith(f"{module}.")]
    failed = [case for case in mine if case.find("failure") is not None or case.find("error") is not None]
    ran = [case for case in mine if case.find("skipped") is None]
    if not ran:
        return "none of its tests ran"
    return f"{len(failed)} of {len(ran)} tests failed" if failed else "right"


def leave_record(check: Check, report: Path) -> None:
    """In the repository, and in the folder for a repository that is elsewhere."""
    for name in BACKENDS:
        device_record.write(device_record.entry(name, result_of_tests(report, name), environment.describe()["commit"]))
    shutil.copy(device_record.PATH, check.folder / "record.json")


def sanitize(check: Check, limit: float) -> None:
    if shutil.which("compute-sanitizer") is None:
        check.say("compute-sanitizer is not installed: skipped")
        check.table.append(("sanitize", "compute-sanitizer is not installed", 0.0))
        return
    since, running = time.monotonic(), []
    for name in BACKENDS:
        for tool in TOOLS[name]:
            own = ["--own"] if (name, tool) in OWN else []
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), check.python]
            # Each array an allocation of its own: its end is then known.
            process = check.start(
                [*command, "-m", "benchmarks.gpu.sanitize", name, *own], PYTORCH_NO_CUDA_MEMORY_CACHING="1"
            )
            running.append((f"{tool} of {name}", process))
    for what, process in running:
        if check.finish(process, what, limit, since) is None:
            check.failures.pop()  # nothing was found by then


def bench(check: Check, limit: float) -> None:
    """Each backend's own figures first. One that takes the process with it does not take the others' figures."""
    from benchmarks.gpu.run import GROUPS, results_file

    end = time.monotonic() + limit
    path = results_file(check.folder)
    for k, group in enumerate(GROUPS):
        share = (end - time.monotonic()) / 2 if k == 0 else end - time.monotonic() - 10
        words = ["--csv", str(path), "--budget", f"{max(5, share):.0f}", "--peers", *group]
        status = check.run(f"benchmarks of {' '.join(group)}", share + 20, "-m", "benchmarks.gpu.run", *words)
        for peer in group if status not in (0, None) else ():
            check.run(
                f"benchmarks of {peer} alone",
                share / len(group),
                "-m",
                "benchmarks.gpu.run",
                *words[:4],
                "--peers",
                peer,
            )
        if k == 0:
            check.run("profile", 30, "-m", "benchmarks.gpu.profile", str(check.folder / "profile.txt"))
    for row in records.read(path, records.GPU_COLUMNS) if path.exists() else ():
        if row["status"] in ("wrong", "failed"):
            check.failures.append(f"{row['peer']} {row['batch']}x{row['classes']} {row['dtype']}: {row['status']}")


def train(check: Check, limit: float) -> None:
    check.run(
        "training", limit, "-m", "benchmarks.gpu.train", str(check.folder / "train.csv"), "--budget", f"{limit:.0f}"
    )


def summary(check: Check) -> str:
    """All of it, in the end."""
    lines = ["", "| what | result | s |", "|---|---|---:|"]
    lines += [f"| {what} | {said} | {seconds:.0f} |" for what, said, seconds in check.table]
    from benchmarks.report.summary import Measured, gpu_table

    if paths := sorted(check.folder.glob("gpu-*.csv")):
        lines += ["", gpu_table(Measured(paths, records.GPU_COLUMNS), ROOT / "README.md")]
    if (path := check.folder / "train.csv").exists():
        lines += ["", path.read_text()]
    return "\n".join([*lines, "", f"{len(check.failures)} failures", *check.failures])


def main(words: list[str] | None = None, python: str = sys.executable) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.check", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.exit(1, "no CUDA device: make gpu-check needs one\n")
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    check = Check(args.folder.resolve(), [part for part in PARTS if part in args.parts], python, capability)
    run: dict[str, Callable] = {"build": build, "tests": tests, "sanitize": sanitize, "bench": bench, "train": train}
    for part in check.parts:
        check.say(f"== {part}")
        try:
            run[part](check, check.left(part))
        except Exception as error:  # a fault of this script is not to cost the parts after it
            check.say(f"== {part}: {error!r}")
            check.failures.append(f"{part}: {error!r}")
    check.say(summary(check))
    return 1 if check.failures else 0


if __name__ == "__main__":
    sys.exit(main())
