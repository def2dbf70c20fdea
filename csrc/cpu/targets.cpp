// Compiles the element loop for each instruction set and picks one at run time.
//
// All of them give the same bits: no contraction to fused multiply-adds (-ffp-contract=off), and
// addition, multiplication, division and square root are correctly rounded at every vector width.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "dispatch.h"
#include "kernels.h"
#include "rules.h"

#if defined(__clang__)
#define FUSED_EMA_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define FUSED_EMA_INDEPENDENT _Pragma("GCC ivdep")
#endif

#if defined(__x86_64__)
#define FUSED_EMA_X86 1
#else
#define FUSED_EMA_X86 0
#endif

// What every processor of the architecture has.
#if defined(__aarch64__)
#define FUSED_EMA_BASELINE neon
#else
#define FUSED_EMA_BASELINE baseline
#endif
#define FUSED_EMA_NAME_OF(target) #target
#define FUSED_EMA_NAME(target) FUSED_EMA_NAME_OF(target)

namespace fused_ema::cpu {

namespace FUSED_EMA_BASELINE {
#include "cpu/loop.h"
}

#if FUSED_EMA_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
namespace avx2 {
#include "cpu/loop.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace avx512 {
#include "cpu/loop.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

struct Target {
  const char* name;
  KernelInfo (*find_kernel)(const RuleId&, Storage);
  Squares (*find_squares)(StoredType);
};

std::vector<Target> available() {
  std::vector<Target> found;
#if FUSED_EMA_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back({"avx512", avx512::find_kernel, avx512::find_squares});
  if (__builtin_cpu_supports("avx2"))
    found.push_back({"avx2", avx2::find_kernel, avx2::find_squares});
#endif
  found.push_back({FUSED_EMA_NAME(FUSED_EMA_BASELINE), FUSED_EMA_BASELINE::find_kernel,
                   FUSED_EMA_BASELINE::find_squares});
  return found;
}

}  // namespace

std::vector<std::string> targets() {
  std::vector<std::string> names;
  for (const Target& target : available()) names.emplace_back(target.name);
  return names;
}

std::string chosen_target() {
  const std::vector<std::string> names = targets();
  const char* wanted = std::getenv("FUSED_EMA_CPU");
  if (wanted == nullptr || *wanted == '\0') return names.front();
  std::string allowed;
  for (const std::string& name : names) {
    if (name == wanted) return name;
    allowed += (allowed.empty() ? "" : ", ") + name;
  }
  throw std::invalid_argument("FUSED_EMA_CPU=" + std::string(wanted) +
                              " cannot run here; allowed: " + allowed);
}

KernelInfo find_kernel(const std::string& target, const RuleId& rule, Storage storage) {
  for (const Target& candidate : available())
    if (target == candidate.name) return candidate.find_kernel(rule, storage);
  return {};
}

Squares find_squares(const std::string& target, StoredType stored) {
  for (const Target& candidate : available())
    if (target == candidate.name) return candidate.find_squares(stored);
  return nullptr;
}

}  // namespace fused_ema::cpu
