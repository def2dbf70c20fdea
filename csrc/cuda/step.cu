// Launches the kernel: chooses how the words travel, sizes the grid, reports what CUDA refuses.
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "cuda/squares.cuh"
#include "cuda/step.cuh"
#include "dispatch.h"

namespace fused_ema::cuda {

namespace {

// A launch copies all of its parameters, used or not, so that most buckets should take the small
// size; the large one is CUDA's limit of 32764 bytes, in whole words.
constexpr int small = 4096;
constexpr int large = 32760;

void check(cudaError_t error, const char* task) {
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

template <class Rule, class Layout, int bytes>
void launch_sized(const Launch& launch) {
  Parameters<bytes> parameters;
  parameters.task = {launch.chunks,   launch.num_chunks, launch.slots,     launch.scalars,
                     launch.words,    launch.control,    launch.num_slots, launch.num_rows,
                     launch.num_emas, launch.ema_before};
  if (launch.words == nullptr)
    std::memcpy(parameters.words, launch.host_words, launch.num_words * sizeof(int64_t));
  void* arguments[] = {&parameters};
  const auto kernel = step<Rule, Layout, bytes>;
  const int64_t blocks =
      std::min<int64_t>(launch.num_chunks, resident_blocks(kernel, launch.device));
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments, 0,
                         static_cast<cudaStream_t>(launch.stream)),
        "to launch the step kernel");
}

template <class Rule, class Layout>
void launch_step(const Launch& launch) {
  if (launch.num_chunks == 0) return;
  const bool by_value = launch.words == nullptr;
  if (by_value && !fits(launch.num_words))
    throw std::runtime_error("too many words to pass by value");
  if (by_value && launch.num_words > Parameters<small>::capacity)
    launch_sized<Rule, Layout, large>(launch);
  else
    launch_sized<Rule, Layout, small>(launch);
}

template <class Stored, int num_words>
void launch_squares_sized(const SquaresLaunch& launch) {
  GradParameters<num_words> parameters;
  parameters.task = {launch.chunks,
                     launch.num_chunks,
                     launch.slots,
                     launch.slot_size,
                     launch.words != nullptr ? launch.words + launch.grads_at : nullptr,
                     launch.sums};
  if (launch.words == nullptr)
    std::memcpy(parameters.grads, launch.host_words + launch.grads_at,
                launch.num_slots * sizeof(int64_t));
  void* arguments[] = {&parameters};
  const auto blocks = static_cast<unsigned>(sums_of(launch.num_chunks) / threads);
  check(cudaLaunchKernel(squares<Stored, num_words>, dim3(blocks), dim3(threads), arguments, 0,
                         static_cast<cudaStream_t>(launch.stream)),
        "to launch the squares kernel");
}

template <class Stored>
void launch_squares(const SquaresLaunch& launch) {
  if (launch.num_chunks == 0) return;
  constexpr int few = Parameters<small>::capacity;
  if (launch.words == nullptr && launch.num_slots > few)
    launch_squares_sized<Stored, Parameters<large>::capacity>(launch);
  else
    launch_squares_sized<Stored, few>(launch);
}

}  // namespace

int version() { return CUDART_VERSION; }

std::vector<int> architectures() { return {__CUDA_ARCH_LIST__}; }

bool fits(int64_t num_words) { return num_words <= Parameters<large>::capacity; }

int64_t sums_of(int64_t num_chunks) { return std::min(num_chunks, squares_blocks) * threads; }

Squares find_squares(StoredType stored) {
  Squares found = nullptr;
  with_stored_type(stored, [&](auto value) { found = launch_squares<decltype(value)>; });
  return found;
}

KernelInfo find_kernel(const std::string& rule, int num_states, Storage storage) {
  KernelInfo found;
  with_rule(AllRules{}, rule, num_states, [&](auto candidate) {
    using Rule = decltype(candidate);
    with_layout(storage, [&](auto layout) {
      found = {launch_step<Rule, decltype(layout)>, static_cast<int>(Rule::scalars.size())};
    });
  });
  return found;
}

}  // namespace fused_ema::cuda
