// From torch's dtypes to what kernels are told of.
#pragma once

#include <c10/core/ScalarType.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fused_ema {

inline StoredType stored_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return StoredType::float32;
    case at::kDouble:
      return StoredType::float64;
    case at::kBFloat16:
      return StoredType::bfloat16;
    case at::kHalf:
      return StoredType::float16;
    default:
      throw std::invalid_argument(std::string("no kernel for dtype ") + at::toString(dtype));
  }
}

inline bool is_rounded(at::ScalarType state, at::ScalarType weight) {
  if (state == weight) return false;
  if (state == at::kBFloat16 && weight == at::kFloat) return true;
  throw std::invalid_argument(std::string("no kernel for states of dtype ") + at::toString(state) +
                              " beside weights of " + at::toString(weight));
}

inline EmaFormat ema_format(at::ScalarType average, at::ScalarType arithmetic) {
  if (average == arithmetic) return EmaFormat::full;
  if (average == at::kBFloat16 && arithmetic == at::kFloat) return EmaFormat::bf16;
  if (average == at::kHalf && arithmetic == at::kFloat) return EmaFormat::delta;
  throw std::invalid_argument(std::string("no kernel for averages of dtype ") +
                              at::toString(average) + " in arithmetic of " +
                              at::toString(arithmetic));
}

}  // namespace fused_ema
