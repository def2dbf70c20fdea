// Steps random buckets by the CUDA kernel (see cuda_runtime.h) and by the CPU loop: same bits.
// Usage: parity GROUP; prints what it stepped, or fails.
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>

#include "bucket.h"

namespace fused_ema {
namespace {

constexpr StoredType types[] = {StoredType::float32, StoredType::float64, StoredType::bfloat16,
                                StoredType::float16};

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

// Sizes around those where the kernel changes its way: none, one vector, one chunk, several.
std::vector<Size> edges(const Kind& kind) {
  const int64_t vector = 16 / stored_bytes(kind.stored);
  const int64_t chunk = cuda::chunk_elements(kind.stored);
  const int last = kind.num_tensors() - 1;
  std::vector<Size> sizes;
  for (int64_t numel : {int64_t{0}, int64_t{1}, vector - 1, vector, vector + 1, chunk - 1, chunk,
                        chunk + 1, 3 * chunk + vector + 3})
    for (int misaligned : {-1, -2}) sizes.push_back({numel, misaligned});
  for (int tensor = 0; tensor <= last; ++tensor) sizes.push_back({5 * vector + 3, tensor});
  sizes.push_back({chunk + 3, -1, false});
  sizes.push_back({vector + 1, -2, false});
  sizes.push_back({vector, last, false});
  return sizes;
}

int step_kind(const Kind& kind) {
  Bucket bucket(kind, edges(kind), 1);
  for (int step = 0; step < 2; ++step) {
    bucket.step({});
    bucket.expect_step();
    bucket.check();
  }
  return 1;
}

const RuleId adam{"adam", "plain", 2}, sgd{"sgd", "plain", 0}, heavy_ball{"sgd", "momentum", 1};

template <class... Rules>
std::vector<RuleId> ids(RuleList<Rules...>) {
  return {{Rules::name, Rules::variant, Rules::num_states}...};
}

const std::vector<RuleId> rules = ids(AllRules{});

bool moves(const RuleId& rule) { return rule.name != Frozen::name; }

int test_rules() {
  int buckets = 0;
  for (const RuleId& rule : rules)
    for (StoredType stored : types)
      for (int num_emas : {0, 1, 3})
        for (bool before : {false, true}) buckets += step_kind({rule, stored, num_emas, before});
  return buckets;
}

int test_masters() {
  int buckets = 0;
  for (const RuleId& rule : rules)
    for (StoredType stored : {StoredType::bfloat16, StoredType::float16})
      for (int num_emas : {0, 1, 3})
        for (bool before : {false, true})
          if (moves(rule)) buckets += step_kind({rule, stored, num_emas, before, true});
  require(cuda::find_kernel(adam, {StoredType::float32, true}).kernel == nullptr,
          "a master of float32 is none");
  return buckets;
}

int step_rounding_kinds(const RuleId& rule, StoredType stored, bool master) {
  int buckets = 0;
  const bool wide = master || stored == StoredType::float32;
  for (EmaFormat format : {EmaFormat::full, EmaFormat::bf16, EmaFormat::delta})
    for (int num_emas : {0, 1, 3})
      for (bool before : {false, true})
        for (bool rounded_states : {false, true}) {
          if (rounded_states ? rule.num_states == 0 || !wide
                             : format == EmaFormat::full || num_emas == 0)
            continue;
          buckets += step_kind({rule, stored, num_emas, before, master, rounded_states, format});
        }
  return buckets;
}

int test_rounding() {
  int buckets = 0;
  for (const RuleId& rule : rules) {
    for (StoredType stored : {StoredType::float32, StoredType::bfloat16, StoredType::float16})
      buckets += step_rounding_kinds(rule, stored, false);
    if (moves(rule)) buckets += step_rounding_kinds(rule, StoredType::bfloat16, true);
  }
  const auto none = [](Storage storage) {
    require(cuda::find_kernel(adam, storage).kernel == nullptr, "nothing to round");
  };
  none({StoredType::float64, false, true});
  none({StoredType::bfloat16, false, true});
  none({StoredType::float64, false, false, EmaFormat::bf16});
  none({StoredType::float64, false, false, EmaFormat::delta});
  return buckets;
}

// Steps buckets whose words just fit, or just do not, into the small and the large parameters.
int test_words() {
  const Kind kind{adam, StoredType::float32, 2, false};
  int buckets = 0;
  for (size_t count : {1, 379, 380, 400, 401, 3245, 3246, 3267, 3268, 4000})
    for (bool scalars_on_device : {false, true}) {
      Bucket bucket(kind, std::vector<Size>(count, {9}), 1);
      const int64_t words = bucket.layout(scalars_on_device).slots();
      const bool fits = cuda::fits(words);
      require(fits == (88 + 8 * words <= 32764), "fits() is wrong about " + std::to_string(words));
      bucket.step({!fits, scalars_on_device});
      bucket.expect_step();
      bucket.step({true, scalars_on_device});
      bucket.expect_step();
      bucket.check();
      require(shim::launches.back() == 4096, "words on the device need no large parameters");
      const bool small = !fits || 88 + 8 * words <= 4096;
      require(shim::launches.end()[-2] == (small ? 4096 : 32760), "other parameters than needed");
      ++buckets;
    }
  return buckets;
}

int test_control() {
  int buckets = 0;
  for (StoredType stored : types) {
    const Kind kind{heavy_ball, stored, 2, false};
    Bucket bucket(kind, edges(kind), 1);
    for (double found_inf : {1.0, 0.0, -1.0}) {
      bucket.step({false, false, 0.3, found_inf});
      if (found_inf == 0) bucket.expect_step(0.3);
      bucket.check();
    }
    ++buckets;
  }
  return buckets;
}

int test_empty() {
  Bucket bucket({sgd, StoredType::float32, 1, false}, {{0}, {0}}, 1);
  bucket.step({});
  require(shim::launches.empty(), "nothing to step, yet a launch");
  return 1;
}

// Vectors are moved by one access, the rest and what is not aligned by one for each element.
int test_accesses() {
  const Kind kind{heavy_ball, StoredType::float32, 2, false};
  const int step = 3 + 2 + 2;  // read param, grad and state, write param and state; an average
  const int follow = 1 + 2;    // read param; an average
  const auto expect = [&](const Size& size, int64_t accesses) {
    Bucket bucket(kind, {size}, 1);
    shim::accesses = 0;
    bucket.step({});
    require(shim::accesses == accesses,
            std::to_string(shim::accesses) + " accesses instead of " + std::to_string(accesses));
  };
  expect({4 * 5 + 3}, (5 + 3) * (step + follow));
  expect({4 * 5 + 3, -2}, (4 * 5 + 3) * (step + follow));
  expect({4 * 5 + 3, -1, false}, (5 + 3) * 2 * follow);
  return 3;
}

template <class Step>
void require_error(const char* message, Step step) {
  try {
    step();
  } catch (const std::runtime_error& error) {
    require(error.what() == std::string(message), error.what());
    require(cudaGetLastError() == cudaSuccess, "the error is left behind");
    return;
  }
  throw std::runtime_error(std::string("no error: ") + message);
}

int test_errors() {
  const Kind kind{sgd, StoredType::float32, 1, false};
  Bucket bucket(kind, {{9}}, 1), large(kind, std::vector<Size>(4000, {9}), 1);
  require_error("CUDA refuses to count multiprocessors: invalid device ordinal",
                [&] { bucket.step({false, false, 1, 0, 7}); });
  require_error("CUDA refuses to launch the step kernel: invalid resource handle",
                [&] { bucket.step({false, false, 1, 0, 0, shim::broken_stream}); });
  require_error("too many words to pass by value", [&] { large.step({}); });
  bucket.check();
  large.check();
  const RuleId unknown{"sgd", "nesterov", 1};
  require(cuda::find_kernel(unknown, {StoredType::float32}).kernel == nullptr, "no such variant");
  try {
    cuda::find_kernel({"sgd", "momentum", 2}, {StoredType::float32});
  } catch (const std::invalid_argument&) {
    return 2;
  }
  throw std::runtime_error("a rule of other states is found");
}

int run(const std::string& group) {
  if (group == "rules") return test_rules();
  if (group == "masters") return test_masters();
  if (group == "rounding") return test_rounding();
  if (group == "words") return test_words();
  if (group == "control") return test_control();
  if (group == "empty") return test_empty();
  if (group == "accesses") return test_accesses();
  if (group == "errors") return test_errors();
  throw std::runtime_error("no such group");
}

}  // namespace
}  // namespace fused_ema

int main(int argc, char** argv) {
  try {
    const std::string group = argc == 2 ? argv[1] : "";
    std::printf("%s: %d buckets\n", group.c_str(), fused_ema::run(group));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
