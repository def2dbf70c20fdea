// Stochastic rounding: fused_ema/ema/formats.py holds the same operations under the same names.
#pragma once

#include <type_traits>

#include "numeric.h"

namespace fused_ema {

// How averages are stored: in the arithmetic's type, in bfloat16, or as scaled differences to the
// weights in float16.
enum class EmaFormat { full, bf16, delta };

template <EmaFormat format, class T>
using StoredAverage =
    std::conditional_t<format == EmaFormat::full, T,
                       std::conditional_t<format == EmaFormat::bf16, BFloat16, Half>>;

constexpr float delta_scale = 1024;
constexpr float largest_half = 65504;
constexpr uint32_t largest_bfloat16 = 0x7f7f0000;  // as float's bits

// 32 bits from 32 bits, each of them dependent on all: MurmurHash3's finalizer, in two steps. The
// first is linear: xor_halves(a ^ b) is xor_halves(a) ^ xor_halves(b).
FUSED_EMA_INLINE uint32_t xor_halves(uint32_t x) { return x ^ (x >> 16); }

FUSED_EMA_INLINE uint32_t mix_xored(uint32_t x) {
  x *= 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

FUSED_EMA_INLINE uint32_t mix(uint32_t x) { return mix_xored(xor_halves(x)); }

// The random key of a parameter: a hash of the step's seed and the parameter's index.
FUSED_EMA_INLINE uint32_t parameter_key(uint32_t seed, uint32_t parameter) {
  return mix(seed ^ mix(parameter));
}

// The random key of elements whose indices share their upper half.
FUSED_EMA_INLINE uint32_t upper_key(int64_t index) {
  return mix(static_cast<uint32_t>(index >> 32));
}

// The hash counts the rule's states as averages from this index on.
constexpr uint32_t first_state_key = uint32_t{1} << 31;

// The key of an average or a state. Keys are so far apart that elements of two of them get
// different hashes.
FUSED_EMA_INLINE uint32_t stream_key(uint32_t which) { return which * 0x9e3779b1u; }

// The 16 random bits of an element: a half of the hash that it shares with its neighbour.
FUSED_EMA_INLINE uint32_t half_of(uint32_t hash, uint32_t index) {
  return index % 2 == 0 ? hash & 0xffffu : hash >> 16;
}

// Random bits of the elements from `begin` on, which share the upper half of their index with it:
// those of average `which`, or of a state.
class RandomBits {
 public:
  RandomBits() = default;
  FUSED_EMA_INLINE RandomBits(uint32_t key, uint32_t which, int64_t begin)
      : key_(key ^ stream_key(which) ^ upper_key(begin)), first_(static_cast<uint32_t>(begin)) {}

  FUSED_EMA_INLINE uint32_t operator[](int64_t i) const {
    const uint32_t index = first_ + static_cast<uint32_t>(i);
    return half_of(mix(key_ ^ (index >> 1)), index);
  }

 private:
  uint32_t key_;
  uint32_t first_;
};

// Up with the probability of what is cut off, but from a finite number never to infinity; a NaN
// stays one.
FUSED_EMA_INLINE BFloat16 round_bfloat16(float value, uint32_t bits) {
  const uint32_t magnitude = as_bits(value) & 0x7fffffffu;
  const uint32_t low = bits & -uint32_t{magnitude < largest_bfloat16};
  const uint32_t rounded = (as_bits(value) + low) >> 16;
  const bool is_nan = magnitude > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

// Likewise, by the lower 13 bits; cut off at the largest number. Selects instead of branches, to
// vectorise.
FUSED_EMA_INLINE Half round_half(float value, uint32_t bits) {
  const uint32_t pattern = as_bits(value) & 0x7fffffffu;
  const float magnitude = as_float(pattern) < largest_half ? as_float(pattern) : largest_half;
  const uint32_t low = bits & 0x1fffu;
  const uint32_t normal = (as_bits(magnitude) - (112u << 23) + low) >> 13;
  const float units = magnitude < 0x1p-14f ? magnitude * 0x1p24f : 0.0f;
  const uint32_t subnormal = static_cast<uint32_t>(
      static_cast<int32_t>(units + static_cast<float>(static_cast<int32_t>(low)) * 0x1p-13f));
  uint32_t result = magnitude < 0x1p-14f ? subnormal : normal;
  result = pattern > 0x7f800000u ? 0x7e00u : result | ((as_bits(value) >> 16) & 0x8000u);
  return {static_cast<uint16_t>(result)};
}

}  // namespace fused_ema
