// A bucket of random tensors in the layout of cuda::Launch, and the same stepped by the CPU loop.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "dispatch.h"
#include "kernels.h"
#include "layout.h"

namespace fused_ema {

// An allocation of just these bytes, so that the address sanitizer sees one access too many.
class Block {
 public:
  explicit Block(size_t bytes, size_t misalignment = 0)
      : memory_(std::malloc(misalignment + bytes), std::free),
        data_(static_cast<char*>(memory_.get()) + misalignment),
        bytes_(bytes) {}

  template <class T>
  static Block of(const std::vector<T>& values) {
    Block block(values.size() * sizeof(T));
    if (!values.empty()) std::memcpy(block.data_, values.data(), block.bytes_);
    return block;
  }

  void* data() const { return data_; }
  int64_t address() const { return reinterpret_cast<int64_t>(data_); }
  void copy(const Block& other) { std::memcpy(data_, other.data_, bytes_); }
  bool same(const Block& other) const { return std::memcmp(data_, other.data_, bytes_) == 0; }

 private:
  std::shared_ptr<void> memory_;
  char* data_;
  size_t bytes_;
};

struct Kind {
  RuleId rule;
  StoredType stored;
  int num_emas;
  bool ema_before;
  bool master = false;
  bool rounded_states = false;
  EmaFormat ema_format = EmaFormat::full;

  Storage storage() const { return {stored, master, rounded_states, ema_format}; }
  int first_average() const { return 2 + master + rule.num_states; }
  int num_tensors() const { return first_average() + num_emas; }

  // How tensor k is stored: the parameter, its gradient, master and states, the averages.
  StoredType type_of(int k) const {
    const bool wide = stored == StoredType::float64;
    const StoredType arithmetic = wide ? StoredType::float64 : StoredType::float32;
    if (k < 2) return stored;
    if (k < 2 + master) return arithmetic;
    if (k < first_average())
      return rounded_states ? StoredType::bfloat16 : (master ? arithmetic : stored);
    if (ema_format == EmaFormat::bf16) return StoredType::bfloat16;
    return ema_format == EmaFormat::delta ? StoredType::float16 : arithmetic;
  }
};

// misaligned: the tensor whose address is not a multiple of 16, -1 for none, -2 for all. Tensors
// count from the parameter, the gradient and the states to the averages.
struct Size {
  int64_t numel;
  int misaligned = -1;
  bool has_grad = true;
};

inline int64_t stored_bytes(StoredType stored) {
  int64_t bytes = 0;
  with_stored_type(stored, [&](auto value) { bytes = sizeof value; });
  return bytes;
}

class Bucket {
 public:
  Bucket(const Kind& kind, const std::vector<Size>& sizes, unsigned seed)
      : kind_(kind), sizes_(sizes), random_(seed) {
    kernel_ = cuda::find_kernel(kind.rule, kind.storage());
    trust_ = cuda::find_trust(kind.rule, kind.storage());
    row_size_ = kernel_.num_scalars + kind.num_emas + kind.storage().rounds();
    for (const Size& size : sizes_) {
      slots_.push_back(make_tensors(size));
      expected_.push_back(make_tensors(size));
      for (int k = 0; k < kind_.num_tensors(); ++k) expected_.back()[k].copy(slots_.back()[k]);
    }
    for (int row = 0; row < num_rows; ++row)
      for (int k = 0; k < row_size_; ++k) table_.push_back(scalar(row, k));
  }

  WordLayout layout(bool without_scalars = false) const {
    return {without_scalars ? 0 : int64_t{num_rows} * row_size_,
            static_cast<int64_t>(sizes_.size())};
  }

  struct How {
    bool words_on_device = false;
    bool scalars_on_device = false;
    double grad_factor = 1;
    double found_inf = 0;
    int device = 0;
    void* stream = nullptr;
  };

  // One step by the CUDA kernel.
  void step(const How& how) {
    const Block chunks = Block::of(chunk_table()), slots = Block::of(slot_table());
    const Block scalars = Block::of(table_);
    const std::vector<int64_t> prefix = words(how.scalars_on_device);
    const Block host_words = Block::of(prefix), words = Block::of(prefix);
    cuda::Launch launch{};
    launch.chunks = static_cast<const int32_t*>(chunks.data());
    launch.num_chunks = static_cast<int64_t>(chunk_table().size() / 2);
    launch.slots = static_cast<const int64_t*>(slots.data());
    launch.num_slots = static_cast<int>(sizes_.size());
    launch.num_rows = num_rows;
    launch.num_emas = kind_.num_emas;
    launch.row_size = row_size_;
    launch.ema_before = kind_.ema_before;
    if (how.scalars_on_device) launch.scalars = static_cast<const double*>(scalars.data());
    if (how.words_on_device) launch.words = static_cast<const int64_t*>(words.data());
    launch.host_words = static_cast<const int64_t*>(host_words.data());
    launch.num_words = static_cast<int64_t>(prefix.size());
    const Block control = Block::of(std::vector<double>{how.grad_factor, how.found_inf});
    launch.control = static_cast<const double*>(control.data());
    launch.device = how.device;
    launch.stream = how.stream;
    if (trust_ != nullptr) take_ratios(launch);
    kernel_.kernel(launch);
  }

  // One step of the copies by the CPU loop.
  void expect_step(double grad_factor = 1) {
    const KernelInfo cpu = cpu::find_kernel(cpu::targets().front(), kind_.rule, kind_.storage());
    for (size_t i = 0; i < sizes_.size(); ++i) {
      std::vector<void*> pointers;
      for (const Block& tensor : expected_[i]) pointers.push_back(tensor.data());
      const void* grad = sizes_[i].has_grad ? pointers[1] : nullptr;
      pointers.erase(pointers.begin() + 1);
      const double* row = table_.data() + i % num_rows * row_size_;
      Piece piece{pointers.data(),
                  grad,
                  0,
                  sizes_[i].numel,
                  row,
                  grad_factor,
                  kind_.num_emas,
                  kind_.ema_before,
                  kind_.ema_format,
                  key(i)};
      if (trust_ != nullptr && grad != nullptr && sizes_[i].numel > 0) {
        piece.ratio = ratios_[i];
        expect_ratio(cpu, piece, i);
      }
      cpu.kernel(piece);
    }
  }

  // Throws where a tensor differs from its copy in a bit.
  void check() const {
    for (size_t i = 0; i < sizes_.size(); ++i)
      for (int k = 0; k < kind_.num_tensors(); ++k)
        if (!slots_[i][k].same(expected_[i][k]))
          throw std::runtime_error("slot " + std::to_string(i) + " of " +
                                   std::to_string(sizes_[i].numel) + " elements: tensor " +
                                   std::to_string(k) + " differs");
  }

 private:
  static constexpr int num_rows = 3;

  // Keeps the ratios that the CUDA kernel takes, in memory of just their size.
  void take_ratios(cuda::Launch& launch) {
    const Block ratios = Block::of(std::vector<double>(sizes_.size() + 2 * launch.num_chunks));
    const Block arrivals = Block::of(std::vector<uint32_t>(sizes_.size()));
    launch.ratios = static_cast<double*>(ratios.data());
    launch.arrivals = static_cast<uint32_t*>(arrivals.data());
    trust_(launch);
    ratios_.assign(launch.ratios, launch.ratios + sizes_.size());
    if (!arrivals.same(Block::of(std::vector<uint32_t>(sizes_.size()))))
      throw std::runtime_error("arrivals are left behind");
    launch.ratios = ratios_.data();
  }

  // Throws where a ratio differs from the CPU's by more than the order of its sums explains.
  void expect_ratio(const KernelInfo& cpu, const Piece& piece, size_t slot) const {
    double sums[2], expected = 1;
    cpu.measure(piece, sums);
    if (piece.row[cpu.num_scalars - 1] != 0) expected = cpu.ratio(sums, piece.row);
    if (!(std::abs(piece.ratio - expected) <= 1e-12 * expected))
      throw std::runtime_error("slot " + std::to_string(slot) + ": ratio " +
                               std::to_string(piece.ratio) + ", expected " +
                               std::to_string(expected));
  }

  uint32_t key(size_t slot) const {
    if (!kind_.storage().rounds()) return 0;
    const double seed = table_[(slot % num_rows + 1) * row_size_ - 1];
    return parameter_key(static_cast<uint32_t>(seed), place(slot));
  }

  // Which of an optimizer's parameters a slot is: any number.
  static uint32_t place(size_t slot) { return 7 + 3 * static_cast<uint32_t>(slot); }

  std::vector<Block> make_tensors(const Size& size) {
    std::vector<Block> tensors;
    for (int k = 0; k < kind_.num_tensors(); ++k) {
      const int64_t bytes = stored_bytes(kind_.type_of(k));
      const bool misaligned = size.misaligned == -2 || size.misaligned == k;
      tensors.emplace_back(size.numel * bytes, misaligned ? bytes : 0);
      with_stored_type(kind_.type_of(k), [&](auto value) {
        fill<decltype(value)>(tensors.back(), size.numel, k >= 2 && k < kind_.first_average());
      });
    }
    return tensors;
  }

  // positive: a state, whose square root a rule may take and divide by.
  template <class T>
  void fill(const Block& block, int64_t count, bool positive) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
      const float value = normal(random_);
      static_cast<T*>(block.data())[i] = store<T>(positive ? 0.01f + value * value : value);
    }
  }

  // Every scalar is 0 in one row, and what it multiplies or switches on is tested in the others.
  double scalar(int row, int k) {
    if (kind_.storage().rounds() && k == row_size_ - 1) return random_();  // the seed
    return (k + row) % num_rows == 0 ? 0 : std::uniform_real_distribution(0.05, 0.95)(random_);
  }

  std::vector<int32_t> chunk_table() const {
    const int64_t elements = cuda::chunk_elements(kind_.stored);
    std::vector<int32_t> table;
    for (size_t i = 0; i < sizes_.size(); ++i)
      for (int64_t chunk = 0; chunk * elements < sizes_[i].numel; ++chunk) {
        table.push_back(static_cast<int32_t>(i));
        table.push_back(static_cast<int32_t>(chunk));
      }
    return table;
  }

  std::vector<int64_t> slot_table() const {
    std::vector<int64_t> table;
    for (size_t i = 0; i < sizes_.size(); ++i) {
      table.push_back(sizes_[i].numel);
      table.push_back(place(i));
      for (int k = 0; k < kind_.num_tensors(); ++k)
        if (k != 1) table.push_back(slots_[i][k].address());
    }
    return table;
  }

  std::vector<int64_t> words(bool without_scalars) const {
    const WordLayout at = layout(without_scalars);
    std::vector<int64_t> words(at.slots());
    if (at.indices() > 0) std::memcpy(words.data(), table_.data(), at.indices() * sizeof(double));
    for (size_t i = 0; i < sizes_.size(); ++i) {
      words[at.indices() + i / 4] |= static_cast<int64_t>(i % num_rows) << i % 4 * 16;
      words[at.grads() + i] = sizes_[i].has_grad ? slots_[i][1].address() : 0;
    }
    return words;
  }

  Kind kind_;
  std::vector<Size> sizes_;
  std::mt19937 random_;
  cuda::KernelInfo kernel_;
  cuda::Kernel trust_;  // of a rule that takes norms
  std::vector<double> ratios_;
  int row_size_;
  std::vector<std::vector<Block>> slots_, expected_;
  std::vector<double> table_;
};

}  // namespace fused_ema
