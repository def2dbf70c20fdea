// How a pass over gradients ends, as Python gives it: fused_ema.step.gradients.Ending.
#pragma once

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <variant>

#include "norm.h"

namespace fused_ema {

using GivenNumber = std::variant<at::Tensor, double>;

// sums, control, scale, found_inf, max_norm, clips, checks
using GivenEnding =
    std::tuple<at::Tensor, at::Tensor, GivenNumber, GivenNumber, GivenNumber, bool, bool>;

inline Number as_number(const GivenNumber& given) {
  if (const double* value = std::get_if<double>(&given)) return {*value};
  const at::Tensor& tensor = std::get<at::Tensor>(given);
  const bool single = tensor.scalar_type() == at::kFloat;
  if (tensor.numel() != 1 || (!single && tensor.scalar_type() != at::kDouble))
    throw std::invalid_argument("a number is " + tensor.toString() + " of " +
                                std::to_string(tensor.numel()) +
                                " elements; allowed: one of float32 or float64");
  return {0, tensor.const_data_ptr(), single};
}

inline Ending as_ending(const std::optional<GivenEnding>& given) {
  if (!given) return {};
  const auto& [sums, control, scale, found_inf, max_norm, clips, checks] = *given;
  if (control.numel() != control_words)
    throw std::invalid_argument("control has " + std::to_string(control.numel()) +
                                " words; allowed: " + std::to_string(control_words));
  return {sums.const_data_ptr<double>(),
          sums.numel(),
          control.mutable_data_ptr<double>(),
          {as_number(scale), as_number(found_inf), as_number(max_norm), clips, checks}};
}

}  // namespace fused_ema
