// The step kernel of AdamW and one average in float32, alone: variants.py compiles it with one set
// of constants after another, and tune.py calls what that makes.
#include "cuda/launch.cuh"

// step.cu's, which compiles all kernels.
bool fused_ema::cuda::fits(int64_t num_words) { return num_words <= Parameters<large>::capacity; }

namespace {

using namespace fused_ema;
using Rule = Adam<false>;
constexpr RowLayout row{Rule::scalars.size(), 1, false};

thread_local std::string refused;

}  // namespace

extern "C" {

int64_t variant_elements() { return cuda::chunk_elements(StoredType::float32); }

// Words before the gradients' addresses, where there is one row of scalars.
int64_t variant_grads_at(int num_slots) { return WordLayout{row.size(), num_slots}.grads(); }

// The name of the k-th of the rule's scalars, null behind the last.
const char* variant_scalar(size_t k) {
  static thread_local std::string name;
  if (k >= Rule::scalars.size()) return nullptr;
  name = Rule::scalars[k];
  return name.c_str();
}

bool variant_fits(int64_t num_words) { return cuda::fits(num_words); }

// One step, as of Launch with one row of scalars; null, or what CUDA refuses.
const char* variant_step(const int32_t* chunks, int64_t num_chunks, const int64_t* slots,
                         int num_slots, const int64_t* host_words, const int64_t* words,
                         int64_t num_words, const double* control, int device, void* stream) {
  cuda::Launch launch{};
  launch.chunks = chunks;
  launch.num_chunks = num_chunks;
  launch.slots = slots;
  launch.num_slots = num_slots;
  launch.num_rows = 1;
  launch.num_emas = 1;
  launch.row_size = row.size();
  launch.host_words = host_words;
  launch.words = words;
  launch.num_words = num_words;
  launch.control = control;
  launch.device = device;
  launch.stream = stream;
  try {
    cuda::launch_step<Rule, NoMaster<float>, EmaFormat::full>(launch);
  } catch (const std::exception& error) {
    refused = error.what();
    return refused.c_str();
  }
  return nullptr;
}

}  // extern "C"
