// The one element loop. targets.cpp includes it once per instruction set, in a namespace of its own
// and inside the region that enables that set; hence neither an include guard nor includes.

// Elements that are stepped before the averages follow: few enough to still be in the L1 cache.
constexpr int64_t block = 128;

// Elements between two requests for memory: a few lines of each tensor.
constexpr int64_t tile = 64;
// How far ahead memory is asked for. By itself a core does not see so far: arithmetic stands
// between its loads, and what it asks for unasked ends with every page.
constexpr int64_t ahead = 512;

// Asks for the memory of the tile that begins at an element, which may be beyond the last one.
// Inlined by force, as GCC would drop the call of a function that does nothing else.
template <class T>
FUSED_EMA_INLINE void ask_for(const T* tensor, int64_t begin) {
  constexpr uintptr_t line = 64;
  const uintptr_t first = reinterpret_cast<uintptr_t>(tensor) + begin * sizeof(T);
  for (uintptr_t at = 0; at < tile * sizeof(T); at += line)
    __builtin_prefetch(reinterpret_cast<const void*>(first + at));
}

// The highest bit is set where a value is infinite or none. In integers, which vectorise.
FUSED_EMA_INLINE uint32_t not_finite(float value) {
  return (as_bits(value) & 0x7fffffffu) + 0x00800000u;
}

FUSED_EMA_INLINE uint64_t not_finite(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & ~(uint64_t{1} << 63)) + (uint64_t{1} << 52);
}

template <class T>
using Flags = decltype(not_finite(T{}));

template <class T>
FUSED_EMA_INLINE bool any_set(T flags) {
  return flags >> (8 * sizeof(T) - 1) != 0;
}

// Whether a rule's update may blend directly.
template <class Rule, class Scalars, class Value>
bool weights_are_low(const Scalars& scalars, Value value) {
  Value states[Rule::num_states + 1] = {};
  Weights weights;
  Rule::update(value, value, states, scalars, weights);
  return weights.low();
}

// Calls visit with the bounds of one tile after another.
template <class Visit>
void for_each_tile(int64_t count, Visit visit) {
  for (int64_t begin = 0; begin < count; begin += tile) visit(begin, std::min(count, begin + tile));
}

// What the rule reads and writes from an element on.
template <class Rule, class Layout>
struct Block {
  using Param = typename Layout::Param;
  using Weight = typename Layout::Weight;
  using State = typename Layout::State;
  static constexpr int num_states = Rule::num_states;

  Param* param;
  Weight* weight;
  const Param* grad;
  State* state[num_states + 1];
  RandomBits bits[num_states + 1];

  Block(const Piece& piece, int64_t begin) : state(), bits() {
    constexpr int master = Layout::has_master;
    param = static_cast<Param*>(piece.pointers[0]) + begin;
    weight = static_cast<Weight*>(piece.pointers[master]) + begin;
    grad = static_cast<const Param*>(piece.grad) + begin;
    for (int k = 0; k < num_states; ++k) {
      state[k] = static_cast<State*>(piece.pointers[master + 1 + k]) + begin;
      bits[k] = RandomBits(piece.key, first_state_key + k, begin);
    }
  }

  FUSED_EMA_INLINE void ask_for_tile(int64_t begin) const {
    ask_for(weight, begin);
    ask_for(grad, begin);
    if constexpr (Layout::has_master) ask_for(param, begin);
    for (int k = 0; k < num_states; ++k) ask_for(state[k], begin);
  }
};

// Values of a tile before it was stepped.
template <class Rule, class Layout>
struct Old {
  typename Layout::Weight weight[tile];
  typename Layout::State state[Rule::num_states + 1][tile];

  void restore(const Block<Rule, Layout>& to, int64_t first, int64_t last) const {
    std::copy(weight, weight + (last - first), to.weight + first);
    for (int k = 0; k < Rule::num_states; ++k)
      std::copy(state[k], state[k] + (last - first), to.state[k] + first);
  }
};

// Steps a tile; where directly, returns whether all came out finite, and keeps what it was.
// Scalars by value: behind a reference the stores might change them, and nothing would vectorise.
template <class How, class Rule, class Layout, class Scalars>
FUSED_EMA_INLINE bool step_tile(Block<Rule, Layout> to, int64_t first, int64_t last,
                                Scalars scalars, Old<Rule, Layout>& old) {
  using Param = typename Layout::Param;
  using Weight = typename Layout::Weight;
  using State = typename Layout::State;
  using Value = Compute<Weight>;
  constexpr int num_states = Rule::num_states;
  constexpr bool direct = std::is_same_v<How, Direct<Value>>;
  Flags<Value> flags = 0;
  FUSED_EMA_INDEPENDENT
  for (int64_t i = first; i < last; ++i) {
    Value states[num_states + 1];
    for (int k = 0; k < num_states; ++k) {
      const State state = to.state[k][i];
      if constexpr (direct) old.state[k][i - first] = state;
      states[k] = load(state);
    }
    const Weight weight = to.weight[i];
    if constexpr (direct) old.weight[i - first] = weight;
    Value value = load(weight);
    How how;
    Rule::update(value, load(to.grad[i]), states, scalars, how);
    if constexpr (direct) flags |= not_finite(how.seen());
    to.weight[i] = store<Weight>(value);
    if constexpr (Layout::has_master) to.param[i] = store<Param>(value);
    for (int k = 0; k < num_states; ++k) {
      if constexpr (Layout::rounded_states)
        to.state[k][i] = round_bfloat16(states[k], to.bits[k][i]);
      else
        to.state[k][i] = store<State>(states[k]);
    }
  }
  return !any_set(flags);
}

// A tile is blended directly where weights are low, and once more exactly, from what it was, where
// not all of it comes out finite.
template <class Rule, class Layout>
void rule_loop(const Piece& piece, int64_t begin, int64_t count,
               typename Rule::template Scalars<Compute<typename Layout::Weight>> scalars,
               bool low) {
  const Block<Rule, Layout> to(piece, begin);
  Old<Rule, Layout> old;
  for_each_tile(count, [=, &old](int64_t first, int64_t last) {
    to.ask_for_tile(first + ahead);
    if (low) {
      if (step_tile<Direct<Compute<typename Layout::Weight>>>(to, first, last, scalars, old))
        return;
      old.restore(to, first, last);
    }
    step_tile<Exact>(to, first, last, scalars, old);
  });
}

// Moves an average's elements one by one, whatever its format: `move` computes what `stored` keeps;
// directly or exactly, as rules are stepped.
template <class How, class Rate, class Average, class Move, class Stored>
FUSED_EMA_INLINE bool average_tile(Average* average, int64_t first, int64_t last, Move move,
                                   Stored stored, Average* old) {
  constexpr bool direct = std::is_same_v<How, Direct<Rate>>;
  Flags<Rate> flags = 0;
  FUSED_EMA_INDEPENDENT
  for (int64_t i = first; i < last; ++i) {
    const Average before = average[i];
    if constexpr (direct) old[i - first] = before;
    How how;
    const Rate moved = move(load(before), i, how);
    if constexpr (direct) flags |= not_finite(how.seen());
    average[i] = stored(moved, i);
  }
  return !any_set(flags);
}

template <class Average, class Weight, class Rate, class Move, class Stored>
FUSED_EMA_INLINE void average_loop(Average* average, const Weight* param, int64_t count, Rate rate,
                                   Move move, Stored stored) {
  Average old[tile];
  for_each_tile(count, [=, &old](int64_t first, int64_t last) {
    ask_for(average, first + ahead);
    ask_for(param, first + ahead);
    if (is_low(rate)) {
      if (average_tile<Direct<Rate>, Rate>(average, first, last, move, stored, old)) return;
      std::copy(old, old + (last - first), average + first);
    }
    average_tile<Exact, Rate>(average, first, last, move, stored, old);
  });
}

template <class Weight>
void ema_loop(Compute<Weight>* average, const Weight* param, int64_t count, Compute<Weight> rate) {
  average_loop(
      average, param, count, rate,
      [=](Compute<Weight> held, int64_t i, auto& how) {
        return ema(held, load(param[i]), rate, how);
      },
      [](Compute<Weight> value, int64_t) { return value; });
}

template <class Weight>
void rounded_ema_loop(BFloat16* average, const Weight* param, int64_t count, float rate,
                      RandomBits bits) {
  average_loop(
      average, param, count, rate,
      [=](float held, int64_t i, auto& how) { return ema(held, load(param[i]), rate, how); },
      [=](float value, int64_t i) { return round_bfloat16(value, bits[i]); });
}

template <bool before, class Weight>
void delta_loop(Half* delta, const float* old, const Weight* param, int64_t count, float rate,
                RandomBits bits) {
  average_loop(
      delta, param, count, rate,
      [=](float held, int64_t i, auto& how) {
        return ema_delta<before>(held, old[i], load(param[i]), rate, how);
      },
      [=](float value, int64_t i) { return round_half(value, bits[i]); });
}

template <class Layout>
void ema_loops(const Piece& piece, void* const* emas, const double* ema_rates, int64_t begin,
               int64_t count) {
  using Weight = typename Layout::Weight;
  const Weight* param = static_cast<const Weight*>(piece.pointers[Layout::has_master]) + begin;
  for (int k = 0; k < piece.num_emas; ++k) {
    const auto rate = static_cast<Compute<Weight>>(ema_rates[k]);
    if (piece.ema_format == EmaFormat::full) {
      ema_loop<Weight>(static_cast<Compute<Weight>*>(emas[k]) + begin, param, count, rate);
    } else if constexpr (std::is_same_v<Compute<Weight>, float>) {
      rounded_ema_loop<Weight>(static_cast<BFloat16*>(emas[k]) + begin, param, count, rate,
                               RandomBits(piece.key, k, begin));
    }
  }
}

// Steps a block whose averages are differences: they move with the parameter's change.
template <class Layout, class Step>
void delta_block(const Piece& piece, void* const* emas, const double* ema_rates, int64_t begin,
                 int64_t count, Step step) {
  using Weight = typename Layout::Weight;
  if constexpr (std::is_same_v<Compute<Weight>, float>) {
    const Weight* param = static_cast<const Weight*>(piece.pointers[Layout::has_master]) + begin;
    float old[block];
    for (int64_t i = 0; i < count; ++i) old[i] = load(param[i]);
    step();
    for (int k = 0; k < piece.num_emas; ++k) {
      const auto move = piece.ema_before ? delta_loop<true, Weight> : delta_loop<false, Weight>;
      move(static_cast<Half*>(emas[k]) + begin, old, param, count, static_cast<float>(ema_rates[k]),
           RandomBits(piece.key, k, begin));
    }
  }
}

template <class Rule, class Layout>
void step_piece(const Piece& piece) {
  using Value = Compute<typename Layout::Weight>;
  const auto scalars = scalars_of<Rule, Value>(piece.row, piece.grad_factor, piece.ratio);
  const bool low = weights_are_low<Rule>(scalars, Value(0));
  const double* ema_rates = piece.row + Rule::scalars.size();
  void* const* emas = piece.pointers + 1 + Layout::has_master + Rule::num_states;
  int64_t count = 0;
  for (int64_t begin = piece.begin; begin < piece.end; begin += count) {
    // blocks begin at multiples of their size, so that none crosses one of 2^32
    count = std::min(piece.end - begin, block - begin % block);
    const auto step = [&] {
      if (piece.grad != nullptr) rule_loop<Rule, Layout>(piece, begin, count, scalars, low);
    };
    if (piece.ema_format == EmaFormat::delta) {
      delta_block<Layout>(piece, emas, ema_rates, begin, count, step);
      continue;
    }
    if (piece.ema_before) ema_loops<Layout>(piece, emas, ema_rates, begin, count);
    step();
    if (!piece.ema_before) ema_loops<Layout>(piece, emas, ema_rates, begin, count);
  }
}

// Sums in lanes that no vector is wider than, so that every target adds in the same order.
template <class Value, class Stored>
double sum_of_squares(const Stored* from, int64_t count) {
  constexpr int lanes = 16;
  Value sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int lane = 0; lane < lanes; ++lane)
      sums[lane] += Value(load(from[i + lane])) * Value(load(from[i + lane]));
  for (int lane = 0; i < count; ++i, ++lane)
    sums[lane] += Value(load(from[i])) * Value(load(from[i]));
  double total = 0;
  for (const Value sum : sums) total += sum;
  return total;
}

// In the arithmetic's type, and in double where that one overflows.
template <class Stored>
double squares(const void* grad, int64_t begin, int64_t end) {
  const Stored* from = static_cast<const Stored*>(grad) + begin;
  const double total = sum_of_squares<Compute<Stored>>(from, end - begin);
  return is_finite(total) ? total : sum_of_squares<double>(from, end - begin);
}

// As Measure says; in double, so that hardly a bit of a ratio depends on the order.
template <class Rule, class Layout>
void measure_piece(const Piece& piece, double* sums) {
  using Value = Compute<typename Layout::Weight>;
  constexpr int num_states = Rule::num_measured, lanes = 16;
  const auto scalars = scalars_of<Rule, Value>(piece.row, piece.grad_factor, 1);
  const int64_t count = piece.end - piece.begin;
  const Block<Rule, Layout> from(piece, piece.begin);
  double weights[lanes] = {}, steps[lanes] = {};
  const auto add = [&](int64_t i, int lane) {
    Value states[num_states + 1] = {};
    for (int k = 0; k < num_states; ++k) states[k] = load(from.state[k][i]);
    const Value value = load(from.weight[i]);
    const double step = Rule::measured(value, Value(load(from.grad[i])), states, scalars);
    weights[lane] += double{value} * double{value};
    steps[lane] += step * step;
  };
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) add(i + lane, lane);
  for (int lane = 0; i < count; ++i, ++lane) add(i, lane);
  sums[0] = sums[1] = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    sums[0] += weights[lane];
    sums[1] += steps[lane];
  }
}

template <class Rule>
double ratio_of(const double* sums, const double* row) {
  return trust_of<Rule>(sums[0], sums[1], row);
}

Squares find_squares(StoredType stored) {
  Squares found = nullptr;
  with_stored_type(stored, [&](auto value) { found = squares<decltype(value)>; });
  return found;
}

KernelInfo find_kernel(const RuleId& rule, Storage storage) {
  KernelInfo found;
  with_rule(AllRules{}, rule, [&](auto candidate) {
    using Rule = decltype(candidate);
    with_layout<Rule>(storage, [&](auto layout) {
      found = {step_piece<Rule, decltype(layout)>, static_cast<int>(Rule::scalars.size())};
      if constexpr (takes_norms<Rule>) {
        found.measure = measure_piece<Rule, decltype(layout)>;
        found.ratio = ratio_of<Rule>;
      }
    });
  });
  return found;
}
