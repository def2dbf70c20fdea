// From a rule's name and a type known at run time to the template arguments of a kernel.
#pragma once

#include <string>

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

// What Storage stands for, in types. Weight is what the rule steps, Param what gradients belong to.
template <class Stored>
struct Plain {
  static constexpr bool has_master = false;
  using Param = Stored;
  using Weight = Stored;
};

template <class Stored>
struct Master {
  static constexpr bool has_master = true;
  using Param = Stored;
  using Weight = Compute<Stored>;
};

// Calls visit with a layout; not at all for a master that would be as exact as its copy.
template <class Visit>
void with_layout(Storage storage, Visit visit) {
  with_stored_type(storage.type, [&](auto value) {
    using Stored = decltype(value);
    if (!storage.master) return visit(Plain<Stored>{});
    if constexpr (sizeof(Stored) < sizeof(Compute<Stored>)) visit(Master<Stored>{});
  });
}

// Calls visit with the rule, told apart by its number of states; not at all where there is none.
template <class Visit, class... Rules>
void with_rule(RuleList<Rules...>, const std::string& rule, int num_states, Visit visit) {
  const auto consider = [&](auto candidate) {
    using Rule = decltype(candidate);
    if (rule == Rule::name && num_states == Rule::num_states) visit(candidate);
  };
  (consider(Rules{}), ...);
}

}  // namespace fused_ema
