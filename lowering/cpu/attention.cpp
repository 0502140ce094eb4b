// Attention on AVX-512 (bf16: AVX-512-BF16), in one pass over the keys (flash attention) with the queries in the lanes.
//
// The scores of a block of keys are computed transposed, [key][query], with rows of k broadcast against packed
// queries. So softmax is elementwise over vectors (no sums across lanes), and its result, made words along the keys,
// already is the packed operand of the second product, against which words of v are broadcast. All query heads that
// share a key head are rows of one problem: grouped heads need no repeated k and v, and one decode step fills lanes.
//
// A call holds several problems, one for each sequence in pages. What is stored in fewer bits than it is computed in is
// widened a block at a time.
#include <memory>
#include <vector>

#include "blocks.h"
#include "scores.h"

namespace ascend_cpu {
namespace {

constexpr int64_t kItems = 64;        // pieces of work that keep many threads busy, if the keys can be split that far
constexpr int64_t kSplitKeys = 512;   // fewest keys of one piece

// Where the rows of one unit are.
struct Unit {
  int64_t head[kUnit], query[kUnit];
  const void* bias[kUnit];
  const bool* mask[kUnit];
  bool same_bias;  // one bias row serves all lanes
  int64_t first, last;  // smallest and largest query
  __m512i upto, after;  // each lane sees the keys in (after, upto]
};

struct Item {
  const Attention& p;
  int64_t b, head, row0, rows;  // key head; rows [row0, row0 + rows) of its (group, query) rows
  const void* packed_values;    // of this key head, or null
};

Unit locate(const Item& it, int64_t u) {
  const Attention& p = it.p;
  Unit unit;
  alignas(64) int32_t upto[kUnit], after[kUnit];
  unit.first = p.sq;
  unit.last = -1;
  unit.same_bias = true;
  for (int64_t i = 0; i < kUnit; ++i) {
    const int64_t row = it.row0 + std::min(u * kUnit + i, it.rows - 1);  // spare lanes repeat the last row
    const int64_t h = it.head * (p.hq / p.hk) + row / p.sq, q = row % p.sq;
    unit.head[i] = h;
    unit.query[i] = q;
    unit.first = std::min(unit.first, q);
    unit.last = std::max(unit.last, q);
    upto[i] = static_cast<int32_t>(std::clamp<int64_t>(q + p.last, -1, p.sk - 1));
    after[i] = static_cast<int32_t>(std::clamp<int64_t>(q + p.last - p.window, -1, p.sk));
    const int64_t size = p.bias_is_float ? 4 : 2;
    unit.bias[i] = p.bias ? static_cast<const char*>(p.bias) + size * (it.b * p.bias_stride[0] +
                                h * p.bias_stride[1] + q * p.bias_stride[2]) : nullptr;
    unit.mask[i] = p.mask ? p.mask + it.b * p.mask_stride[0] + h * p.mask_stride[1] + q * p.mask_stride[2] : nullptr;
    unit.same_bias = unit.same_bias && unit.bias[i] == unit.bias[0] && unit.mask[i] == unit.mask[0];
  }
  unit.upto = _mm512_load_si512(upto);
  unit.after = _mm512_load_si512(after);
  return unit;
}

enum class Cover { hidden, open, mixed };

// What bias and mask do to a block of keys: hide it from all lanes, nothing at all, or something between. A finite
// bias hides (its weights are exactly 0) once every lane has seen a key without it, which `top` tells.
Cover cover(const Attention& p, const Unit& unit, int64_t j0, int64_t count, __m512 top) {
  const float limit = _mm512_cmp_ps_mask(top, _mm512_set1_ps(-1e36f), _CMP_GT_OQ) == 0xffff ? -1e38f : -kInf;
  bool visible = false, changed = false;
  for (int64_t i = 0; i < (unit.same_bias ? 1 : kUnit); ++i)
    for (int64_t j = 0; j < count; j += 16) {
      const __mmask16 live = mask16(count - j);
      const __m512 v = row_bias(p, unit.bias[i], unit.mask[i], j0 + j, live);
      visible = visible || _mm512_mask_cmp_ps_mask(live, v, _mm512_set1_ps(limit), _CMP_NLE_UQ);
      changed = changed || _mm512_mask_cmp_ps_mask(live, v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      if (visible && changed) return Cover::mixed;
    }
  return visible ? Cover::open : Cover::hidden;
}

// Scales, caps and masks the scores of keys [j0, j0 + count) of one unit in place, times log2(e), and returns the
// larger of their maximum and `top`. s is [key][kTileUnits][kUnit].
__m512 mask_scores(const Attention& p, const Unit& unit, int64_t j0, int64_t count, float* s, __m512 top) {
  const bool biased = p.bias || p.mask;
  const __m512 scale = _mm512_set1_ps(p.softcap > 0 ? p.scale : p.scale * kLog2e);
  const __m512 hidden = _mm512_set1_ps(-kInf);
  for (int64_t j = 0; j < count; j += 16) {
    const int64_t live = std::min<int64_t>(16, count - j);
    __m512i bias[16];
    if (biased) {
      const int rows = unit.same_bias ? 1 : 16;
      for (int i = 0; i < rows; ++i)
        bias[i] = _mm512_castps_si512(row_bias(p, unit.bias[i], unit.mask[i], j0 + j, mask16(live)));
      if (rows == 16) transpose16(bias);
    }
    for (int64_t i = 0; i < live; ++i) {
      float* at = s + (j + i) * kMaxRows;
      __m512 v = _mm512_mul_ps(_mm512_load_ps(at), scale);
      if (p.softcap > 0) v = _mm512_mul_ps(cap_score(v, p.softcap), _mm512_set1_ps(kLog2e));
      const __m512i key = _mm512_set1_epi32(static_cast<int32_t>(j0 + j + i));
      __mmask16 seen = _mm512_cmple_epi32_mask(key, unit.upto) & _mm512_cmpgt_epi32_mask(key, unit.after);
      if (biased) {
        const __m512i lane = _mm512_set1_epi32(static_cast<int>(i));
        const __m512 add = _mm512_castsi512_ps(unit.same_bias ? _mm512_permutexvar_epi32(lane, bias[0]) : bias[i]);
        v = _mm512_add_ps(v, add);
        // A masked score is replaced, even if it is NaN; an additive -inf is added.
        if (p.mask) seen &= _mm512_cmp_ps_mask(add, hidden, _CMP_NEQ_UQ);
      }
      v = _mm512_mask_mov_ps(hidden, seen, v);
      _mm512_store_ps(at, v);
      top = _mm512_max_ps(v, top);
    }
  }
  return top;
}

struct Queries;
struct Keys;
struct Values;
struct Sums;

// What a pass over some of the keys leaves behind: the largest score of each row, the sum of its weights, and the
// weighted sum of values, [dv rounded up to 16][kMaxRows].
struct State {
  __m512 top[kTileUnits], total[kTileUnits];
  float* o;
};

// Attention of the rows of one item to keys [from, to). The sinks count with the first keys.
template <class T>
void attend(const Item& it, const Unit* unit, int64_t from, int64_t to, State& state) {
  const Attention& p = it.p;
  const int64_t units = (it.rows + kUnit - 1) / kUnit, width = (p.dv + 15) / 16 * 16;
  const int64_t unit_stride = unit_size<T>(p.d), unit_stride2 = unit_size<T>(p.d2);
  T* packed = static_cast<T*>(scratch<Queries>(units * (unit_stride + unit_stride2) * sizeof(T)));
  T* packed2 = packed + units * unit_stride;
  const int64_t wide_size = p.stored == p.dtype ? 0 : kKeys * ((std::max(p.d, p.d2) + 15) / 16 * 16);
  T* wide = wide_size ? static_cast<T*>(scratch<Keys>(wide_size * sizeof(T))) : nullptr;
  T* values = it.packed_values ? nullptr : static_cast<T*>(scratch<Values>(kKeys * width * sizeof(T)));
  __m512 *top = state.top, *total = state.total, alpha[kTileUnits];
  for (int64_t d = 0; d < width; ++d) std::fill_n(state.o + d * kMaxRows, units * kUnit, 0.f);
  alignas(64) float s[kKeys * kMaxRows];
  alignas(64) T weights[kKeys * kMaxRows];

  const bool sinks = p.sinks && from == 0;
  int64_t end = 0, begin = p.sk, always_end = p.sk, always_begin = 0;
  for (int64_t u = 0; u < units; ++u) {
    const T* rows[kUnit];
    alignas(64) float sink[kUnit];
    for (int64_t i = 0; i < kUnit; ++i) {
      rows[i] = static_cast<const T*>(p.q) + it.b * p.q_stride[0] + unit[u].head[i] * p.q_stride[1] +
                unit[u].query[i] * p.q_stride[2];
      sink[i] = sinks ? p.sinks[unit[u].head[i]] * kLog2e : -kInf;
    }
    pack_unit(rows, p.d, packed + u * unit_stride);
    if (p.d2) {
      for (int64_t i = 0; i < kUnit; ++i)
        rows[i] = static_cast<const T*>(p.q2) + it.b * p.q2_stride[0] + unit[u].head[i] * p.q2_stride[1] +
                  unit[u].query[i] * p.q2_stride[2];
      pack_unit(rows, p.d2, packed2 + u * unit_stride2);
    }
    top[u] = _mm512_load_ps(sink);
    total[u] = _mm512_set1_ps(sinks ? 1.f : 0.f);
    // Keys [begin, end) are seen by some lane, keys [always_begin, always_end) by all.
    end = std::max(end, std::min(p.sk, unit[u].last + p.last + 1));
    always_end = std::min(always_end, unit[u].first + p.last + 1);
    begin = std::min(begin, std::max<int64_t>(0, unit[u].first + p.last - p.window + 1));
    always_begin = std::max(always_begin, unit[u].last + p.last - p.window + 1);
  }
  begin = std::max(begin / kKeys * kKeys, from);
  end = std::min(end, to);

  const __m512 scale = _mm512_set1_ps(p.scale * kLog2e), one = _mm512_set1_ps(1.f);
  const bool biased = p.bias || p.mask;
  for (int64_t j0 = begin; j0 < end; j0 += kKeys) {
    const int64_t count = std::min(kKeys, end - j0), words = (count + kPer<T> - 1) / kPer<T>;
    bool hidden = biased, open = true;
    for (int64_t u = 0; biased && u < units; ++u) {
      const Cover c = cover(p, unit[u], j0, count, top[u]);
      hidden = hidden && c == Cover::hidden;
      open = open && c == Cover::open;
    }
    if (hidden) continue;
    const auto products = [&](const Stored& k, int64_t d, Tile<T> tile, const T* queries, int64_t stride) {
      const T* rows[kKeys + kTileRows];
      read_rows(p, k, it.b, it.head, j0, count, d, wide, rows);
      std::fill_n(rows + count, kTileRows, rows[count - 1]);
      for (int64_t j = 0; j < count; j += kTileRows) tile(rows + j, queries, stride, d, 0, s + j * kMaxRows);
    };
    products(p.k, p.d, kTiles<T>[units - 1], packed, unit_stride);
    if (p.d2) products(p.k2, p.d2, kMoreTiles<T>[units - 1], packed2, unit_stride2);
    const bool plain = open && p.softcap == 0 && p.scale > 0 && j0 >= always_begin && j0 + count <= always_end;
    for (int64_t u = 0; u < units; ++u) {
      float* mine = s + u * kUnit;
      __m512 now = top[u];
      if (plain) {
        __m512 raw = _mm512_set1_ps(-kInf);
        for (int64_t j = 0; j < count; ++j) raw = _mm512_max_ps(_mm512_load_ps(mine + j * kMaxRows), raw);
        now = _mm512_max_ps(_mm512_mul_ps(raw, scale), now);
      } else {
        now = mask_scores(p, unit[u], j0, count, mine, now);
      }
      // A lane that has seen nothing yet has -inf here, and -inf - -inf must not become NaN.
      const __mmask16 none = _mm512_cmp_ps_mask(now, _mm512_set1_ps(-kInf), _CMP_EQ_OQ);
      const __m512 base = _mm512_mask_mov_ps(now, none, _mm512_setzero_ps());
      alpha[u] = exp2_ps(_mm512_sub_ps(top[u], base));
      const __m512 sum = exponentials(mine, count, plain ? scale : one, base, weights + u * kUnit * kPer<T>);
      total[u] = _mm512_fmadd_ps(total[u], alpha[u], sum);
      top[u] = now;
    }
    const T* block = values;
    if (it.packed_values)
      block = static_cast<const T*>(it.packed_values) + j0 * width;
    else
      read_values(p, it.b, it.head, j0, count, width, values);
    for (int64_t d = 0; d < p.dv; d += kTileRows)
      kValuesTiles<T>[units - 1](block + kPer<T> * d, width, weights, words, alpha, state.o + d * kMaxRows);
  }
}

// Adds the second state to the first.
void merge(State& a, const State& b, int64_t units, int64_t dv) {
  for (int64_t u = 0; u < units; ++u) {
    const __m512 top = _mm512_max_ps(a.top[u], b.top[u]);
    const __mmask16 none = _mm512_cmp_ps_mask(top, _mm512_set1_ps(-kInf), _CMP_EQ_OQ);
    const __m512 base = _mm512_mask_mov_ps(top, none, _mm512_setzero_ps());
    const __m512 x = exp2_ps(_mm512_sub_ps(a.top[u], base)), y = exp2_ps(_mm512_sub_ps(b.top[u], base));
    const auto sum = [&](__m512 v, __m512 w) { return _mm512_fmadd_ps(w, y, _mm512_mul_ps(v, x)); };
    a.top[u] = top;
    a.total[u] = sum(a.total[u], b.total[u]);
    for (int64_t d = 0; d < dv; ++d) {
      float* to = a.o + d * kMaxRows + u * kUnit;
      _mm512_store_ps(to, sum(_mm512_load_ps(to), _mm512_load_ps(b.o + d * kMaxRows + u * kUnit)));
    }
  }
}

// Writes the rows of the result.
template <class T>
void finish(const Item& it, const Unit* unit, const State& state) {
  const Attention& p = it.p;
  for (int64_t u = 0; u < (it.rows + kUnit - 1) / kUnit; ++u) {
    const __mmask16 empty = _mm512_cmp_ps_mask(state.total[u], _mm512_setzero_ps(), _CMP_EQ_OQ);
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.f), state.total[u]);
    const int64_t rows = std::min<int64_t>(kUnit, it.rows - u * kUnit);
    for (int64_t i = 0; empty && p.empty_rows && i < rows; ++i)
      if (empty >> i & 1) p.empty_rows[(it.b * p.hq + unit[u].head[i]) * p.sq + unit[u].query[i]] = true;
    for (int64_t d = 0; d < p.dv; d += 16) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        const __m512 sum = _mm512_mul_ps(_mm512_load_ps(state.o + (d + i) * kMaxRows + u * kUnit), inverse);
        r[i] = _mm512_castps_si512(_mm512_mask_mov_ps(sum, empty, _mm512_set1_ps(p.empty)));
      }
      transpose16(r);
      for (int64_t i = 0; i < rows; ++i)
        store(static_cast<T*>(p.y) + it.b * p.y_stride[0] + unit[u].head[i] * p.y_stride[1] +
                  unit[u].query[i] * p.y_stride[2] + d,
              _mm512_castsi512_ps(r[i]), mask16(p.dv - d));
    }
  }
}

// How one problem is divided: into panels of rows of a key head, and its keys into splits.
struct Plan {
  const Attention* p;
  int64_t rows, units, panels, heads, items, width, blocks;
  int64_t step, splits, size;          // keys of a split, splits, floats of a State's sums
  int64_t head_size, packed, partial;  // elements of a head's packed values; where those and the partial sums begin

  explicit Plan(const Attention& a)
      : p(&a), rows(a.hq / a.hk * a.sq), units((rows + kUnit - 1) / kUnit),
        panels((units + kTileUnits - 1) / kTileUnits), heads(a.batch * a.hk), items(heads * panels),
        width((a.dv + 15) / 16 * 16), blocks((a.sk + kKeys - 1) / kKeys), step(a.sk), splits(1),
        size(width * kMaxRows), head_size((a.sk + 1) / 2 * 2 * width), packed(0), partial(0) {}

  // Few rows over many keys: the keys are split too. By shape alone, so that every number of threads rounds alike.
  void split(int64_t all_items) {
    const int64_t most = std::min(kItems / all_items, (p->sk + kSplitKeys - 1) / kSplitKeys);
    if (most > 1) step = ((p->sk + most - 1) / most + kKeys - 1) / kKeys * kKeys;
    splits = (p->sk + step - 1) / step;
  }

  template <class T>
  Item item(int64_t i, const T* values) const {
    // Heads stay together for the cache; under a causal mask the last rows are the longest, so they go first.
    const int64_t head = i / panels, panel = panels - 1 - i % panels;
    const int64_t u0 = units * panel / panels, u1 = units * (panel + 1) / panels;
    return Item{*p, head / p->hk, head % p->hk, u0 * kUnit, std::min(rows, u1 * kUnit) - u0 * kUnit,
                panels > 1 ? values + packed + head * head_size : nullptr};
  }
};

template <class T>
void attention(const Attention* list, int64_t problems) {
  std::vector<Plan> plans;
  std::vector<int64_t> blocks{0}, pieces{0}, merged{0};  // numbers of blocks to pack, pieces of work, items to merge
  int64_t packed_size = 0, partial_size = 0, all_items = 0;
  for (int64_t i = 0; i < problems; ++i) all_items += plans.emplace_back(list[i]).items;
  for (Plan& plan : plans) {
    plan.split(all_items);
    plan.packed = packed_size;
    plan.partial = partial_size;
    const int64_t splits = plan.splits > 1 ? plan.items * plan.splits : 0;
    packed_size += plan.panels > 1 ? plan.heads * plan.head_size : 0;
    partial_size += splits;
    blocks.push_back(blocks.back() + (plan.panels > 1 ? plan.heads * plan.blocks : 0));
    pieces.push_back(pieces.back() + plan.items * plan.splits);
    merged.push_back(merged.back() + (splits ? plan.items : 0));
  }
  Buffer packed(packed_size * sizeof(T));
  T* values = static_cast<T*>(packed.data());
  parallel(blocks.back(), [&](int64_t piece) {
    const int64_t n = problem_of(blocks, piece), i = piece - blocks[n];
    const Plan& plan = plans[n];
    const Attention& p = *plan.p;
    const int64_t head = i / plan.blocks, j = i % plan.blocks * kKeys;
    T* to = values + plan.packed + head * plan.head_size + j * plan.width;
    read_values(p, head / p.hk, head % p.hk, j, std::min(kKeys, p.sk - j), plan.width, to);
  });

  const auto locate_all = [](const Item& it, Unit (&unit)[kTileUnits]) {
    for (int64_t u = 0; u < (it.rows + kUnit - 1) / kUnit; ++u) unit[u] = locate(it, u);
  };
  const int64_t size = plans.front().size;  // alike in all: one dv
  Buffer partial(partial_size * size * sizeof(float));
  std::unique_ptr<State[]> states(partial_size ? new State[partial_size] : nullptr);
  parallel(pieces.back(), [&](int64_t piece) {
    const int64_t n = problem_of(pieces, piece), i = piece - pieces[n];
    const Plan& plan = plans[n];
    const Item it = plan.item(i / plan.splits, values);
    const int64_t sk = plan.p->sk;
    Unit unit[kTileUnits];
    locate_all(it, unit);
    if (plan.splits > 1) {
      State& state = states[plan.partial + i];
      state.o = static_cast<float*>(partial.data()) + (plan.partial + i) * size;
      attend<T>(it, unit, i % plan.splits * plan.step, std::min(sk, (i % plan.splits + 1) * plan.step), state);
    } else {
      State state;
      state.o = static_cast<float*>(scratch<Sums>(size * sizeof(float)));
      attend<T>(it, unit, 0, sk, state);
      finish<T>(it, unit, state);
    }
  });
  parallel(merged.back(), [&](int64_t piece) {
    const int64_t n = problem_of(merged, piece), i = piece - merged[n];
    const Plan& plan = plans[n];
    const Item it = plan.item(i, values);
    Unit unit[kTileUnits];
    locate_all(it, unit);
    State* state = &states[plan.partial + i * plan.splits];
    for (int64_t j = 1; j < plan.splits; ++j) merge(*state, state[j], (it.rows + kUnit - 1) / kUnit, plan.p->dv);
    finish<T>(it, unit, *state);
  });
}

}  // namespace

void run_attention(const Attention* list, int64_t problems) {
  // A batch may hold prompts and single steps.
  std::vector<Attention> few, many;
  for (int64_t i = 0; i < problems; ++i)
    (list[i].hq / list[i].hk * list[i].sq <= kDecodeRows ? few : many).push_back(list[i]);
  if (!few.empty()) run_decode(few.data(), few.size());
  if (many.empty()) return;
  if (list->dtype == Dtype::f32)
    attention<float>(many.data(), many.size());
  else
    attention<bf16>(many.data(), many.size());
}

}  // namespace ascend_cpu
