// From a rule's name and a type known at run time to the template arguments of a kernel.
#pragma once

#include <string>
#include <type_traits>

#include "kernels.h"
#include "rules.h"

namespace fused_ema {

template <class Visit>
void with_stored_type(StoredType stored, Visit visit) {
  switch (stored) {
    case StoredType::float32:
      return visit(float{});
    case StoredType::float64:
      return visit(double{});
    case StoredType::bfloat16:
      return visit(BFloat16{});
    case StoredType::float16:
      return visit(Half{});
  }
}

// What Storage stands for, in types. Weight is what the rule steps, Param what gradients belong to,
// State what the rule keeps.
template <class Stored>
struct NoMaster {
  static constexpr bool has_master = false;
  static constexpr bool rounded_states = false;
  using Param = Stored;
  using Weight = Stored;
  using State = Stored;
};

template <class Stored>
struct Master {
  static constexpr bool has_master = true;
  static constexpr bool rounded_states = false;
  using Param = Stored;
  using Weight = Compute<Stored>;
  using State = Weight;
};

template <class Layout>
struct RoundedStates : Layout {
  static constexpr bool rounded_states = true;
  using State = BFloat16;
};

// Calls visit with a layout; not at all for a master that would be as exact as its copy, or of a
// rule that moves nothing, nor where there is nothing to keep in fewer bits.
template <class Rule, class Visit>
void with_layout(Storage storage, Visit visit) {
  const auto consider = [&](auto layout) {
    using Layout = decltype(layout);
    if (!storage.rounded_states) return visit(layout);
    if constexpr (Rule::num_states > 0 && std::is_same_v<typename Layout::Weight, float>)
      visit(RoundedStates<Layout>{});
  };
  with_stored_type(storage.type, [&](auto value) {
    using Stored = decltype(value);
    if (!storage.master) return consider(NoMaster<Stored>{});
    if constexpr (sizeof(Stored) < sizeof(Compute<Stored>) && !std::is_same_v<Rule, Frozen>)
      consider(Master<Stored>{});
  });
}

// Calls visit with a format as a constant; averages in double are not kept in fewer bits.
template <class Layout, class Visit>
void with_format(EmaFormat format, Visit visit) {
  if (format == EmaFormat::full) visit(std::integral_constant<EmaFormat, EmaFormat::full>{});
  if constexpr (std::is_same_v<Compute<typename Layout::Weight>, float>) {
    if (format == EmaFormat::bf16) visit(std::integral_constant<EmaFormat, EmaFormat::bf16>{});
    if (format == EmaFormat::delta) visit(std::integral_constant<EmaFormat, EmaFormat::delta>{});
  }
}

// Calls visit with the rule; not at all where there is none.
// Throws std::invalid_argument where the rule keeps another number of states.
template <class Visit, class... Rules>
void with_rule(RuleList<Rules...>, const RuleId& rule, Visit visit) {
  const auto consider = [&](auto candidate) {
    using Rule = decltype(candidate);
    if (rule.name != Rule::name || rule.variant != Rule::variant) return;
    if (rule.num_states != Rule::num_states)
      throw std::invalid_argument("rule " + rule.name + ", variant " + rule.variant +
                                  ": received " + std::to_string(rule.num_states) +
                                  " states, allowed " + std::to_string(Rule::num_states));
    visit(candidate);
  };
  (consider(Rules{}), ...);
}

}  // namespace fused_ema
