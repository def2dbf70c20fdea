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

constexpr Exact exact;

// Calls visit with the bounds of one tile after another.
template <class Visit>
void for_each_tile(int64_t count, Visit visit) {
  for (int64_t begin = 0; begin < count; begin += tile) visit(begin, std::min(count, begin + tile));
}

// Scalars by value: behind a reference the stores might change them, and nothing would vectorise.
template <class Rule, class Layout>
void rule_loop(void* const* pointers, const void* grads, int64_t begin, int64_t count,
               typename Rule::template Scalars<Compute<typename Layout::Weight>> scalars,
               uint32_t key) {
  using Param = typename Layout::Param;
  using Weight = typename Layout::Weight;
  using State = typename Layout::State;
  constexpr int num_states = Rule::num_states, first = Layout::has_master;
  Param* param = static_cast<Param*>(pointers[0]) + begin;
  Weight* weight = static_cast<Weight*>(pointers[first]) + begin;
  const Param* grad = static_cast<const Param*>(grads) + begin;
  State* state[num_states + 1] = {};
  for (int k = 0; k < num_states; ++k)
    state[k] = static_cast<State*>(pointers[first + 1 + k]) + begin;
  RandomBits bits[num_states + 1];
  for (int k = 0; k < num_states; ++k) bits[k] = RandomBits(key, first_state_key + k, begin);
  for_each_tile(count, [&](int64_t first, int64_t last) {
    ask_for(weight, first + ahead);
    ask_for(grad, first + ahead);
    if constexpr (Layout::has_master) ask_for(param, first + ahead);
    for (int k = 0; k < num_states; ++k) ask_for(state[k], first + ahead);
    FUSED_EMA_INDEPENDENT
    for (int64_t i = first; i < last; ++i) {
      Compute<Weight> states[num_states + 1];
      for (int k = 0; k < num_states; ++k) states[k] = load(state[k][i]);
      Compute<Weight> value = load(weight[i]);
      Rule::update(value, load(grad[i]), states, scalars, exact);
      weight[i] = store<Weight>(value);
      if constexpr (Layout::has_master) param[i] = store<Param>(value);
      for (int k = 0; k < num_states; ++k) {
        if constexpr (Layout::rounded_states)
          state[k][i] = round_bfloat16(states[k], bits[k][i]);
        else
          state[k][i] = store<State>(states[k]);
      }
    }
  });
}

// Moves an average's elements one by one, whatever its format.
template <class Average, class Weight, class Move>
FUSED_EMA_INLINE void average_loop(Average* average, const Weight* param, int64_t count,
                                   Move move) {
  for_each_tile(count, [&](int64_t first, int64_t last) {
    ask_for(average, first + ahead);
    ask_for(param, first + ahead);
    FUSED_EMA_INDEPENDENT
    for (int64_t i = first; i < last; ++i) average[i] = move(i);
  });
}

template <class Weight>
void ema_loop(Compute<Weight>* average, const Weight* param, int64_t count, Compute<Weight> rate) {
  average_loop(average, param, count,
               [=](int64_t i) { return ema(average[i], load(param[i]), rate, exact); });
}

template <class Weight>
void rounded_ema_loop(BFloat16* average, const Weight* param, int64_t count, float rate,
                      RandomBits bits) {
  average_loop(average, param, count, [=](int64_t i) {
    const float value = ema(load(average[i]), load(param[i]), rate, exact);
    return round_bfloat16(value, bits[i]);
  });
}

template <bool before, class Weight>
void delta_loop(Half* delta, const float* old, const Weight* param, int64_t count, float rate,
                RandomBits bits) {
  average_loop(delta, param, count, [=](int64_t i) {
    const float value = ema_delta<before>(load(delta[i]), old[i], load(param[i]), rate, exact);
    return round_half(value, bits[i]);
  });
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
  const auto scalars = scalars_of<Rule, Value>(piece.row, piece.grad_factor);
  const double* ema_rates = piece.row + Rule::scalars.size();
  void* const* emas = piece.pointers + 1 + Layout::has_master + Rule::num_states;
  int64_t count = 0;
  for (int64_t begin = piece.begin; begin < piece.end; begin += count) {
    // blocks begin at multiples of their size, so that none crosses one of 2^32
    count = std::min(piece.end - begin, block - begin % block);
    const auto step = [&] {
      if (piece.grad != nullptr)
        rule_loop<Rule, Layout>(piece.pointers, piece.grad, begin, count, scalars, piece.key);
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
    });
  });
  return found;
}
