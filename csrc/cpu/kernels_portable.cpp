// The CPU kernels for any processor: 16-byte registers, which SSE2 and NEON have.
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#define VRM_ISA_NAMESPACE portable
#define VRM_VECTOR_BYTES 16
#define VRM_PANEL_ROWS 4
#include "kernels.inl"

namespace vrm {
const Kernels<float>* kernels_f32_portable() { return portable::kernels<float>(); }
const Kernels<double>* kernels_f64_portable() { return portable::kernels<double>(); }
}  // namespace vrm
