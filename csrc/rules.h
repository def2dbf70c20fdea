// The optimizers' maths, once for C++, host and device: one functor per rule, and the EMA.
//
// fused_ema/rules holds the same formulas under the same names. Kernels load values, call update(),
// store them, and say how: Exact, or Quick and once more where needed. What it takes is folded into
// a row of doubles, in Python on the host and by fold() on a device: from a group's `numbers`
// (`kappa` is the last) and `flags` and the base steps after this step.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <string_view>
#include <utility>

#include "rounding.h"
#include "scaling.h"

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

template <class Rule, class T, size_t... k>
FUSED_EMA_INLINE auto scalars_of([[maybe_unused]] const double* row, [[maybe_unused]] double factor,
                                 std::index_sequence<k...>) {
  return typename Rule::template Scalars<T>{narrowed<T>(k == 0 ? row[k] * factor : row[k])...};
}

// A row's scalars as arithmetic in T takes them; the first is a factor of gradients, as `factor`
// is.
template <class Rule, class T>
FUSED_EMA_INLINE auto scalars_of(const double* row, double factor) {
  return scalars_of<Rule, T>(row, factor, std::make_index_sequence<Rule::scalars.size()>{});
}

// The direction to go in, a factor of the gradient.
FUSED_EMA_INLINE double sign(bool maximize) { return maximize ? -1 : 1; }

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

// As Exact, if right() says so afterwards: where weights are below a half, and differences finite.
// A GPU so looks once for the values of a pack, where a CPU would no longer vectorise.
class Quick {
 public:
  static FUSED_EMA_INLINE bool low(float weight) { return weight < 0.5f; }

  FUSED_EMA_INLINE float blend(float from, float to, float, float weight) {
    const float change = to - from;
    low_ = low_ && low(weight);
    finite(change);
    return from + weight * change;
  }

  FUSED_EMA_INLINE float moved(float from, float to) const { return to - from; }

  FUSED_EMA_INLINE float shrunk(float value, float weight) {
    low_ = low_ && low(weight);
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

// The gradient to descend: grad_factor * grad, plus the L2 penalty's weight_decay * param.
template <class T>
FUSED_EMA_INLINE T directed(T grad, T param, T grad_factor, T weight_decay) {
  grad = grad_factor * grad;
  return weight_decay != T(0) ? grad + weight_decay * param : grad;
}

struct SgdFold {
  static constexpr const char* name = "sgd";
  static constexpr std::array numbers{"lr", "momentum", "dampening", "weight_decay", "kappa"};
  static constexpr std::array flags{"nesterov", "maximize", "momentum_scaling=exact"};
  FUSED_EMA_SCALARS(grad_factor, weight_decay, momentum, carry, grad_weight, nesterov, lr);

  FUSED_EMA_INLINE static Scalars<double> fold(const double (&numbers)[5], Flags flags,
                                               double step) {
    const auto& [base_lr, mu, dampening, weight_decay, kappa] = numbers;
    const bool nesterov = flags[0], exact = flags[2];
    const double carry = fused_ema::momentum(mu, kappa, exact);
    const double entry = momentum_entry(mu, kappa, exact);
    const double lr = sgd_lr(base_lr, kappa);
    const bool first = step <= kappa;
    Scalars<double> c;
    c.grad_factor = sign(flags[1]);
    c.weight_decay = weight_decay;
    c.momentum = nesterov ? carry / entry : carry;
    c.carry = first ? 0 : carry;
    c.grad_weight = first ? entry : entry * (1 - dampening);
    c.nesterov = nesterov;
    c.lr = nesterov ? lr * entry : lr;
    return c;
  }
};

// buf <- carry*buf + grad_weight*g;  p <- p - lr * (nesterov ? g + momentum*buf : buf)
template <bool has_momentum>
struct Sgd : SgdFold {
  using Fold = SgdFold;
  static constexpr const char* variant = has_momentum ? "momentum" : "plain";
  static constexpr int num_states = has_momentum ? 1 : 0;

  template <class T, class How>
  FUSED_EMA_INLINE static void update(T& param, T grad, T* states, const Scalars<T>& c, How&) {
    grad = directed(grad, param, c.grad_factor, c.weight_decay);
    if constexpr (has_momentum) {
      T& momentum_buffer = states[0];
      momentum_buffer = c.carry * momentum_buffer + c.grad_weight * grad;
      grad = c.nesterov != T(0) ? grad + c.momentum * momentum_buffer : momentum_buffer;
    }
    param = param - c.lr * grad;
  }
};

struct AdamFold {
  static constexpr const char* name = "adam";
  static constexpr std::array numbers{"lr", "betas[0]", "betas[1]", "eps", "weight_decay", "kappa"};
  static constexpr std::array flags{"decoupled_weight_decay", "amsgrad", "maximize",
                                    "beta_scaling=linear", "weight_decay_scaling=none"};
  FUSED_EMA_SCALARS(grad_factor, weight_decay, decay, weight1, weight2, step_size, eps);

  FUSED_EMA_INLINE static Scalars<double> fold(const double (&numbers)[6], Flags flags,
                                               double step) {
    const auto& [base_lr, beta1, beta2, eps, weight_decay, kappa] = numbers;
    const bool decoupled = flags[0], linear = flags[3], unscaled = flags[4];
    const double lr = adaptive_lr(base_lr, kappa);
    const double decay = decoupled_decay(base_lr, lr, weight_decay, kappa, unscaled);
    Scalars<double> c;
    c.weight1 = beta_weight(beta1, kappa, linear);
    c.weight2 = beta_weight(beta2, kappa, linear);
    const double bias_correction1 = bias_correction(c.weight1, kappa, step);
    const double bias_correction2_sqrt = std::sqrt(bias_correction(c.weight2, kappa, step));
    c.grad_factor = sign(flags[2]);
    c.weight_decay = decoupled ? 0 : weight_decay;
    c.decay = decoupled ? decay : 0;
    c.step_size = lr * bias_correction2_sqrt / bias_correction1;
    c.eps = adaptive_eps(eps, kappa) * bias_correction2_sqrt;
    return c;
  }

 private:
  // 1 - beta^steps: one minus the product of the betas of all steps.
  FUSED_EMA_INLINE static double bias_correction(double weight, double kappa, double step) {
    return -std::expm1(step * (log1p_or_none(-weight) / kappa));
  }
};

// m <- lerp(m, g, 1-beta1);  v <- lerp_square(v, g, 1-beta2)
// p <- p - (decay*p + step_size * m / (sqrt(v) + eps)), with v's running maximum for amsgrad
template <bool amsgrad>
struct Adam : AdamFold {
  using Fold = AdamFold;
  static constexpr const char* variant = amsgrad ? "amsgrad" : "plain";
  static constexpr int num_states = amsgrad ? 3 : 2;

  template <class T, class How>
  FUSED_EMA_INLINE static void update(T& param, T grad, T* states, const Scalars<T>& c, How& how) {
    T& exp_avg = states[0];
    T& exp_avg_sq = states[1];
    grad = directed(grad, param, c.grad_factor, c.weight_decay);
    exp_avg = lerp(exp_avg, grad, c.weight1, how);
    exp_avg_sq = lerp_square(exp_avg_sq, grad, c.weight2, how);
    T second = exp_avg_sq;
    if constexpr (amsgrad) {
      T& largest = states[2];
      largest = second <= largest ? largest : second;  // a NaN wins, as in torch.maximum
      second = largest;
    }
    const T change = c.step_size * exp_avg / (std::sqrt(second) + c.eps);
    const T pull = c.decay * param;
    const T decay = how.finite(param) ? pull : T(0);  // an infinity stays one
    param = param - select(c.decay != T(0), change + decay, change);
  }
};

// What a mean leaves of the mean of squares, never less than nothing; infinite squares have none.
template <class T>
FUSED_EMA_INLINE T variance(T square, T mean) {
  const T rest = square - mean * mean;
  const T positive = rest < T(0) ? T(0) : rest;  // a NaN stays one
  return is_finite(square) ? positive : square;
}

struct RmspropFold {
  static constexpr const char* name = "rmsprop";
  static constexpr std::array numbers{"lr", "alpha", "eps", "weight_decay", "momentum", "kappa"};
  static constexpr std::array flags{"centered", "maximize", "momentum_scaling=exact"};
  FUSED_EMA_SCALARS(grad_factor, weight_decay, weight, eps, carry, entry, lr);

  FUSED_EMA_INLINE static Scalars<double> fold(const double (&numbers)[6], Flags flags, double) {
    const auto& [base_lr, alpha, eps, weight_decay, mu, kappa] = numbers;
    const bool exact = flags[2];
    Scalars<double> c;
    c.grad_factor = sign(flags[1]);
    c.weight_decay = weight_decay;
    c.weight = decay_weight(alpha, kappa);
    c.eps = adaptive_eps(eps, kappa);
    c.carry = momentum(mu, kappa, exact);
    c.entry = momentum_entry(mu, kappa, exact);
    c.lr = adaptive_lr(base_lr, kappa);
    return c;
  }
};

// v <- lerp_square(v, g, 1-alpha);  centered: m <- lerp(m, g, 1-alpha), and v - m^2 for v in
// d = g / (sqrt(v) + eps);  with momentum: buf <- carry*buf + entry*d, and buf for d in
// p <- p - lr*d
template <bool has_momentum, bool centered>
struct Rmsprop : RmspropFold {
  using Fold = RmspropFold;
  static constexpr const char* variant = has_momentum
                                             ? (centered ? "centered_momentum" : "momentum")
                                             : (centered ? "centered" : "plain");
  static constexpr int num_states = 1 + has_momentum + centered;

  template <class T, class How>
  FUSED_EMA_INLINE static void update(T& param, T grad, T* states, const Scalars<T>& c, How& how) {
    T& square_avg = states[0];
    grad = directed(grad, param, c.grad_factor, c.weight_decay);
    square_avg = lerp_square(square_avg, grad, c.weight, how);
    T second = square_avg;
    if constexpr (centered) {
      T& grad_avg = states[1 + has_momentum];
      grad_avg = lerp(grad_avg, grad, c.weight, how);
      second = variance(square_avg, grad_avg);
    }
    T direction = grad / (std::sqrt(second) + c.eps);
    if constexpr (has_momentum) {
      T& momentum_buffer = states[1];
      momentum_buffer = c.carry * momentum_buffer + c.entry * direction;
      direction = momentum_buffer;
    }
    param = param - c.lr * direction;
  }
};

// A parameter that no rule moves; its averages still follow it.
struct Frozen {
  using Fold = Frozen;
  static constexpr const char* name = "frozen";
  static constexpr const char* variant = "plain";
  static constexpr int num_states = 0;
  static constexpr std::array numbers{"kappa"};
  static constexpr std::array<const char*, 0> flags{};
  static constexpr std::array<std::string_view, 0> scalars{};

  template <class T>
  struct Scalars {};

  FUSED_EMA_INLINE static Scalars<double> fold(const double (&)[1], Flags, double) { return {}; }

  template <class T, class How>
  FUSED_EMA_INLINE static void update(T&, T, T*, const Scalars<T>&, How&) {}
};

template <class... Rules>
struct RuleList {};

// Every rule that the backends compile; a new rule is named here.
using AllRules =
    RuleList<Frozen, Sgd<false>, Sgd<true>, Adam<false>, Adam<true>, Rmsprop<false, false>,
             Rmsprop<true, false>, Rmsprop<false, true>, Rmsprop<true, true>>;

}  // namespace fused_ema
