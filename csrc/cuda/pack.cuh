// Loads and stores: neighbouring elements of a tensor, by the widest accesses there are.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/tuning.h"
#include "rules.h"

namespace fused_ema::cuda {

constexpr int access = 16;  // bytes of the widest load and store

// The widest access, as one instruction: the compiler may split an ordinary access into four.
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

// Two neighbours as memory holds them, rounded to nearest.
template <class Stored>
__device__ uint32_t store_two(float first, float second) {
#if defined(__CUDA_ARCH__)
  // the same but for a NaN, of which the instruction makes another
  uint32_t both;
  if constexpr (std::is_same_v<Stored, BFloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
#else
  return store<Stored>(first).bits | uint32_t{store<Stored>(second).bits} << 16;
#endif
}

#if defined(__CUDA_ARCH__)
// What a bfloat16 keeps the upper half of, see round_bfloat16(). A NaN has its mark there: it comes
// from arithmetic, or was a bfloat16.
__device__ inline uint32_t carried_bfloat16(float value, uint32_t bits) {
  return as_bits(value) + (std::abs(value) < as_float(largest_bfloat16) ? bits : 0);
}

// What rounds towards zero to the half that round_half() makes. If it is not `any` number, it is
// one that a half keeps, whatever random bits do to it.
template <bool any>
__device__ float carried_half(float value, uint32_t bits) {
  const uint32_t low = bits & 0x1fffu;
  const float part = static_cast<float>(static_cast<int32_t>(low));
  const bool is_small = std::abs(value) < 0x1p-14f;
  float carried = as_float(as_bits(value) + low);
  if (any) carried = copysignf(fminf(std::abs(carried), largest_half), value);
  if (is_small) carried = copysignf(__fmaf_rn(part, 0x1p-37f, std::abs(value)), value);
  return any && value != value ? value : carried;
}
#endif

// Likewise, by the halves of a hash; see carried_half() for `any`.
template <class Stored, bool any>
__device__ uint32_t round_two(float first, float second, uint32_t hash) {
  const uint32_t low = half_of(hash, 0), high = half_of(hash, 1);
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<Stored, BFloat16>)
    return __byte_perm(carried_bfloat16(first, low), carried_bfloat16(second, high), 0x7632);
  uint32_t both;
  asm("cvt.rz.f16x2.f32 %0, %1, %2;"
      : "=r"(both)
      : "f"(carried_half<any>(second, high)), "f"(carried_half<any>(first, low)));
  return both;
#else
  if constexpr (std::is_same_v<Stored, BFloat16>)
    return round_bfloat16(first, low).bits | uint32_t{round_bfloat16(second, high).bits} << 16;
  else
    return round_half(first, low).bits | uint32_t{round_half(second, high).bits} << 16;
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

  // Keeps values from element i on, two or, of a pack of one, one.
  template <class Value>
  __device__ void keep(int i, const Value* values) {
    if constexpr (n > 1 && sizeof(T) == 2) {
      words_[i / 2] = store_two<T>(values[0], values[1]);
    } else {
      set(i, store<T>(values[0]));
      if constexpr (n > 1) set(i + 1, store<T>(values[1]));
    }
  }

  // Likewise, rounded by the hash of the pair; `index` tells the half of a single element.
  template <class How>
  __device__ void keep(int i, const float* values, uint32_t hash, uint32_t index) {
    if constexpr (n > 1)
      words_[i / 2] = round_two<T, std::is_same_v<How, const Exact>>(values[0], values[1], hash);
    else if constexpr (std::is_same_v<T, BFloat16>)
      set(i, round_bfloat16(values[0], half_of(hash, index)));
    else
      set(i, round_half(values[0], half_of(hash, index)));
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
