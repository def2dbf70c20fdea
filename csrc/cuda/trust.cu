// The kernels that take trust ratios, and their launch.
#include "cuda/launch.cuh"
#include "cuda/trust.cuh"

namespace fused_ema::cuda {

namespace {

template <class Rule, class Layout>
void launch_trust(const Launch& launch) {
  if (launch.num_chunks == 0) return;
  if (is_large(launch))
    launch_sized<large>(trust<Rule, Layout, large>, launch);
  else
    launch_sized<small>(trust<Rule, Layout, small>, launch);
}

}  // namespace

Kernel find_trust(const RuleId& rule, Storage storage) {
  Kernel found = nullptr;
  with_rule(AllRules{}, rule, [&](auto candidate) {
    using Rule = decltype(candidate);
    if constexpr (takes_norms<Rule>)
      with_layout<Rule>(storage,
                        [&](auto layout) { found = launch_trust<Rule, decltype(layout)>; });
  });
  return found;
}

}  // namespace fused_ema::cuda
