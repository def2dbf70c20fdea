// How values are blended, and the averages that are made of it: fused_ema/rules/blending.py has the
// same in Python.
#pragma once

#include <cmath>
#include <limits>

#include "rounding.h"

namespace fused_ema {

template <class T>
FUSED_EMA_INLINE bool is_finite(T value) {
  constexpr T largest = std::numeric_limits<T>::max();
  return std::abs(value) <= largest;
}

// How values are blended: from + weight*(to - from), exact where both are the same, whatever they
// are. A difference that is infinite, or none at all, tells nothing: then each counts by its share,
// and one without any not at all. So a constant stays what it is, an infinity too, weight 0 leaves
// `from`, whatever `to` is, and weight 1 gives `to`.
struct Exact {
  // `part` is weight*to
  template <class T>
  FUSED_EMA_INLINE T blend(T from, T to, T part, T weight) const {
#if defined(__CUDA_ARCH__)
    // What else follows from the weight is made anew for each element: kept, it would take the
    // registers of a pack. So the compiler is told that this may be another weight each time.
    if constexpr (sizeof(T) == sizeof(float)) asm volatile("" : "+f"(weight));
#endif
    const T change = to - from, rest = T(1) - weight;
    const bool low = weight < T(0.5);
    const T near = select(low, from, to) + (low ? weight : -rest) * change;
    const T kept = select(weight != T(1), rest * from, T(-0.0));
    const T taken = select(weight != T(0), part, T(-0.0));
    const T far = kept + taken;
    return is_finite(change) ? near : far;
  }

  // How far a value has moved: nowhere also where it stays infinite.
  template <class T>
  FUSED_EMA_INLINE T moved(T from, T to) const {
    return from == to ? T(0) : to - from;
  }

  // On the way to zero.
  template <class T>
  FUSED_EMA_INLINE T shrunk(T value, T weight) const {
    return blend(value, T(0), weight * T(0), weight);
  }

  template <class T>
  FUSED_EMA_INLINE bool finite(T value) const {
    return is_finite(value);
  }

  FUSED_EMA_INLINE void look(float) const {}
};

// As Exact where weights are below a half and seen() is finite: what differs leaves no finite sum.
template <class T>
class Direct {
 public:
  FUSED_EMA_INLINE T blend(T from, T to, T, T weight) { return see(from + weight * (to - from)); }
  FUSED_EMA_INLINE T moved(T from, T to) { return see(to - from); }
  FUSED_EMA_INLINE T shrunk(T value, T weight) { return see(value - weight * value); }

  FUSED_EMA_INLINE bool finite(T value) {
    see(value);
    return true;
  }

  FUSED_EMA_INLINE void look(T) const {}

  // The sum of all that was blended.
  FUSED_EMA_INLINE T seen() const { return seen_; }

 private:
  FUSED_EMA_INLINE T see(T value) {
    seen_ += value;
    return value;
  }

  T seen_ = 0;
};

template <class T>
FUSED_EMA_INLINE bool is_low(T weight) {
  return weight < T(0.5);
}

// Blends nothing, and sees whether Direct may: the weights do not depend on the values.
class Weights {
 public:
  template <class T>
  FUSED_EMA_INLINE T blend(T from, T, T, T weight) {
    low_ = low_ && is_low(weight);
    return from;
  }

  template <class T>
  FUSED_EMA_INLINE bool finite(T) const {
    return true;
  }

  FUSED_EMA_INLINE bool low() const { return low_; }

 private:
  bool low_ = true;
};

// As Exact, if right() says so afterwards: where weights are below a half, and differences finite.
// A GPU so looks once for the values of a pack, where a CPU would no longer vectorise.
class Quick {
 public:
  FUSED_EMA_INLINE float blend(float from, float to, float, float weight) {
    const float change = to - from;
    low_ = low_ && is_low(weight);
    finite(change);
    return from + weight * change;
  }

  FUSED_EMA_INLINE float moved(float from, float to) const { return to - from; }

  FUSED_EMA_INLINE float shrunk(float value, float weight) {
    low_ = low_ && is_low(weight);
    return value - weight * value;
  }

  FUSED_EMA_INLINE bool finite(float value) {
#if defined(__CUDA_ARCH__)
    nothing_ = __fmaf_rn(value, 0.0f, nothing_);
#else
    nothing_ += value * 0.0f;
#endif
    return true;
  }

  // Checks a difference. If a half can keep it, whatever the random bits add, it is finite, and so
  // is what it is made of.
  FUSED_EMA_INLINE void look(float value) {
#if defined(__CUDA_ARCH__)
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest_) : "f"(std::abs(value)));
#else
    const bool keep = largest_ != largest_ || std::abs(value) <= largest_;
    largest_ = keep ? largest_ : std::abs(value);
#endif
  }

  FUSED_EMA_INLINE bool right() const { return low_ && nothing_ == 0 && largest_ < largest_half; }

 private:
  bool low_ = true;
  // Numbers: predicates would be saved and restored around every division.
  float nothing_ = 0;  // or a NaN
  float largest_ = 0;
};

template <class T, class How>
FUSED_EMA_INLINE T lerp(T from, T to, T weight, How& how) {
  return how.blend(from, to, weight * to, weight);
}

// lerp(from, value*value, weight), also where only the weighted square is finite.
template <class T, class How>
FUSED_EMA_INLINE T lerp_square(T from, T value, T weight, How& how) {
  return how.blend(from, value * value, weight * value * value, weight);
}

// ema <- ema + rate * (param - ema), with the EMA rate 1 - rho^kappa.
template <class T, class How>
FUSED_EMA_INLINE T ema(T average, T param, T rate, How& how) {
  return lerp(average, param, rate, how);
}

// d - change, of a difference as it is stored: scaled, by which no bit is lost.
FUSED_EMA_INLINE float apart(float delta, float change) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(change, -delta_scale, delta);
#else
  return delta - change * delta_scale;
#endif
}

// Moves the scaled difference d = ema - param of a param that has moved by change:
// d <- (1 - rate)*(d - change), or (1 - rate)*d - change where the average takes the old param.
template <bool before, class How>
FUSED_EMA_INLINE float ema_delta(float delta, float from, float to, float rate, How& how) {
  const float change = how.moved(from, to);
  const float rest = before ? delta : apart(delta, change);
  const float kept = how.shrunk(rest, rate);
  const float result = before ? apart(kept, change) : kept;
  how.look(result);
  return result;
}

}  // namespace fused_ema
