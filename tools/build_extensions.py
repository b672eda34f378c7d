"""The extensions ``vrm_kernels._C`` and ``vrm_kernels._cuda``: built where they can be, on torch's stable ABI.

Where one cannot be built the package is installed without it, and the record beside it says why. Switches, environment
variables of the build alone:

* ``VRM_KERNELS_NO_EXTENSION=1`` builds neither;
* ``VRM_KERNELS_REQUIRE_EXTENSION=1`` makes it an error that ``_C`` cannot be built, whatever the reason;
* ``VRM_KERNELS_CUDA=0`` leaves ``_cuda`` out, ``=1`` makes it an error that it cannot be built.
"""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import cuda_build
from cuda_build import CannotBuild
from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parents[1]
OLDEST_TORCH = "0x020b000000000000"  # 2.11: what the extensions run beside, whatever newer torch they are built beside
OLDEST_PYTHON = "cp310"
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")  # Python without the lock has no stable ABI
MODULES = {"cpp": "vrm_kernels._C", "cuda": "vrm_kernels._cuda"}
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-Wall",
    "-Wno-psabi",  # vectors are passed between inlined functions only
    "-Wno-ignored-attributes",  # alignment of a vector type as a template argument, which is given back on every load
    "-Wno-maybe-uninitialized",  # of GCC 12's own headers of intrinsics ...
    "-Wno-unknown-warning-option",  # ... which Clang does not know
    "-fvisibility=hidden",
    # Neither changes a value: sqrt need not set errno, and floating exceptions are not trapped. Without them the
    # compiler keeps the square roots and the selections of the edge loop scalar.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",  # fused multiply-add, the default of GCC outside ISO mode
]


class Required(RuntimeError):
    """The build was told to have an extension, and cannot."""


def _build_record():
    path = ROOT / "vrm_kernels" / "backends" / "build_record.py"
    spec = importlib.util.spec_from_file_location("build_record", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_record = _build_record()


def settings() -> dict:
    """What setup() is called with. Decides and writes nothing: asking for the version must not cost the record."""
    try:
        from torch.utils.cpp_extension import BuildExtension as Base
    except ImportError:
        Base = build_ext
    options = {"bdist_wheel": {"py_limited_api": OLDEST_PYTHON}} if ABI3 else {}
    if not os.access(ROOT, os.W_OK):
        scratch = tempfile.mkdtemp(prefix="vrm-kernels-")
        options |= {"egg_info": {"egg_base": scratch}, "build": {"build_base": scratch}}
    return {
        # Without sources: BuildExtensions gives them theirs where they can be built.
        "ext_modules": [Extension(name, [], py_limited_api=ABI3) for name in MODULES.values()],
        "cmdclass": {"build_ext": type("BuildExtensions", (_BuildExtensions, Base), {}), "bdist_wheel": _Wheel},
        "options": options,
    }


class _Wheel(bdist_wheel):
    """A wheel without an extension is for every platform, but where the platform is the reason."""

    def get_tag(self):
        package = Path(self.bdist_dir, "vrm_kernels")
        if any(package.glob("_*.so")) or any(package.glob("_*.pyd")):
            return super().get_tag()
        return "py3", "none", super().get_tag()[2] if os.name == "nt" else "any"


class _BuildExtensions:
    """The command build_ext: the failure of one extension costs neither the other nor the package."""

    def run(self):
        temporary = Path(self.build_temp).resolve()
        in_place, extensions = self.inplace, dict(zip(MODULES, self.extensions, strict=True))
        folder = Path(ROOT if in_place else self.build_lib, "vrm_kernels")
        record, built = {}, []
        for backend, name in MODULES.items():
            self._remove_stale(name, folder)
            try:
                reason, self.build_temp = "", str(temporary / backend)
                self._build(backend, extensions[backend], in_place)
                built.append(extensions[backend])
            except CannotBuild as why:
                reason = str(why)
                _refuse_if_required(backend, reason)
                print(_banner(backend, reason), file=sys.stderr)
            sources = build_record.fingerprint(ROOT / "csrc", backend)
            record[backend] = {"reason": reason, "torch": _torch_version(), "sources": sources}
        self.extensions = built
        folder.mkdir(parents=True, exist_ok=True)
        (folder / build_record.NAME).write_text(json.dumps(record, indent=1) + "\n")

    def _remove_stale(self, name: str, folder: Path) -> None:
        """An older build must not pass for this one."""
        for place in {folder, Path(self.build_lib, "vrm_kernels")}:
            for suffix in ("so", "pyd"):
                for stale in place.glob(f"{name.rpartition('.')[2]}.*{suffix}"):
                    stale.unlink()

    def _build(self, backend: str, extension: Extension, in_place: bool) -> None:
        find = _cpp_extension if backend == "cpp" else cuda_build.extension
        vars(extension).update(vars(find(extension.name, ABI3)))
        extension.sources.append("csrc/module.cpp")
        generated = Path(self.build_temp)
        generated.mkdir(parents=True, exist_ok=True)
        header = f'#define VRM_SOURCES "{build_record.fingerprint(ROOT / "csrc", backend)}"\n'
        path = generated / "build_info.h"
        if not path.exists() or path.read_text() != header:
            path.write_text(header)
        extension.include_dirs.insert(0, str(generated))
        # A command line of its own for every torch: ninja then compiles again what another torch's headers gave.
        extension.define_macros += [
            ("TORCH_TARGET_VERSION", OLDEST_TORCH),
            ("VRM_BUILT_BESIDE", _torch_version().replace("+", "_")),
            ("VRM_MODULE", extension.name.rpartition(".")[2]),
            ("VRM_BACKEND", build_record.FOLDERS[backend]),
        ]
        self.compiler, self.inplace, self.extensions = None, in_place, [extension]
        with _output() as lines:
            try:
                super().run()
            except Exception as error:  # whatever a toolchain fails with
                self.inplace = in_place
                raise CannotBuild(_cause(error, lines())) from error

    def get_outputs(self):
        return [*super().get_outputs(), str(Path(self.build_lib, "vrm_kernels", build_record.NAME))]


def _torch_version() -> str:
    try:
        import torch
    except ImportError:
        return ""
    return torch.__version__


def _cpp_extension(name: str, abi3: bool) -> Extension:
    if os.environ.get("VRM_KERNELS_NO_EXTENSION"):
        raise CannotBuild("the build was told to leave it out (VRM_KERNELS_NO_EXTENSION)")
    try:
        from torch.utils.cpp_extension import CppExtension, get_cxx_compiler
    except ImportError as error:
        raise CannotBuild(
            f"torch is needed to build it and is not installed here ({error}); install torch first and build with "
            "--no-build-isolation"
        ) from error
    if os.name == "nt":
        raise CannotBuild("its kernels are written in vector types that GCC and Clang have and MSVC lacks")
    compiler = shlex.split(get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        raise CannotBuild(f"no compiler: {compiler} not found; install GCC or Clang, or set CXX to one")
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    return CppExtension(name, sources, extra_compile_args={"cxx": FLAGS}, py_limited_api=abi3)


def _refuse_if_required(backend: str, reason: str) -> None:
    if backend == "cpp" and os.environ.get("VRM_KERNELS_REQUIRE_EXTENSION"):
        raise Required(f"VRM_KERNELS_REQUIRE_EXTENSION asks for the extension vrm_kernels._C: {reason}")
    if backend == "cuda" and os.environ.get(cuda_build.CHOICE) == "1":
        raise Required(f"{cuda_build.CHOICE}=1 asks for the extension vrm_kernels._cuda: {reason}")


def _banner(backend: str, reason: str) -> str:
    if backend == "cuda":
        return f"vrm_kernels: the backend `cuda` was left out: {reason}"
    line = "!" * 88
    return (
        f"{line}\nvrm_kernels: the fast CPU backend `cpp` was NOT built: {reason}\n"
        f"The pure-PyTorch backend `torch` will be used instead.\n{line}"
    )


@contextlib.contextmanager
def _output():
    """What compilers write, as it is read afterwards: passed on when all is done, and given to the caller as lines."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)

        def lines() -> list[str]:
            sys.stdout.flush(), sys.stderr.flush()
            file.seek(0)
            return file.read().decode(errors="replace").splitlines()

        try:
            yield lines
        finally:
            text = "\n".join(lines())
            for saved, descriptor in zip(kept, (1, 2), strict=True):
                os.dup2(saved, descriptor)
                os.close(saved)
            print(text)


def _cause(error: Exception, lines: list[str]) -> str:
    """The first error that a compiler wrote, or else the exception's own first line."""
    written = (line.strip() for line in lines if re.search(r"\b(fatal|error)\b ?:| not found|No such file", line))
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next(written, said[0] if said else type(error).__name__)
    return f"the compiler failed: {first} (pip install -v shows all of its messages)"
