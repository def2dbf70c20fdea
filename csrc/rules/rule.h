// What every rule is written with: flags, scalars by name, the direction of the gradient.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <utility>

#include "numeric.h"

namespace fused_ema {

// The flags of a param group: a bit each, the first the lowest.
class Flags {
 public:
  FUSED_EMA_INLINE explicit Flags(int64_t bits) : bits_(bits) {}
  FUSED_EMA_INLINE bool operator[](int k) const { return (bits_ >> k & 1) != 0; }

 private:
  int64_t bits_;
};

constexpr size_t count_names(std::string_view names) {
  size_t count = 1;
  for (const char letter : names) count += letter == ',';
  return count;
}

// What stands between commas.
template <size_t count>
constexpr std::array<std::string_view, count> split(std::string_view names) {
  std::array<std::string_view, count> found{};
  for (std::string_view& name : found) {
    const size_t end = names.find(',');
    name = names.substr(0, end);
    names.remove_prefix(end == names.npos ? names.size() : end + 2);
  }
  return found;
}

// A scalar as the arithmetic takes it.
template <class T>
FUSED_EMA_INLINE T narrowed(double scalar) {
  T value = static_cast<T>(scalar);
#if defined(__CUDA_ARCH__)
  // once: the compiler would keep the double, and convert it for each pack
  if constexpr (sizeof(T) == sizeof(float)) asm volatile("" : "+f"(value));
#endif
  return value;
}

// A rule's scalars, each named here alone: as a struct, and as the names of what a row holds.
#define FUSED_EMA_SCALARS(...)                                                    \
  static constexpr auto scalars = split<count_names(#__VA_ARGS__)>(#__VA_ARGS__); \
  template <class T>                                                              \
  struct Scalars {                                                                \
    T __VA_ARGS__;                                                                \
  }

// Whether a rule's steps have trust ratios, see rules/trust.h.
template <class Rule>
constexpr bool takes_norms = !Rule::scalars.empty() && Rule::scalars.back() == "trust";

template <class Rule, class T, size_t... k>
FUSED_EMA_INLINE auto scalars_of([[maybe_unused]] const double* row, [[maybe_unused]] double factor,
                                 [[maybe_unused]] double ratio, std::index_sequence<k...>) {
  constexpr size_t trust = takes_norms<Rule> ? sizeof...(k) - 1 : sizeof...(k);
  return typename Rule::template Scalars<T>{
      narrowed<T>(k == 0 ? row[k] * factor : (k == trust ? ratio : row[k]))...};
}

// A row's scalars as arithmetic in T takes them; the first is a factor of gradients, as `factor`
// is, and `ratio` takes the place of `trust`.
template <class Rule, class T>
FUSED_EMA_INLINE auto scalars_of(const double* row, double factor, double ratio) {
  return scalars_of<Rule, T>(row, factor, ratio, std::make_index_sequence<Rule::scalars.size()>{});
}

// The direction to go in, a factor of the gradient.
FUSED_EMA_INLINE double sign(bool maximize) { return maximize ? -1 : 1; }

// The gradient to descend: grad_factor * grad, plus the L2 penalty's weight_decay * param.
template <class T>
FUSED_EMA_INLINE T directed(T grad, T param, T grad_factor, T weight_decay) {
  grad = grad_factor * grad;
  return weight_decay != T(0) ? grad + weight_decay * param : grad;
}

}  // namespace fused_ema
