// The Python modules vrm_kernels._C and vrm_kernels._cuda: both are empty, and importing one registers its operators.
// They also say what they were built from. The build gives VRM_MODULE, the module's name, and VRM_BACKEND, its
// operators' prefix.
#if defined(Py_LIMITED_API)
#undef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include "build_info.h"  // written by tools/build_extensions.py
#include "stable.h"

#if defined(__clang__)
#define VRM_COMPILER "Clang " __clang_version__
#elif defined(__GNUC__)
#define VRM_COMPILER "GCC " __VERSION__
#else
#define VRM_COMPILER "MSVC"
#endif

#define VRM_JOIN_(a, b) a##b
#define VRM_JOIN(a, b) VRM_JOIN_(a, b)
#define VRM_TEXT_(a) #a
#define VRM_TEXT(a) VRM_TEXT_(a)

namespace {
std::vector<std::string> built_from() { return {VRM_SOURCES, VRM_COMPILER}; }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vrm_kernels, m) {
  m.def(VRM_TEXT(VRM_BACKEND) "_built_from() -> str[]");  // the fingerprint of the sources, the compiler
}

STABLE_TORCH_LIBRARY_IMPL(vrm_kernels, CompositeExplicitAutograd, m) {
  m.impl(VRM_TEXT(VRM_BACKEND) "_built_from", TORCH_BOX(&built_from));
}

PyMODINIT_FUNC VRM_JOIN(PyInit_, VRM_MODULE)() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, VRM_TEXT(VRM_MODULE), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
