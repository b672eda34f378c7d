// The Python module vrm_kernels._C, which is empty: importing it registers the operators. And what it was built from.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "../stable.h"
#include "build_info.h"  // written by tools/build_extensions.py

#if defined(__clang__)
#define VRM_COMPILER "Clang " __clang_version__
#else
#define VRM_COMPILER "GCC " __VERSION__
#endif

namespace {
std::vector<std::string> cpu_built_from() { return {VRM_SOURCES, VRM_COMPILER}; }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vrm_kernels, m) {
  m.def("cpu_built_from() -> str[]");  // the fingerprint of the sources, the compiler
}

STABLE_TORCH_LIBRARY_IMPL(vrm_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_built_from", TORCH_BOX(&cpu_built_from));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
