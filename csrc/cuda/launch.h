// What a plan asks of the GPU, free of torch's and CUDA's headers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/tuning.h"
#include "kernels.h"
#include "norm.h"

namespace fused_ema::cuda {

constexpr int64_t chunk_elements(StoredType stored) {
  switch (stored) {
    case StoredType::float64:
      return chunk_bytes / 8;
    case StoredType::float32:
      return chunk_bytes / 4;
    default:
      return chunk_bytes / 2;
  }
}

// One launch: a bucket of slots, each a parameter with what belongs to it.
//   chunks:     device, [num_chunks][2]: slot, and which chunk of it
//   slots:      device, see SlotLayout
//   host_words: what may change at each step, see WordLayout: all words before the slots
//   words:      a device copy of host_words, or null: then they travel by value, see fits()
//   scalars:    device, num_rows of a RowLayout, or null: then they are the first of the words
//   control:    device: what gradients are multiplied by; not 0 where nothing shall move
//   row_size:   of a RowLayout
//   ratios:     device, of a rule that takes norms: a trust ratio a slot, then two sums a chunk
//   arrivals:   device, of such a rule: how many chunks of each slot are summed, 0 between launches
// The caller has made `device` the current one, and the stream is a cudaStream_t of it.
struct Launch {
  const int32_t* chunks;
  int64_t num_chunks;
  const int64_t* slots;
  int num_slots;
  int num_rows;
  int num_emas;
  int row_size;
  bool ema_before;
  const double* scalars;
  const int64_t* words;
  const int64_t* host_words;
  int64_t num_words;
  const double* control;
  double* ratios;
  uint32_t* arrivals;
  int device;
  void* stream;
};

// Whether the words can travel by value, as a kernel parameter. They should where they can: such a
// step copies nothing, needs no buffer that outlives it, and a captured graph owns its words.
bool fits(int64_t num_words);

// Throws std::runtime_error where CUDA refuses.
using Kernel = void (*)(const Launch&);

struct KernelInfo {
  Kernel kernel = nullptr;
  int num_scalars = 0;
};

// The kernel for a rule; a null kernel where there is none.
// Throws std::invalid_argument where the rule keeps another number of states.
KernelInfo find_kernel(const RuleId& rule, Storage storage);

// What takes the trust ratios of a bucket before its step, by one launch; null for a rule that
// takes no norms.
Kernel find_trust(const RuleId& rule, Storage storage);

// A pass over a bucket's gradients, from the last chunk to the first: a step, which goes the other
// way, finds in the L2 cache what the pass has read last.
//   chunks, slots, words, host_words: as above; slot_size, grads_at: words of a slot, and before
//               the gradients
//   partial_sums:       device, num_sums() of them: where each block's sum of squares goes; null:
//   there is
//               no pass, only its end
//   ending:     of what lies on the device: the block that is the last to add up its squares takes
//               all sums, in their order, and decides
//   ticket:     device, 0 before and after every launch: how many blocks have added theirs up
struct SquaresLaunch {
  const int32_t* chunks;
  int64_t num_chunks;
  const int64_t* slots;
  int slot_size;
  int num_slots;
  const int64_t* words;
  const int64_t* host_words;
  int64_t grads_at;
  double* partial_sums;
  Ending ending;
  uint32_t* ticket;
  void* stream;
};

// Sums that a pass makes, at least one. The same on every GPU, and so is the order in which they
// are added up: a norm has the same bits on all of them.
int64_t num_sums(int64_t num_chunks);

using Squares = void (*)(const SquaresLaunch&);
Squares find_squares(StoredType stored);

// The compiler's version, as in 13000 for 13.0, and what it compiled the kernels for, as in 800.
int version();
std::vector<int> architectures();

}  // namespace fused_ema::cuda
