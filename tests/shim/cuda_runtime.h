// Stands in for CUDA's header of this name: csrc/cuda as ordinary C++, on the CPU's memory.
//
// The threads of a block run in turns (see block.h), the blocks of a launch one after the other; a
// launch has ended when it returns. There is one GPU, which runs three blocks at a time, and every
// stream but `broken_stream` works.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "block.h"

#define CUDART_VERSION 0
#define __CUDA_ARCH_LIST__
#define __device__
#define __global__
#define __grid_constant__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __builtin_assume(condition) static_cast<void>(condition)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// CUDA's compiler lets them stand for any 8 and 16 bytes.
struct alignas(8) [[gnu::may_alias]] uint2 {
  uint32_t x, y;
};

struct alignas(16) [[gnu::may_alias]] uint4 {
  uint32_t x, y, z, w;
};

inline thread_local dim3 gridDim, blockIdx, threadIdx;

enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice, cudaErrorInvalidResourceHandle };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = struct Stream*;

namespace shim {

inline const cudaStream_t broken_stream = reinterpret_cast<cudaStream_t>(1);
inline cudaError_t last_error = cudaSuccess;
inline std::vector<size_t> launches;               // the bytes of their parameters
inline std::vector<std::vector<char>> parameters;  // the first bytes of each
inline bool capturing = false;                     // launches are put down, and do not run
inline std::vector<std::function<void()>> captured;
inline int64_t accesses = 0;  // of tensors, as far as the kernel tells __isGlobal

inline cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace shim

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = shim::last_error;
  shim::last_error = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid resource handle";
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = 3;
  return shim::result(device <= 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

template <class Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters), dim3 grid, dim3 block, void** arguments,
                             size_t, cudaStream_t stream) {
  if (stream == shim::broken_stream) return shim::result(cudaErrorInvalidResourceHandle);
  shim::launches.push_back(sizeof(Parameters));
  const auto* bytes = static_cast<const char*>(arguments[0]);
  shim::parameters.emplace_back(bytes, bytes + std::min<size_t>(sizeof(Parameters), 64));
  const auto run = [=](const Parameters& parameters) {
    gridDim = grid;
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
      shim::block.run(
          block.x, [](unsigned thread) { threadIdx.x = thread; }, [&] { kernel(parameters); });
  };
  const auto& parameters = *static_cast<const Parameters*>(arguments[0]);
  if (shim::capturing)
    shim::captured.push_back([=] { run(parameters); });
  else
    run(parameters);
  return cudaSuccess;
}

inline void __threadfence() {}

template <class T>
T atomicAdd(T* address, T value) {
  return std::exchange(*address, *address + value);
}

inline bool __isGlobal(const void*) {
  ++shim::accesses;
  return true;
}

inline void __syncthreads() { shim::block.wait(); }
