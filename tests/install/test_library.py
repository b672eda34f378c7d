"""The library that is shipped calls C functions of torch's stable ABI, and nothing of its C++."""

import re
import shutil
import subprocess

import pytest
import source_tree

LIBRARY = source_tree.ROOT / "vrm_kernels" / "_C.abi3.so"
# One that torch's ahead-of-time compiler calls, and one of torch 2.13: both may be missing.
WEAK = {"aoti_torch_cpu_addmm_out", "torch_exception_get_what_without_backtrace"}


@pytest.fixture(scope="module")
def undefined() -> list[tuple[str, str]]:
    """``(kind, symbol)``, without those of the C and C++ libraries, which have versions."""
    if not LIBRARY.exists() or shutil.which("nm") is None:
        pytest.skip("no library here, or nothing to look into it with")
    text = subprocess.run(["nm", "-D", "-u", LIBRARY], capture_output=True, text=True, check=True).stdout
    return [tuple(line.split()) for line in text.splitlines() if "@" not in line]


def test_it_calls_no_cxx_of_torchs(undefined):
    assert not [symbol for _, symbol in undefined if re.match(r"_ZNK?(2at|3c10|5torch|5caffe)", symbol)]
    assert len([symbol for _, symbol in undefined if re.match("aoti_torch_|torch_", symbol)]) > 20


def test_it_brings_no_threads_of_its_own(undefined):
    """Two runtimes' threads would spin against each other."""
    assert not [symbol for _, symbol in undefined if re.match("GOMP|omp_|__kmpc", symbol)]


def test_what_is_not_stable_may_be_missing(undefined):
    assert {symbol for kind, symbol in undefined if kind in "wv" and "torch" in symbol} == WEAK


def test_it_uses_the_stable_part_of_pythons_interface(undefined):
    assert {symbol for _, symbol in undefined if symbol.startswith(("Py", "_Py"))} == {"PyModule_Create2"}
