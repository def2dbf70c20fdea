// The optimizers' maths, once for C++, host and device: a file an optimizer, a functor a variant.
//
// fused_ema/rules holds the same formulas under the same names. Kernels load values, call update(),
// store them, and say how: Direct on a CPU, Quick on a GPU, and Exact where that is not enough.
// What it takes is folded into a row of doubles, in Python on the host and by fold() on a device:
// from a group's `numbers` (`kappa` is the last) and `flags` and the base steps after this step.
#pragma once

#include "rules/adam.h"
#include "rules/blending.h"
#include "rules/frozen.h"
#include "rules/lamb.h"
#include "rules/lars.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

namespace fused_ema {

template <class... Rules>
struct RuleList {};

// Every rule that the backends compile; a new rule is named here.
using AllRules = RuleList<Frozen, Sgd<false>, Sgd<true>, Adam<false>, Adam<true>,
                          Rmsprop<false, false>, Rmsprop<true, false>, Rmsprop<false, true>,
                          Rmsprop<true, true>, Lars<false>, Lars<true>, Lamb>;

}  // namespace fused_ema
