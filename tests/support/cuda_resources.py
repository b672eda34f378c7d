"""What nvcc makes of the `cuda` backend's kernels: registers, spills and shared memory for each target.

``python tests/support/cuda_resources.py`` writes the table in docs/cuda.md. Needs nvcc, no GPU.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from cuda_build import DEFAULT_TARGETS  # noqa: E402

SOURCE = ROOT / "csrc" / "cuda" / "relation_graphs.cu"
STEPS = re.findall(r"\w+", re.search(r"enum class Step \{(.*?)\}", SOURCE.with_name("steps.cuh").read_text()).group(1))
DTYPES = {"f": "float32", "d": "float64"}
NVCC = shutil.which("nvcc")
# Allowances, the same on every target. With 128 registers two blocks of 256 threads share a multiprocessor; the one
# kernel of small graphs has about as many blocks as there are multiprocessors anyway.
MOST_REGISTERS = {"float32": 128, "float64": 192}
MOST_REGISTERS_OF_ONE_LAUNCH = 224
MOST_SPILLS = 0
MOST_STACK = 0
BEGIN, END = "<!-- resources:begin -->\n", "<!-- resources:end -->"


class Resources(NamedTuple):
    kernel: str  # a step, or "one_launch"
    dtype: str
    target: int  # sm_*
    registers: int
    stack: int  # bytes of local memory a thread, of which
    spills: int  # bytes stored and loaded because registers ran out
    shared: int  # bytes a block, statically; launches add shared_bytes()


def compile_all(extra: tuple[str, ...] = ()) -> list[Resources]:
    """Compiles every kernel for every target, warnings being errors."""
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in DEFAULT_TARGETS]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            NVCC,
            "-std=c++17",
            "-O3",
            "-Werror",
            "all-warnings",
            "-Xptxas",
            "-v",
            "--threads",
            "2",
            *targets,
            *extra,
        ]
        done = subprocess.run(
            [*command, "-c", SOURCE, "-o", str(Path(folder) / "kernels.o")], capture_output=True, text=True
        )
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed:\n{done.stdout}{done.stderr}")
    return parse(done.stdout + done.stderr)


def parse(report: str) -> list[Resources]:
    """What ptxas says of each kernel."""
    found = []
    for part in re.split(r"Compiling entry function ", report)[1:]:
        name, target = re.match(r"'(\w+)' for 'sm_(\d+)'", part).groups()
        step = re.search(r"step_kernelI([fd])LNS\w+StepE(\d+)E", name)
        dtype = (step or re.search(r"one_launch_kernelI([fd])E", name)).group(1)
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Resources(
                STEPS[int(step.group(2))] if step else "one_launch",
                DTYPES[dtype],
                int(target),
                int(re.search(r"Used (\d+) registers", part).group(1)),
                stack,
                stores + loads,
                int(shared.group(1)) if shared else 0,
            )
        )
    return sorted(found, key=lambda r: (r.dtype, [*STEPS, "one_launch"].index(r.kernel), r.target))


def table(resources: list[Resources]) -> str:
    """Registers a thread by target; what all targets share once."""
    targets = sorted({r.target for r in resources})
    lines = ["| kernel | dtype | " + " | ".join(f"sm_{t}" for t in targets) + " | spills | stack |"]
    lines.append("|---|---|" + "---:|" * (len(targets) + 2))
    for kernel, dtype in dict.fromkeys((r.kernel, r.dtype) for r in resources):
        rows = {r.target: r for r in resources if (r.kernel, r.dtype) == (kernel, dtype)}
        registers = " | ".join(str(rows[t].registers) for t in targets)
        worst = [max(getattr(r, field) for r in rows.values()) for field in ("spills", "stack")]
        lines.append(f"| {kernel} | {dtype} | {registers} | {worst[0]} | {worst[1]} |")
    return "\n".join(lines) + "\n"


def version() -> str:
    return subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[3]


if __name__ == "__main__":
    page = ROOT / "docs" / "cuda.md"
    text = page.read_text()
    made = f"\nRegisters a thread, bytes of spills and stack ({version()}).\n\n{table(compile_all())}\n"
    page.write_text(text[: text.index(BEGIN) + len(BEGIN)] + made + text[text.index(END) :])
