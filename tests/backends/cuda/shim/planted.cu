// Kernels with a fault each, which the emulation has to find, and their sound counterpart.

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace planted {

enum Fault {
  none,
  missing_barrier,
  write_past_end,
  shared_past_end,
  unwritten,
  divergent_barrier,
  between_blocks,
  missing_warp_barrier,
  part_of_a_warp,
  read_before_start,
  write_after_read,
  unwritten_output,
  plain_read_of_a_sum,
  hidden_by_an_atomic,
  hidden_by_own_read
};

// Reverses 64 values through shared memory, which needs a barrier.
__global__ void reverse(const float* in, float* out, int fault) {
  float* shared = reinterpret_cast<float*>(shim::shared_memory());
  const unsigned t = threadIdx.x, n = blockDim.x;
  if (fault != unwritten || t != 7)
    shared[fault == shared_past_end && t + 1 == n ? n : t] = in[fault == read_before_start ? t - 1 : t];
  if (fault != missing_barrier && (fault != divergent_barrier || t < 32)) __syncthreads();
  if (fault != unwritten_output || t != 9) out[fault == write_past_end && t == 5 ? n : t] = shared[n - 1 - t];
  if (fault == write_after_read) shared[t] = 0;
}

// Neighbours of a warp change places.
__global__ void swap_lanes(float* x, int fault) {
  float* shared = reinterpret_cast<float*>(shim::shared_memory());
  const unsigned t = threadIdx.x;
  shared[t] = x[t];
  if (fault != missing_warp_barrier) __syncwarp();
  x[t] = shared[t ^ 1];
  if (fault == part_of_a_warp && t < 32) __shfl_xor_sync(0xffffu, x[t], 1);
}

// Every block adds one: two blocks need an atomic for it.
__global__ void count_blocks(float* x, int fault) {
  if (threadIdx.x != 0) return;
  if (fault == between_blocks)
    x[0] += 1;
  else
    atomicAdd(x, 1.0f);
}

// Every thread adds one to a count in shared memory, and all read it, with a barrier before and after.
__global__ void count_threads(float* x, int fault) {
  float* shared = reinterpret_cast<float*>(shim::shared_memory());
  if (threadIdx.x == 0) shared[0] = 0;
  if (fault == hidden_by_an_atomic && threadIdx.x == 0) atomicAdd(shared, 0.0f);  // atomics do not race with each other
  if (fault != hidden_by_an_atomic) __syncthreads();
  atomicAdd(shared, 1.0f);
  if (fault != plain_read_of_a_sum) __syncthreads();
  const float count = shared[0];
  __syncwarp();
  // Its own warp has read it, and so has the other one.
  if (fault == hidden_by_own_read && threadIdx.x == 0) shared[0] = 0;
  __syncthreads();
  if (threadIdx.x == 1) x[1] += count;
}

}  // namespace planted

// 0 and the results in x [64] if the emulation found nothing, else 1 and what it found in `message` [256].
extern "C" int cuda_shim_planted(int fault, float* x, char* message) {
  float in[64];
  for (int k = 0; k < 64; ++k) in[k] = static_cast<float>(k);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1), config.blockDim = dim3(64), config.dynamicSmemBytes = 64 * sizeof(float);
  message[0] = 0;
  shim::expect_buffer(in, sizeof(in), shim::Access::initialised);
  shim::expect_buffer(x, 64 * sizeof(float), shim::Access::output);
  try {
    cudaLaunchKernelEx(&config, planted::reverse, in, x, fault);
    if (fault != planted::unwritten_output) {
      cudaLaunchKernelEx(&config, planted::swap_lanes, x, fault);
      cudaLaunchKernelEx(&config, planted::count_threads, x, fault);
      config.gridDim = dim3(3);
      cudaLaunchKernelEx(&config, planted::count_blocks, x, fault);
    }
    shim::forget_buffers();
  } catch (const std::runtime_error& error) {
    std::string(error.what()).copy(message, 255);
    message[std::min<size_t>(255, std::strlen(error.what()))] = 0;
  }
  return message[0] != 0;
}
