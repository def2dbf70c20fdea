// Loads and stores: neighbouring elements of a tensor, by the widest accesses there are.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/tuning.h"
#include "numeric.h"

namespace fused_ema::cuda {

constexpr int access = 16;  // bytes of the widest load and store

// The widest access, by one instruction. Of a plain one the compiler makes four where it sees fit.
__device__ inline uint4 read_wide(const void* from) {
#if defined(__CUDA_ARCH__)
  uint4 value;
  asm volatile("ld.global" FUSED_EMA_LOAD_HINT ".v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
#else
  return *static_cast<const uint4*>(from);
#endif
}

__device__ inline void write_wide(void* to, uint4 value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global" FUSED_EMA_STORE_HINT ".v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = value;
#endif
}

// Half as wide, of halves beside floats.
__device__ inline uint2 read_half(const void* from) {
#if defined(__CUDA_ARCH__)
  uint2 value;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from));
  return value;
#else
  return *static_cast<const uint2*>(from);
#endif
}

__device__ inline void write_half(void* to, uint2 value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(value.x), "r"(value.y) : "memory");
#else
  *static_cast<uint2*>(to) = value;
#endif
}

// Starts a load as far as the L2 cache, for which no register has to wait.
__device__ inline void prefetch([[maybe_unused]] const void* from) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
}

// Neighbouring elements in registers, which hold them as memory does: two halves to one.
template <class T, int n>
class Pack {
 public:
  __device__ void read(const T* from) {
    __builtin_assume(__isGlobal(from));
    if constexpr (n == 1) {
      set(0, *from);
    } else if constexpr (size == 1) {
      words_[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (size == 2) {
      const uint2 part = read_half(from);
      std::memcpy(words_, &part, sizeof part);
    } else {
#pragma unroll
      for (int i = 0; i < size; i += 4) {
        const uint4 part = read_wide(from + i * n / size);
        std::memcpy(words_ + i, &part, access);
      }
    }
  }

  __device__ void write(T* to) const {
    __builtin_assume(__isGlobal(to));
    if constexpr (n == 1) {
      *to = get(0);
    } else if constexpr (size == 1) {
      *reinterpret_cast<uint32_t*>(to) = words_[0];
    } else if constexpr (size == 2) {
      uint2 part;
      std::memcpy(&part, words_, sizeof part);
      write_half(to, part);
    } else {
#pragma unroll
      for (int i = 0; i < size; i += 4) {
        uint4 part;
        std::memcpy(&part, words_ + i, access);
        write_wide(to + i * n / size, part);
      }
    }
  }

  __device__ T get(int i) const {
    if constexpr (sizeof(T) == 2) {
      return {static_cast<uint16_t>(words_[i / 2] >> (i % 2 * 16))};
    } else {
      T value;
      std::memcpy(&value, words_ + i * sizeof(T) / 4, sizeof value);
      return value;
    }
  }

  __device__ void set(int i, T value) {
    if constexpr (n == 1 && sizeof(T) == 2) {
      words_[0] = value.bits;
    } else if constexpr (sizeof(T) == 2) {
      const int shift = i % 2 * 16;
      words_[i / 2] = (words_[i / 2] & 0xffff0000u >> shift) | uint32_t{value.bits} << shift;
    } else {
      std::memcpy(words_ + i * sizeof(T) / 4, &value, sizeof value);
    }
  }

 private:
  static constexpr int size = n * sizeof(T) < 4 ? 1 : n * sizeof(T) / 4;

  uint32_t words_[size];
};

}  // namespace fused_ema::cuda
