// The Python module vrm_kernels._C: what was built, and what this processor runs of it. The operators are in ops.cpp.
#include "relation_graph.h"
#include "stages.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#if defined(__clang__)
#define VRM_COMPILER "Clang " __clang_version__
#else
#define VRM_COMPILER "GCC " __VERSION__
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of vrm_kernels: its operators are in torch.ops.vrm_kernels.";
  m.def("isa", [] { return std::string(vrm::current_isa()); }, "The instruction set that the CPU kernels use.");
  m.def(
      "build_info",
      [] { return std::string("fused kernels, using ") + vrm::current_isa() + " (built by " VRM_COMPILER ")"; },
      "One line for describe().");
  m.def(
      "take_stage_seconds",
      [] {
        pybind11::dict seconds;
        for (int k = 0; k < static_cast<int>(vrm::Stage::count); ++k)
          seconds[vrm::kStageNames[k]] = 1e-9 * static_cast<double>(vrm::stage_nanoseconds[k].exchange(0));
        return seconds;
      },
      "Seconds spent in each stage of the CPU kernels since the last call, summed over graphs.");
  m.def(
      "set_edges_form",
      [](const std::string& form) {
        using vrm::EdgesForm;
        if (form != "measured" && form != "kept_only" && form != "dense")
          throw std::invalid_argument("the form is 'measured', 'kept_only' or 'dense', not '" + form + "'");
        vrm::set_edges_form(form == "dense"       ? EdgesForm::dense
                            : form == "kept_only" ? EdgesForm::kept_only
                                                  : EdgesForm::measured);
      },
      pybind11::arg("form"), "For tests and measurements: how the CPU kernels visit the edges from now on.");
  m.def(
      "select_isa",
      [](const std::string& isa) {
        if (!vrm::select_isa(isa.c_str())) throw std::invalid_argument("this processor does not run '" + isa + "'");
      },
      pybind11::arg("isa"), "For tests: use 'avx512', 'avx2' or 'portable' from now on; '' goes back to the best.");
}
