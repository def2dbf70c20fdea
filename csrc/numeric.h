// Number formats: how a stored value becomes a computed one and back. Host and device.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define FUSED_EMA_INLINE __host__ __device__ __forceinline__
#else
#define FUSED_EMA_INLINE inline __attribute__((always_inline))
#endif

namespace fused_ema {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// Arithmetic type of a stored type: half precision computes in float.
template <class Stored>
struct ComputeOf {
  using type = Stored;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};
template <>
struct ComputeOf<Half> {
  using type = float;
};
template <class Stored>
using Compute = typename ComputeOf<Stored>::type;

FUSED_EMA_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FUSED_EMA_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// One of two values, by a condition that is the same for all elements. By bits on the host, or the
// compiler would make a loop of its own for every case, and vectorise none.
template <class T>
FUSED_EMA_INLINE T select(bool first, T one, T other) {
#if defined(__CUDA_ARCH__)
  return first ? one : other;
#else
  using Bits = std::conditional_t<sizeof(T) == sizeof(uint32_t), uint32_t, uint64_t>;
  Bits bits, other_bits;
  std::memcpy(&bits, &one, sizeof bits);
  std::memcpy(&other_bits, &other, sizeof bits);
  const Bits mask = -Bits{first};
  bits = (bits & mask) | (other_bits & ~mask);
  std::memcpy(&one, &bits, sizeof bits);
  return one;
#endif
}

FUSED_EMA_INLINE float load(float value) { return value; }
FUSED_EMA_INLINE double load(double value) { return value; }
FUSED_EMA_INLINE float load(BFloat16 value) { return as_float(uint32_t{value.bits} << 16); }

// Selects instead of branches, so that loops over halves vectorise on every target alike.
FUSED_EMA_INLINE float load(Half value) {
#if defined(__CUDA_ARCH__)
  // the same but for a NaN's payload, which arithmetic on a GPU drops anyway
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t rebias = 112u << 23;  // float's exponent bias minus half's
  const uint32_t normal = (magnitude << 13) + rebias + (magnitude >= 0x7c00u ? rebias : 0u);
  // 0.5 + m * 2^-24 holds a subnormal's m in its last bits, exactly
  const uint32_t subnormal = as_bits(as_float(0x3f000000u + magnitude) - 0.5f);
  return as_float(sign | (magnitude < 0x0400u ? subnormal : normal));
#endif
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
template <class Stored>
FUSED_EMA_INLINE Stored store(Compute<Stored> value) {
  return value;
}

template <>
FUSED_EMA_INLINE BFloat16 store<BFloat16>(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

template <>
FUSED_EMA_INLINE Half store<Half>(float value) {
  const uint32_t bits = as_bits(value);
#if defined(__CUDA_ARCH__)
  // the same but for a NaN, of which the instruction makes another
  uint16_t narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow) : "f"(value));
  return {value == value ? narrow : static_cast<uint16_t>(((bits >> 16) & 0x8000u) | 0x7e00u)};
#else
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // adding 0.5 aligns a subnormal's last bit with float's, and rounds it
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= (143u << 23) ? special : result;
  return {static_cast<uint16_t>(sign | result)};
#endif
}

}  // namespace fused_ema
