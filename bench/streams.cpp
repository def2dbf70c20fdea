// The byte limit of one AdamW step with an EMA: the same five arrays, next to no arithmetic.
#include <cstdint>

extern "C" void step5(float* __restrict p, const float* __restrict g, float* __restrict m,
                      float* __restrict v, float* __restrict e, int64_t n, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) {
    const float x = g[i];
    p[i] += x;
    m[i] += x;
    v[i] += x;
    e[i] += x;
  }
}
