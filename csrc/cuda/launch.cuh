// Launches kernels: chooses how the words travel, sizes the grid, reports what CUDA refuses.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "cuda/launch.h"
#include "cuda/step.cuh"
#include "dispatch.h"

namespace fused_ema::cuda {

// A launch copies all of its parameters, used or not, so that most buckets should take the small
// size; the large one is CUDA's limit of 32764 bytes, in whole words.
constexpr int small = 4096;
constexpr int large = 32760;

inline void check(cudaError_t error, const char* task) {
  if (error == cudaSuccess) return;
  // else whoever asks CUDA next, torch perhaps, would be told of this error again
  cudaGetLastError();
  throw std::runtime_error(std::string("CUDA refuses ") + task + ": " + cudaGetErrorString(error));
}

// Blocks that the GPU runs at a time.
template <class Function>
int resident_blocks(Function* kernel, int device) {
  static std::mutex mutex;
  static std::map<std::pair<Function*, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{kernel, device}];
  if (blocks == 0) {
    int multiprocessors = 0, each = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
          "to count multiprocessors");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0),
          "to load the step kernel");
    blocks = multiprocessors * each;
  }
  return blocks;
}

template <int bytes>
void launch_sized(void (*kernel)(Parameters<bytes>), const Launch& launch) {
  Parameters<bytes> parameters;
  parameters.task = {launch.chunks,    launch.num_chunks, launch.slots,    launch.scalars,
                     launch.words,     launch.control,    launch.ratios,   launch.arrivals,
                     launch.num_slots, launch.num_rows,   launch.num_emas, launch.row_size,
                     launch.ema_before};
  if (launch.words == nullptr)
    std::memcpy(parameters.words, launch.host_words, launch.num_words * sizeof(int64_t));
  void* arguments[] = {&parameters};
  const int64_t blocks =
      persistent ? std::min<int64_t>(launch.num_chunks, resident_blocks(kernel, launch.device))
                 : launch.num_chunks;
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments, 0,
                         static_cast<cudaStream_t>(launch.stream)),
        "to launch the step kernel");
}

// Whether a launch needs the large parameters.
inline bool is_large(const Launch& launch) {
  const bool by_value = launch.words == nullptr;
  if (by_value && !fits(launch.num_words))
    throw std::runtime_error("too many words to pass by value");
  return by_value && launch.num_words > Parameters<small>::capacity;
}

template <class Rule, class Layout, EmaFormat format>
void launch_step(const Launch& launch) {
  if (launch.num_chunks == 0) return;
  const bool needs_large = is_large(launch);
  if constexpr (Chunk<Rule, Layout, format>::rounds)  // many already: they take one size
    launch_sized<large>(step<Rule, Layout, format, large>, launch);
  else if (needs_large)
    launch_sized<large>(step<Rule, Layout, format, large>, launch);
  else
    launch_sized<small>(step<Rule, Layout, format, small>, launch);
}

template <bool rounds, class Rule, class Layout>
KernelInfo find_format(EmaFormat ema_format) {
  KernelInfo found;
  with_format<Layout>(ema_format, [&](auto format) {
    if constexpr (Chunk<Rule, Layout, format.value>::rounds == rounds)
      found = {launch_step<Rule, Layout, format.value>, int{Rule::scalars.size()}};
  });
  return found;
}

// The kernel for a rule, among those that round by random bits or among the others: two files
// compile them, at the same time.
template <bool rounds>
KernelInfo find_kernel_that(const RuleId& rule, Storage storage) {
  KernelInfo found;
  with_rule(AllRules{}, rule, [&](auto candidate) {
    using Rule = decltype(candidate);
    with_layout<Rule>(storage, [&](auto layout) {
      found = find_format<rounds, Rule, decltype(layout)>(storage.ema_format);
    });
  });
  return found;
}

KernelInfo find_rounding_kernel(const RuleId& rule, Storage storage);

}  // namespace fused_ema::cuda
