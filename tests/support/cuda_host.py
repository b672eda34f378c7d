"""The `cuda` backend's sources compiled for the host, with tests/backends/cuda/shim in the place of CUDA.

Everything of csrc/cuda runs: kernels, launches and the binding, on CPU tensors, as the backend "cuda_host".
"""

import ctypes
import functools
import hashlib
import importlib
import shutil
import subprocess
import sys
import sysconfig
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

from vrm_kernels.backends import build_record
from vrm_kernels.backends.registry import Entry

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from build_extensions import OLDEST_TORCH  # noqa: E402

SHIM = ROOT / "tests" / "backends" / "cuda" / "shim"
CUDA = ROOT / "csrc" / "cuda"
NAME = "cuda_host"
COMPILER = shutil.which("g++")

FLAGS = ["-fPIC", "-O2", "-g0", "-Wall", "-Werror", "-Wno-unknown-pragmas", f"-I{SHIM / 'include'}"]
KERNEL = ["-std=c++17", "-fsanitize=thread", "-x", "c++"]  # for the calls before every access; see shim.cpp


def _units(folder: Path) -> list[tuple[Path, list[str]]]:
    includes = [f"-isystem{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    stable = ["-std=c++20", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", *includes]
    return [
        (ROOT / "csrc" / "module.cpp", ["-DVRM_MODULE=_cuda", "-DVRM_BACKEND=cuda", f"-I{folder}", *stable]),
        (CUDA / "operators.cpp", stable),
        (CUDA / "forms.cu", KERNEL),
        (CUDA / "steps" / "binding.cpp", stable),
        (CUDA / "steps" / "relation_graphs.cu", KERNEL),
        (SHIM / "planted.cu", KERNEL),
        (SHIM / "shim.cpp", ["-std=c++17"]),
        (SHIM / "workspace.cpp", ["-std=c++17"]),
    ]


def _fingerprint() -> str:
    state = hashlib.sha256(torch.__version__.encode())
    state.update(subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout)
    folders = (CUDA, SHIM, SHIM / "include")
    sources = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    for path in sorted({*sources, *(ROOT / "csrc").glob("*.*"), Path(__file__)}):
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


def _run(command: list) -> None:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"


def build() -> Path:
    """The library, from build/ if its sources have not changed. One of the test workers builds it for all."""
    folder = ROOT / "build" / "cuda_host" / _fingerprint()
    library = folder / "libvrm_cuda_host.so"
    folder.mkdir(parents=True, exist_ok=True)
    import fcntl  # where there is a g++ to build with

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(folder, library)
    return library


def _build(folder: Path, library: Path) -> None:
    sources = build_record.fingerprint(ROOT / "csrc", "cuda")
    (folder / "build_info.h").write_text(f'#define VRM_SOURCES "{sources}"\n')

    def compile_unit(unit):
        source, flags = unit
        target = folder / f"{source.stem}.o"
        _run([COMPILER, *FLAGS, *flags, "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, _units(folder)))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    unfinished = folder / "unfinished.so"
    _run([COMPILER, "-shared", *objects, *libraries, "-ltorch_cpu", "-lc10", "-o", unfinished])
    unfinished.rename(library)


def backend() -> Entry:
    implementation = "vrm_kernels.backends.cuda.backend:CudaBackend"
    return Entry(NAME, implementation, ("cpu",), lambda device=None: (True, "the CUDA sources on the host"))


@functools.cache
def load() -> ctypes.CDLL:
    """Builds it and loads its operators, which are those of the extension vrm_kernels._cuda."""
    path = build()
    torch.ops.load_library(path)
    sys.modules["vrm_kernels._cuda"] = types.ModuleType("vrm_kernels._cuda")
    try:
        importlib.import_module("vrm_kernels.backends.cuda.backend")
    finally:
        del sys.modules["vrm_kernels._cuda"]
    library = ctypes.CDLL(str(path))
    for count in (library.cuda_shim_launches, library.cuda_shim_kernels, library.cuda_shim_multiply_adds):
        count.restype = ctypes.c_int64
    library.cuda_shim_set_order.argtypes = [ctypes.c_uint64]
    library.cuda_shim_workspace.restype = ctypes.c_int64
    sizes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int, *[ctypes.c_int64] * 3]
    library.cuda_shim_workspace.argtypes = [*sizes, ctypes.POINTER(ctypes.c_int64), ctypes.c_int]
    return library


def launches_run(library) -> list[str]:
    """The kernels launched since ``cuda_shim_forget_kernels``, each by its name with its template arguments."""
    room = library.cuda_shim_kernels(None, 0)
    names = ctypes.create_string_buffer(room + 1)
    library.cuda_shim_kernels(names, ctypes.c_int64(room))
    return names.value.decode().splitlines()


def kernels_run(library) -> set[str]:
    return set(launches_run(library))
