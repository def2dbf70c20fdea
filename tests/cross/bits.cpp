// Steps made-up tensors by every CPU loop of every rule and prints a hash of the results, for
// comparison with other processors. The values come from integers, not from a math library.
#include <cstdio>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "rules.h"

namespace fused_ema {
namespace {

constexpr int64_t numel = 1031;  // whole vectors of any width, and a rest
constexpr int num_emas = 2;

class Values {
 public:
  // Uniform in [2^-6, 1), a sixteenth of it a power of two apart.
  template <class T>
  T next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    const uint64_t bits = state_ >> 32;
    if constexpr (std::is_same_v<T, Half>) return {static_cast<uint16_t>(0x2400 + bits % 0x1800)};
    const float value = static_cast<float>(bits % 0xFC0000 + 0x40000) / 0x1000000;
    if constexpr (std::is_same_v<T, BFloat16>)
      return {static_cast<uint16_t>(as_bits(value) >> 16)};
    else if constexpr (!std::is_same_v<T, Half>)
      return value;
  }

 private:
  uint64_t state_ = 1;
};

class Tensors {
 public:
  template <class T>
  void add(Values& values) {
    held_.emplace_back(numel * sizeof(T));
    for (int64_t i = 0; i < numel; ++i) {
      const T value = values.next<T>();
      std::memcpy(held_.back().data() + i * sizeof(T), &value, sizeof(T));
    }
  }

  std::vector<void*> pointers() {
    std::vector<void*> found;
    for (auto& memory : held_) found.push_back(memory.data());
    return found;
  }

  void hash(uint64_t& found) const {
    for (const auto& memory : held_)
      for (const unsigned char byte : memory) found = (found ^ byte) * 1099511628211u;
  }

 private:
  std::vector<std::vector<unsigned char>> held_;
};

template <class Rule, class Layout, class Average>
void step(const std::string& target, Storage storage, uint64_t& hash) {
  Values values;
  Tensors grad, tensors;
  grad.add<typename Layout::Param>(values);
  tensors.add<typename Layout::Param>(values);
  if (Layout::has_master) tensors.add<typename Layout::Weight>(values);
  for (int k = 0; k < Rule::num_states; ++k) tensors.add<typename Layout::State>(values);
  for (int k = 0; k < num_emas; ++k) tensors.add<Average>(values);
  std::vector<double> row;
  for (size_t k = 0; k < Rule::scalars.size() + num_emas; ++k) row.push_back(values.next<float>());
  const RuleId id{Rule::name, Rule::variant, Rule::num_states};
  const KernelInfo found = known(cpu::find_kernel(target, id, storage), id, Rule::scalars.size());
  for (const bool before : {false, true})
    found.kernel({tensors.pointers().data(), grad.pointers()[0], 0, numel, row.data(), 0.5,
                  num_emas, before, storage.ema_format, 12345});
  tensors.hash(hash);
}

template <class Rule>
void step_all(const std::string& target, uint64_t& hash, int& count) {
  for (const bool master : {false, true})
    for (const bool rounded : {false, true})
      for (const auto stored :
           {StoredType::float32, StoredType::float64, StoredType::bfloat16, StoredType::float16})
        with_layout<Rule>({stored, master, rounded}, [&](auto layout) {
          using Layout = decltype(layout);
          const auto consider = [&](auto format) {
            using Full = Compute<typename Layout::Weight>;
            using Average = std::conditional_t<
                format.value == EmaFormat::full, Full,
                std::conditional_t<format.value == EmaFormat::bf16, BFloat16, Half>>;
            step<Rule, Layout, Average>(target, {stored, master, rounded, format.value}, hash);
            ++count;
          };
          for (const auto format : {EmaFormat::full, EmaFormat::bf16, EmaFormat::delta})
            with_format<Layout>(format, consider);
        });
}

template <class... Rules>
void run(RuleList<Rules...>) {
  for (const std::string& target : cpu::targets()) {
    uint64_t hash = 14695981039346656037u;
    int count = 0;
    (step_all<Rules>(target, hash, count), ...);
    std::printf("%s %d %016llx\n", target.c_str(), count, static_cast<unsigned long long>(hash));
  }
}

}  // namespace
}  // namespace fused_ema

int main() { fused_ema::run(fused_ema::AllRules{}); }
