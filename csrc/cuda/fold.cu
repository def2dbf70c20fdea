// The kernels that fold scalars, and their launch.
#include "cuda/fold.cuh"
#include "cuda/launch.cuh"

namespace fused_ema::cuda {

namespace {

template <class Rule, int bytes>
void launch_fold_sized(const FoldLaunch& launch) {
  FoldParameters<bytes> parameters;
  parameters.task = {launch.words,     launch.group_of, launch.control,
                     launch.table,     launch.arrivals, launch.num_groups,
                     launch.num_slots, launch.num_emas, launch.rounds};
  if (launch.words == nullptr)
    std::memcpy(parameters.words, launch.host_words, launch.num_words * sizeof(int64_t));
  void* arguments[] = {&parameters};
  const int blocks = (launch.num_slots + fold_threads - 1) / fold_threads;
  check(cudaLaunchKernel(fold<Rule, bytes>, dim3(static_cast<unsigned>(blocks)), dim3(fold_threads),
                         arguments, 0, static_cast<cudaStream_t>(launch.stream)),
        "to launch the fold kernel");
}

template <class Rule>
void launch_fold(const FoldLaunch& launch) {
  const bool by_value = launch.words == nullptr;
  if (by_value && !fold_fits(launch.num_words))
    throw std::runtime_error("too many words to pass by value");
  if (by_value && launch.num_words > FoldParameters<small>::capacity)
    launch_fold_sized<Rule, large>(launch);
  else
    launch_fold_sized<Rule, small>(launch);
}

template <class... Rules>
FoldInfo find(RuleList<Rules...>, const std::string& rule) {
  FoldInfo found;
  const auto consider = [&](auto candidate) {
    using Rule = typename decltype(candidate)::Fold;
    if (rule == Rule::name) found = {launch_fold<Rule>, int{Rule::numbers.size()}};
  };
  (consider(Rules{}), ...);
  return found;
}

}  // namespace

bool fold_fits(int64_t num_words) { return num_words <= FoldParameters<large>::capacity; }

FoldInfo find_fold(const std::string& rule) { return find(AllRules{}, rule); }

}  // namespace fused_ema::cuda
