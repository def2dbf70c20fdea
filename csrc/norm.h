// What a step makes of its gradients once the sum of their squares is known. Host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "numeric.h"
#include "rules.h"

namespace fused_ema {

// A number, or where one lies: float or double, on the device that reads it.
struct Number {
  double value = 0;
  const void* address = nullptr;
  bool single = false;

  FUSED_EMA_INLINE double get() const {
    if (address == nullptr) return value;
    return single ? *static_cast<const float*>(address) : *static_cast<const double*>(address);
  }
};

// fused_ema/step/gradients.py names the same.
struct Treatment {
  Number scale;      // what gradients are divided by
  Number found_inf;  // not 0: nothing moves
  Number max_norm;
  bool clips = false;   // to max_norm
  bool checks = false;  // nothing moves either where the sum of squares is not finite
};

// The end of a pass over gradients: adds up sums, and decides by them.
struct Ending {
  const double* sums = nullptr;
  int64_t num_sums = 0;
  double* control = nullptr;  // see decide(); null: the pass is not the last
  Treatment treatment;
};

// As torch.nn.utils.clip_grad_norm_ adds to the norm, so that a norm of 0 divides.
constexpr double norm_eps = 1e-6;

// control: what gradients are multiplied by; 1 where nothing moves, else 0; the norm before
// clipping; 1 less the second; the sum of squares; the second as a float, in half of a double.
constexpr int control_words = 6;

FUSED_EMA_INLINE void decide(const Treatment& treatment, double squares, double* control) {
  const double unscaling = 1 / treatment.scale.get();
  const double norm = std::sqrt(squares) * unscaling;
  const double ratio = treatment.max_norm.get() / (norm + norm_eps);
  const double coefficient = ratio > 1 ? 1 : ratio;  // a NaN stays one
  const bool overflow = treatment.checks && !is_finite(squares);
  const bool skipped = treatment.found_inf.get() != 0 || overflow;
  const float flag = skipped ? 1 : 0;
  control[0] = treatment.clips ? coefficient * unscaling : unscaling;
  control[1] = flag;
  control[2] = norm;
  control[3] = 1 - control[1];
  control[4] = squares;
  std::memcpy(control + 5, &flag, sizeof flag);
}

}  // namespace fused_ema
