// How the blocks of a kernel add up, in an order that does not depend on which comes first.
#pragma once

#include <cstdint>

#include "cuda/tuning.h"

namespace fused_ema::cuda {

// The sum over a block's threads, in the first of them.
__device__ inline double block_sum(double value) {
  __shared__ double sums[threads];
  const unsigned thread = threadIdx.x;
  __syncthreads();  // the last sum has been read
  sums[thread] = value;
#pragma unroll 1
  for (unsigned half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  return sums[thread];
}

// Whether `count` - 1 blocks have come here before. The fences put their sums before their tickets,
// and this block's reading behind its own.
__device__ inline bool is_last(uint32_t* ticket, uint32_t count) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == count - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// The sum of what other blocks have written, in the first thread; of every `stride`-th.
template <int stride>
__device__ double sum_of_all(const double* written, int64_t count) {
  const volatile double* sums = written;  // not what this block may have read before
  double total = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < count; i += threads) total += sums[stride * i];
  return block_sum(total);
}

}  // namespace fused_ema::cuda
