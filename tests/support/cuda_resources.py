"""What nvcc makes of the `cuda` backend's kernels: registers, spills and shared memory for each target.

``python tests/support/cuda_resources.py`` writes the table in docs/cuda.md. Needs nvcc, no GPU.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from cuda_build import DEFAULT_TARGETS  # noqa: E402

FOLDER = ROOT / "csrc" / "cuda"
FORMS, PRESENT = FOLDER / "forms.cu", FOLDER / "steps" / "relation_graphs.cu"
# The kernels of the forms literal and dense, in the order of the stages; and those of csrc/cuda/steps.
KERNELS = (
    "prepare", "entropy", "sample", "bracket", "count", "digits", "missed", "exact", "sums", "means", "pack", "split",
    "dense", "add", "literal", "literal_tile", "finish",
)  # fmt: skip
STEPS = re.findall(
    r"\w+", re.search(r"enum class Step \{(.*?)\}", (FOLDER / "steps/steps.cuh").read_text(), re.DOTALL)[1]
)
FLOAT32_ALONE = ("split",)
STEP_KERNELS = (*(f"steps/{step}" for step in STEPS), "steps/one_launch")
DTYPES = {"f": "float32", "d": "float64"}
NVCC = shutil.which("nvcc")
# Allowances, the same on every target. With 128 registers two blocks of 256 threads share a multiprocessor, a quarter
# of the threads it has room for; the one kernel of small graphs has about as many blocks as there are multiprocessors.
MOST_REGISTERS = 128
MOST_REGISTERS_OF_FLOAT64_STEPS = 192
MOST_REGISTERS_OF_ONE_LAUNCH = 224
MOST_SPILLS = 0
MOST_STACK = 0
BEGIN, END = "<!-- resources:begin -->\n", "<!-- resources:end -->"


class Resources(NamedTuple):
    kernel: str  # one of KERNELS or STEP_KERNELS
    dtype: str
    target: int  # sm_*
    registers: int
    stack: int  # bytes of local memory a thread, of which
    spills: int  # bytes stored and loaded because registers ran out
    shared: int  # bytes a block, statically; launches add shared_bytes()


def compile_kernels(source: Path, targets: Sequence[int] = DEFAULT_TARGETS) -> list[Resources]:
    """Compiles the kernels of ``source``, warnings being errors; not the host's side, which the emulation does."""
    flags = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "--threads", "2", "-fatbin"]
    flags += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in targets]
    with tempfile.TemporaryDirectory() as folder:
        command = [NVCC, *flags, source, "-o", str(Path(folder) / "kernels.fatbin")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed:\n{done.stdout}{done.stderr}")
    return parse(done.stdout + done.stderr)


def parse(report: str) -> list[Resources]:
    """What ptxas says of each kernel."""
    found = []
    for part in re.split(r"Compiling entry function ", report)[1:]:
        name, target = re.match(r"'(\w+)' for 'sm_(\d+)'", part).groups()
        step = re.search(r"step_kernelI([fd])LNS\w+StepE(\d+)E", name)
        kernel, scalar = re.search(r"\d([a-z_]+)_kernelI([fd])", name).groups()
        if step:
            kernel = f"steps/{STEPS[int(step.group(2))]}"
        elif "5steps" in name:
            kernel = f"steps/{kernel}"
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Resources(
                kernel,
                DTYPES[scalar],
                int(target),
                int(re.search(r"Used (\d+) registers", part).group(1)),
                stack,
                stores + loads,
                int(shared.group(1)) if shared else 0,
            )
        )
    return found


def table(resources: list[Resources]) -> str:
    """Registers a thread by target; what all targets share once."""
    resources = sorted(resources, key=lambda r: (r.dtype, (*KERNELS, *STEP_KERNELS).index(r.kernel), r.target))
    targets = sorted({r.target for r in resources})
    lines = ["| kernel | dtype | " + " | ".join(f"sm_{t}" for t in targets) + " | spills | stack |"]
    lines.append("|---|---|" + "---:|" * (len(targets) + 2))
    for kernel, dtype in dict.fromkeys((r.kernel, r.dtype) for r in resources):
        rows = {r.target: r for r in resources if (r.kernel, r.dtype) == (kernel, dtype)}
        registers = " | ".join(str(rows[t].registers) for t in targets)
        worst = [max(getattr(r, field) for r in rows.values()) for field in ("spills", "stack")]
        lines.append(f"| {kernel} | {dtype} | {registers} | {worst[0]} | {worst[1]} |")
    return "\n".join(lines) + "\n"


def registers(table: str) -> dict[tuple[str, str, int], int]:
    """What such a table says of ``(kernel, dtype, target)``."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines() if line[:1] == "|"]
    targets = {k: int(name[3:]) for k, name in enumerate(rows[0]) if name.startswith("sm_")}
    return {(row[0], row[1], target): int(row[k]) for row in rows[2:] for k, target in targets.items()}


def version() -> str:
    return subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[3]


if __name__ == "__main__":
    page = ROOT / "docs" / "cuda.md"
    text = page.read_text()
    resources = compile_kernels(FORMS) + compile_kernels(PRESENT)
    made = f"\nRegisters a thread, bytes of spills and stack ({version()}).\n\n{table(resources)}\n"
    page.write_text(text[: text.index(BEGIN) + len(BEGIN)] + made + text[text.index(END) :])
