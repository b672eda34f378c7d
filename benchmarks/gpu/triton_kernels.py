"""What the Triton kernels compile to, for GPUs that are not here: registers, spills and shared memory, and faults.

``python -m benchmarks.gpu.triton_kernels`` prints the table; ``--write`` puts it into docs/triton.md. The kernels and
their meta-parameters are those of real calls, recorded on tensors without data instead of being launched.
"""

import argparse
import contextlib
import importlib
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from benchmarks.gpu.triton_faults import faults
from benchmarks.report.table import rewrite
from vrm_kernels.backends.contract import GraphSettings, LossSettings, ShareSettings, Sides, Views
from vrm_kernels.backends.triton import counting, dense_launches
from vrm_kernels.backends.triton.backend import TritonBackend
from vrm_kernels.graph import selection
from vrm_kernels.graph.constants import RELATION_EPS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "triton.md"
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A GPU to compile for. ``shared`` is what one block may have of shared memory, bytes."""

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int

    @property
    def gpu(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.warp)


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 * 1024),
    Target("sm_90", "cuda", 90, 32, 227 * 1024),
    Target("sm_100", "cuda", 100, 32, 227 * 1024),
    Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
)


@dataclass(frozen=True)
class Call:
    """One call of the backend, whose launches are compiled."""

    batch: int
    classes: int
    dtype: torch.dtype
    percentile: float = 30.0
    complete: bool = False
    need_grad: bool = True
    precision: str = "highest"
    relation: bool = False
    share: bool = False


CALLS = (
    Call(64, 100, torch.float32),
    Call(512, 200, torch.float32),
    Call(64, 1000, torch.float32, complete=True),
    Call(64, 100, torch.bfloat16, need_grad=False),
    Call(64, 100, torch.float64, 100.0, complete=True),
    Call(64, 100, torch.float32, relation=True),
    Call(1024, 1000, torch.float32),
    Call(1024, 1000, torch.float32, 100.0, complete=True, precision="high"),
    Call(4096, 1000, torch.bfloat16),
    Call(1024, 1000, torch.float64),
    Call(8192, 100, torch.bfloat16),
    Call(65536, 1000, torch.bfloat16),
    Call(1024, 21841, torch.bfloat16),
    Call(16384, 100, torch.float32, complete=True),
    Call(64, 100, torch.float32, share=True),
    Call(2048, 1000, torch.float32, share=True),
    Call(256, 100, torch.float64, share=True),
)


@dataclass(frozen=True)
class Launch:
    """A kernel as it is compiled: everything but the values of its arguments."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str | tuple], ...]  # a structure's argument has the structure's types
    constants: tuple[tuple[tuple[int, ...], object], ...]  # where among the arguments, and what
    divisible: tuple[tuple[int, ...], ...]  # where multiples of 16 are
    options: tuple[tuple[str, int], ...]
    # The largest values of its integers, and of its program ids, in any of the calls.
    bounds: tuple[tuple[str, int], ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        return self.kernel.removesuffix("_kernel")

    @property
    def named_constants(self) -> dict[str, object]:
        return {self.signature[path[0]][0]: value for path, value in self.constants if len(path) == 1}

    @property
    def dtype(self) -> str:
        """Of its numbers, where they are not float32."""
        return next((kind[1:] for kind in _flat(self.signature) if kind in ("*fp64", "*bf16", "*fp16")), "fp32")

    @property
    def label(self) -> str:
        """The kernel and those of its constants that tell its variants apart."""
        constants = self.named_constants.items()
        flags = [name for name, value in constants if value is True]
        numbers = [
            f"{n}={v}" for n, v in constants if n in ("PASS", "TERMS", "PRECISION", "GRAPHS", "LEVELS", "PARTS_1")
        ]
        return " ".join([self.name, self.dtype, *numbers, *flags])


def _flat(x) -> Iterator[str]:
    if isinstance(x, tuple):
        for part in x:
            yield from _flat(part)
    else:
        yield x


@dataclass(frozen=True)
class Resources:
    """``registers`` of a thread (vector ones on AMD), ``spilled`` bytes of its stack, ``shared`` bytes of a block."""

    registers: int
    spilled: int
    shared: int

    def occupancy(self, warps: int, shared_of_multiprocessor: int) -> float:
        """The share of an NVIDIA multiprocessor's 64 warps that blocks of so many can be, by registers and memory."""
        of_block = 32 * warps * -(-self.registers // 8) * 8
        blocks = min(64 // warps, 2**16 // of_block, shared_of_multiprocessor // (self.shared + 1024))
        return blocks * warps / 64


def recorded(calls=CALLS) -> list[Launch]:
    """The different launches of ``calls``, in their order."""
    launches: dict[Launch, Launch] = {}

    def record(kernel, *args, grid, warmup, **options):
        launch = _launch(kernel, args, options)
        bounds = dict(launches.get(launch, launch).bounds)
        values = dict(zip(kernel.arg_names, args, strict=False)) | {x: n - 1 for x, n in zip("xyz", grid, strict=False)}
        for name, value in values.items():
            if isinstance(value, int) and not isinstance(value, bool):
                bounds[name] = max(bounds.get(name, 0), value)
        launches[launch] = replace(launch, bounds=tuple(bounds.items()))

    before = torch.get_float32_matmul_precision()
    patches = (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(counting, "product", lambda x, y, out: None),
        mock.patch.object(dense_launches, "product", lambda x, y, out: None),
    )
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            for call in calls:
                torch.set_float32_matmul_precision(call.precision)
                _make(call)
    finally:
        torch.set_float32_matmul_precision(before)
    return list(launches.values())


def _make(call: Call) -> None:
    logits = [torch.empty(call.batch, call.classes, dtype=call.dtype, device="meta") for _ in range(4)]
    backend = TritonBackend()
    if call.share:
        _make_share(backend, call, *logits)
    elif call.relation:
        probs = tuple(torch.empty(call.batch, 10, device="meta") for _ in range(2))
        settings = GraphSettings(call.percentile, 1.0, RELATION_EPS, False)
        backend.relation_graph(Sides(*logits), probs, settings, call.need_grad)
    else:
        settings = LossSettings(16.0, 8.0, True, True, call.percentile, 1.0, RELATION_EPS, call.complete, 0.1, -100)
        labels = torch.empty(call.batch, dtype=torch.int64, device="meta")
        backend.vrm_loss(Views(*logits), labels, None, settings, call.need_grad)


def _make_share(backend: TritonBackend, call: Call, a, b, teacher_a, teacher_b) -> None:
    """What a process of two does for the graph over samples: the first half of them, with all."""
    own = slice(call.batch // 2)
    entropy = None
    if call.percentile < 100:
        entropy = backend.entropy_of_logs(a[own], b)
        for shift, bits in selection.digits(8 * call.dtype.itemsize):
            backend.count_digits(entropy, torch.empty(2, dtype=torch.int64, device="meta"), shift, bits)
    numbers = (torch.empty((), dtype=dtype, device="meta") for dtype in (call.dtype, torch.int64))
    grads = [torch.empty_like(x) for x in (a[own], b)] if call.need_grad else ()
    settings = ShareSettings(*numbers, call.batch**2, 16.0, 1.0, RELATION_EPS, call.complete)
    backend.relation_share(Sides(a[own], b, teacher_a[own], teacher_b), None, entropy, settings, grads)


def _launch(kernel: JITFunction, args: tuple, options: dict) -> Launch:
    """What Triton would specialise the kernel to: dtypes, 64-bit integers, ones, and multiples of 16."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    constants, divisible = [], []

    def kind(path: tuple[int, ...], value, constant: bool, specialize: bool):
        if constant or value is None or (type(value) is int and value == 1 and specialize):
            constants.append((path, value))
            return "constexpr"
        if isinstance(value, tuple):
            parts = [kind((*path, k), part, False, True) for k, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, torch.Tensor):
            divisible.append(path)
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and specialize:
            divisible.append(path)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = tuple(
        (x.name, kind((k,), values.pop(x.name), x.is_constexpr, not x.do_not_specialize))
        for k, x in enumerate(kernel.params)
    )
    rest = tuple(sorted(values.items()))
    return Launch(kernel.fn.__module__, kernel.__name__, signature, tuple(constants), tuple(divisible), rest)


def source_of(launch: Launch) -> ASTSource:
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    attributes = {path: [["tt.divisibility", 16]] for path in launch.divisible}
    return ASTSource(kernel, dict(launch.signature), dict(launch.constants), attributes)


def compile_launch(launch: Launch, target: Target) -> tuple[Resources, list[str]]:
    """What it needs, and what is wrong with it."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        compiled = triton.compile(source_of(launch), target=target.gpu, options=dict(launch.options))
    used = _of_cubin(compiled.asm["cubin"]) if target.backend == "cuda" else _of_amdgcn(compiled.asm["amdgcn"])
    found = faults(
        compiled.asm["ttir"], compiled.asm["ttgir"], launch.named_constants.get("PRECISION"), dict(launch.bounds)
    )
    return Resources(*used, compiled.metadata.shared), found + [str(warning.message) for warning in told]


class _Lowered(Exception):
    pass


def faults_of(source: ASTSource, target: Target, options: dict, precision=None, bounds=None) -> list[str]:
    """What is wrong with a kernel, which is compiled as far as that takes: not to machine code."""
    texts = {}
    backend = type(make_backend(target.gpu))
    add_stages = backend.add_stages

    def kept(name, stage):
        def run(module, metadata):
            module = stage(module, metadata)
            texts[name] = str(module)
            return module

        return run

    def stop(module, metadata):
        raise _Lowered

    def first_stages(self, stages, *args):
        add_stages(self, stages, *args)
        stages |= {name: kept(name, stages[name]) for name in ("ttir", "ttgir")} | {"llir": stop}

    with (
        warnings.catch_warnings(record=True) as told,
        contextlib.suppress(_Lowered),
        mock.patch.object(backend, "add_stages", first_stages),
        tempfile.TemporaryDirectory() as folder,  # what was compiled before would not pass through the stages
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
    ):
        warnings.simplefilter("always")
        triton.compile(source, target=target.gpu, options=options)
    return faults(texts["ttir"], texts["ttgir"], precision, bounds) + [str(warning.message) for warning in told]


def faults_of_launch(launch: Launch, target: Target) -> list[str]:
    precision = launch.named_constants.get("PRECISION")
    return faults_of(source_of(launch), target, dict(launch.options), precision, dict(launch.bounds))


def _of_cubin(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _of_amdgcn(text: str) -> tuple[int, int]:
    found = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)", text)}
    return found["vgpr_count"], 4 * found["vgpr_spill_count"]


def compile_all(
    launches: Sequence[Launch], target: Target, workers: int = 2, what: Callable = compile_launch
) -> Iterator[tuple[Launch, object]]:
    """``launches`` compiled in ``workers`` processes: what ``what`` says of each."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from zip(launches, pool.map(what, launches, [target] * len(launches)), strict=True)


def kinds(launches: Sequence[Launch], same: Callable[[Launch], object]) -> list[Launch]:
    """One of each kind, of those that are the ``same`` the one that does most."""

    def constants(launch: Launch) -> tuple:
        values = launch.named_constants.values()
        return sum(x is True for x in values), sum(x for x in values if type(x) is int)

    chosen: dict[object, Launch] = {}
    for launch in launches:
        key = same(launch)
        if key not in chosen or constants(launch) > constants(chosen[key]):
            chosen[key] = launch
    return list(chosen.values())


def table(rows: list[tuple[Launch, Target, Resources]]) -> str:
    """Of each kernel and target the variant with the most registers, the most spills and the most shared memory."""
    lines = [
        f"Triton {triton.__version__}. Registers a thread / bytes spilled a thread / bytes of shared memory a block, "
        "the largest of each over the variants.",
        "",
        "| kernel | variants | " + " | ".join(target.name for target in TARGETS) + " |",
        "|---|---:|" + "---:|" * len(TARGETS),
    ]
    for kernel in dict.fromkeys(launch.name for launch, _, _ in rows):
        cells = []
        for target in TARGETS:
            mine = [r for launch, t, r in rows if t == target and launch.name == kernel]
            worst = [str(max((getattr(r, k) for r in mine), default="")) for k in ("registers", "spilled", "shared")]
            cells.append(" / ".join(worst) if mine else "not used")
        variants = len([1 for launch, t, _ in rows if t == TARGETS[0] and launch.name == kernel])
        lines.append(f"| `{kernel}` | {variants} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.triton_kernels", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/triton.md")
    parser.add_argument("--all", action="store_true", help="print every variant")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    rows = []
    compiled = ((target, *result) for target in TARGETS for result in compile_all(recorded(), target, args.workers))
    for target, launch, (resources, found) in compiled:
        rows.append((launch, target, resources))
        for fault in found:
            print(f"{target.name} {launch.label}: {fault}", flush=True)
        if args.all:
            print(
                f"{target.name:8}{resources.registers:5}{resources.spilled:6}{resources.shared:8}  {launch.label}",
                flush=True,
            )
    text = table(rows)
    print(text)
    if args.write:
        rewrite(DOCUMENT, text, BEGIN, END)


if __name__ == "__main__":
    main()
