"""Builds vrm_kernels._C where it can; where it cannot, installs the pure-Python package and says so, loudly."""

import os
import re
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))
import cuda_build  # noqa: E402

REPORT = ROOT / "vrm_kernels" / "_build_report.py"
SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("**/*.cpp") if p.parent.name != "cuda")
HEADERS = sorted(
    str(p.relative_to(ROOT)) for pattern in ("*.h", "*.inl") for p in (ROOT / "csrc").glob(f"**/{pattern}")
)
FLAGS = [
    "-O3",
    "-g0",
    "-Wall",
    "-Wno-psabi",  # vectors are passed between inlined functions only
    "-Wno-ignored-attributes",  # alignment of a vector type as a template argument, which is given back on every load
    "-fvisibility=hidden",
    # Neither changes a value: sqrt need not set errno, and floating exceptions are not trapped. Without them the
    # compiler keeps the square roots and the selections of the edge loop scalar.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",  # fused multiply-add, the default of GCC outside ISO mode
    # at::parallel_for is inlined here and needs it. Not given to the linker: the symbols must come from the OpenMP
    # runtime that torch has loaded, because two runtimes' threads would spin against each other.
    "-fopenmp",
]


def report(reason: str, *copies: Path) -> None:
    """Leaves the reason where describe() finds it: in the source tree, and in ``copies`` made from it before."""
    for path in (REPORT, *copies):
        path.write_text(
            '"""Written by setup.py: why vrm_kernels._C is missing; empty where it was built."""\n\n'
            f"REASON = {reason!r}\n"
        )
    if reason:
        banner = "!" * 88
        print(
            f"{banner}\nvrm_kernels: the fast CPU backend `cpp` was NOT built: {reason}\n"
            f"The pure-PyTorch backend `torch` will be used instead.\n{banner}",
            file=sys.stderr,
        )


def extension():
    """``(ext_modules, cmdclass)`` for setup(), empty where the extension cannot be built."""
    if os.environ.get("VRM_KERNELS_NO_EXTENSION"):  # of the build alone: nothing reads it at run time
        reason = "the build was told to leave it out (VRM_KERNELS_NO_EXTENSION)"
        report(reason)
        cuda_build.leave_out(reason)
        return [], {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
    except ImportError as error:
        reason = (
            f"torch is needed to build it and is not installed here ({error}); "
            "install torch first and build with --no-build-isolation"
        )
        report(reason)
        cuda_build.leave_out(reason)
        return [], {}

    class Build(BuildExtension):
        """Builds what it can: the failure of one extension costs neither the other nor the package."""

        begun = False

        def run(self):
            try:
                super().run()
            except cuda_build.Required:
                raise
            except Exception as error:
                self.give_up(error)
                self.extensions = []

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                # Before it builds anything, torch refuses a toolkit that does not fit it, or the host's compiler.
                cuda = [extension for extension in self.extensions if cuda_build.is_cuda(extension)]
                if self.begun or not cuda:
                    raise
                cuda_build.give_up(error, self.build_lib)
                self.extensions = [extension for extension in self.extensions if extension not in cuda]
                super().build_extensions()

        def build_extension(self, ext):
            self.begun = True
            if cuda_build.is_cuda(ext):
                cuda_build.attempt(super().build_extension, ext, self.build_lib)
                return
            try:
                super().build_extension(ext)
            except Exception as error:  # whatever a toolchain fails with
                self.give_up(error)
                ext.optional = True  # setuptools then does not miss the file

        def give_up(self, error):
            if os.environ.get("VRM_KERNELS_REQUIRE_EXTENSION"):
                raise error
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = f"the compiler {get_cxx_compiler()!r} failed: "
            reason += f"{lines[0] if lines else type(error).__name__} (pip install -v shows its messages)"
            copied = Path(self.build_lib, "vrm_kernels", REPORT.name)
            report(reason, *([copied] if copied.exists() else []))
            for stale in REPORT.parent.glob("_C.*"):  # an older build must not pass for this one
                stale.unlink()

    module = CppExtension("vrm_kernels._C", SOURCES, depends=HEADERS, extra_compile_args={"cxx": FLAGS})
    report("")
    return [module, *cuda_build.extensions()], {"build_ext": Build}


modules, commands = extension()
version = re.search(r'__version__ = "([^"]+)"', (ROOT / "vrm_kernels" / "__init__.py").read_text()).group(1)
setup(version=version, ext_modules=modules, cmdclass=commands)
