// The experts of a mixture, straight from the plain [E, N, K] weights: two grouped products over slots sorted by expert.
//
// An expert with few slots has its weight streamed once at memory speed (dots.h); one with many has its rows packed as
// lanes and the words of its weight broadcast against them (tile.h), as in linear.cpp. All experts share one list of
// work items, blocks of weight rows, which the threads take in turn: one barrier a product, whatever the routing.
#include "moe.h"

#include <vector>

#include "dots.h"
#include "tile.h"

namespace ascend_cpu {
namespace {

constexpr int64_t kFew = 3;           // with more slots the tiles are faster
constexpr int64_t kFewBytes = 65536;  // weight bytes of one work item of an expert with few slots
constexpr int64_t kFewBlock = 256;    // and at most so many weight rows
constexpr int64_t kBlock = 64;        // weight rows of one work item of an expert with many
constexpr int64_t kPackAlone = 131072;  // elements that one thread packs sooner than two have been woken

// One of the two products. `rows[s]` is the input of slot s, [k]; `out + s * n` its result.
template <class T>
struct Product {
  const Experts& p;
  const std::vector<const T*>& rows;
  const T* w;
  const T* bias;
  T* out;
  int64_t n, k, expert_stride, row_stride;
  bool gated;

  // Row j of the gate (half 0) or of up (half 1); of the plain weight if not gated.
  int64_t row_of(int64_t j, int half) const {
    if (!gated) return j;
    return p.interleaved ? 2 * j + half : j + half * n;
  }
  int64_t step() const { return gated && p.interleaved ? 2 * row_stride : row_stride; }
};

struct Item {
  int32_t expert;
  int32_t first, count;  // weight rows
};

template <class T>
__m512 bias_at(const T* bias, const Product<T>& q, int64_t j, int half, __mmask16 mask) {
  if (!q.gated || !q.p.interleaved) return load(bias + q.row_of(j, half), mask);
  alignas(64) float turns[16];
  for (int i = 0; i < 16; ++i) turns[i] = 0.f;
  for (int i = 0; i < 16 && (mask >> i & 1); ++i) {
    const __m512 one = load(bias + q.row_of(j + i, half), 1);
    turns[i] = _mm512_cvtss_f32(one);
  }
  return _mm512_load_ps(turns);
}

// Results [j, j + 16) of one slot of expert e, from the sums (and, if gated, those of up).
template <class T>
void finish_slot(const Product<T>& q, int64_t e, int64_t slot, int64_t j, __m512 v, __m512 up, __mmask16 mask) {
  const Experts& p = q.p;
  if (q.bias) {
    const T* bias = q.bias + e * q.n * (q.gated ? 2 : 1);
    v = _mm512_add_ps(v, bias_at(bias, q, j, 0, mask));
    if (q.gated) up = _mm512_add_ps(up, bias_at(bias, q, j, 1, mask));
  }
  if (q.gated) {
    if (p.limited) {  // min and max give their second operand for NaN: a NaN of the sums stays
      const __m512 high = _mm512_set1_ps(p.limit), low = _mm512_set1_ps(-p.limit);
      v = _mm512_min_ps(high, v);
      up = _mm512_max_ps(low, _mm512_min_ps(high, up));
    }
    v = p.alpha == 1.f ? activate(p.act, v) : _mm512_mul_ps(v, sigmoid(_mm512_mul_ps(v, _mm512_set1_ps(p.alpha))));
    if (p.shift != 0.f) up = _mm512_add_ps(up, _mm512_set1_ps(p.shift));
    v = _mm512_mul_ps(v, up);
  }
  store(q.out + slot * q.n + j, v, mask);
}

template <class T>
void few(const Product<T>& q, const Item& item, int64_t begin, int64_t m, const T* packed) {
  alignas(64) float sums[2][kFewBlock * kDotLanes];
  const T* w = q.w + item.expert * q.expert_stride;
  for (int half = 0; half < (q.gated ? 2 : 1); ++half)
    kDotRows<T>[m - 1](w + q.row_of(item.first, half) * q.row_stride, q.step(), q.k, packed, item.count, sums[half]);
  const __m512i column = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(kDotLanes));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < item.count; j += 16) {
      const __mmask16 mask = mask16(item.count - j);
      const auto sum = [&](int half) {
        return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, column, sums[half] + j * kDotLanes + i, 4);
      };
      const __m512 v = sum(0);
      finish_slot(q, item.expert, begin + i, item.first + j, v, q.gated ? sum(1) : v, mask);
    }
}

template <class T>
void many(const Product<T>& q, const Item& item, int64_t begin, int64_t m, const T* packed) {
  alignas(64) float sums[2][kBlock * kTileUnits * kUnit];
  const T* w = q.w + item.expert * q.expert_stride;
  const int64_t units = (m + kUnit - 1) / kUnit, unit_stride = unit_size<T>(q.k);
  const int64_t panels = (units + kTileUnits - 1) / kTileUnits;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t u0 = units * panel / panels, mv = units * (panel + 1) / panels - u0;
    const int64_t ahead = panel == 0 ? kTileRows * q.step() : 0;
    for (int half = 0; half < (q.gated ? 2 : 1); ++half)
      for (int64_t j = 0; j < item.count; j += kTileRows) {
        const T* rows[kTileRows];
        for (int r = 0; r < kTileRows; ++r)
          rows[r] = w + q.row_of(item.first + std::min<int64_t>(j + r, item.count - 1), half) * q.row_stride;
        kTiles<T>[mv - 1](rows, packed + u0 * unit_stride, unit_stride, q.k, ahead,
                          sums[half] + j * kTileUnits * kUnit);
      }
    for (int64_t u = 0; u < mv; ++u)
      for (int64_t j = 0; j < item.count; j += 16) {
        __m512i v[16], up[16];
        for (int r = 0; r < 16; ++r) v[r] = _mm512_load_si512(sums[0] + ((j + r) * kTileUnits + u) * kUnit);
        transpose16(v);
        if (q.gated) {
          for (int r = 0; r < 16; ++r) up[r] = _mm512_load_si512(sums[1] + ((j + r) * kTileUnits + u) * kUnit);
          transpose16(up);
        }
        const int64_t slot = (u0 + u) * kUnit, rows = std::min<int64_t>(kUnit, m - slot);
        for (int64_t r = 0; r < rows; ++r)
          finish_slot(q, item.expert, begin + slot + r, item.first + j, _mm512_castsi512_ps(v[r]),
                      _mm512_castsi512_ps(q.gated ? up[r] : v[r]), mask16(item.count - j));
      }
  }
}

struct PackedRows;

template <class T>
void product(const Product<T>& q) {
  const int32_t* start = q.p.start;
  std::vector<int64_t> offset(q.p.experts);
  std::vector<Item> items;
  std::vector<std::pair<int32_t, int32_t>> units;  // (expert, unit) to pack; unit -1: a few rows
  int64_t size = 0;
  const int64_t row_bytes = std::max<int64_t>(q.k, 1) * sizeof(T) * (q.gated ? 2 : 1);
  const int64_t few_block = (std::clamp<int64_t>(kFewBytes / row_bytes, 16, kFewBlock) + 15) / 16 * 16;
  for (int32_t e = 0; e < q.p.experts; ++e) {
    const int64_t m = start[e + 1] - start[e];
    if (m == 0) continue;
    offset[e] = size;
    const bool short_list = m <= kFew;
    size += short_list ? dots_size<T>(m, q.k) : (m + kUnit - 1) / kUnit * unit_size<T>(q.k);
    size = (size + 31) / 32 * 32;  // 64-byte alignment in either dtype
    if (short_list) units.emplace_back(e, -1);
    else
      for (int32_t u = 0; u * kUnit < m; ++u) units.emplace_back(e, u);
    const int64_t block = short_list ? few_block : kBlock;
    for (int64_t j = 0; j < q.n; j += block)
      items.push_back({e, static_cast<int32_t>(j), static_cast<int32_t>(std::min(block, q.n - j))});
  }
  T* packed = static_cast<T*>(scratch<PackedRows>(size * sizeof(T)));
  const auto pack = [&](int64_t i) {
    const auto [e, unit] = units[i];
    const int64_t m = start[e + 1] - start[e];
    T* to = packed + offset[e];
    if (unit < 0) {
      for (int64_t s = 0; s < m; ++s) pack_dots(q.rows[start[e] + s], s, m, q.k, to);
      return;
    }
    const T* rows[kUnit];
    for (int64_t r = 0; r < kUnit; ++r) {
      const int64_t s = unit * kUnit + r;
      rows[r] = s < m ? q.rows[start[e] + s] : nullptr;
    }
    pack_unit(rows, q.k, to + unit * unit_size<T>(q.k));
  };
  const int64_t jobs = static_cast<int64_t>(units.size());
  if (q.p.slots * q.k <= kPackAlone)
    for (int64_t i = 0; i < jobs; ++i) pack(i);
  else
    parallel(jobs, pack);
  parallel(static_cast<int64_t>(items.size()), [&](int64_t i) {
    const Item& item = items[i];
    const int64_t begin = start[item.expert], m = start[item.expert + 1] - begin;
    (m <= kFew ? few<T> : many<T>)(q, item, begin, m, packed + offset[item.expert]);
  });
}

struct Hidden;

template <class T>
void experts(const Experts& p) {
  T* hidden = static_cast<T*>(scratch<Hidden>(p.slots * p.inner * sizeof(T)));
  std::vector<const T*> rows(p.slots);
  for (int64_t s = 0; s < p.slots; ++s) rows[s] = static_cast<const T*>(p.x) + p.token[s] * p.x_stride;
  product<T>({p, rows, static_cast<const T*>(p.w_up), static_cast<const T*>(p.b_up), hidden, p.inner, p.k, p.up_stride,
              p.up_row, true});
  for (int64_t s = 0; s < p.slots; ++s) rows[s] = hidden + s * p.inner;
  product<T>({p, rows, static_cast<const T*>(p.w_down), static_cast<const T*>(p.b_down), static_cast<T*>(p.y), p.k,
              p.inner, p.down_stride, p.down_row, false});
}

template <class T>
void combine(const Combine& p) {
  const auto one = [&](int64_t t) {
    const float* weight = p.weight + t * p.top_k;
    const int32_t* place = p.place + t * p.top_k;
    T* out = static_cast<T*>(p.out) + t * p.k;
    for (int64_t j = 0; j < p.k; j += 16) {
      const __mmask16 mask = mask16(p.k - j);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = 0; i < p.top_k; ++i)
        if (place[i] >= 0)
          sum = _mm512_fmadd_ps(load(static_cast<const T*>(p.y) + place[i] * p.k + j, mask),
                                _mm512_set1_ps(weight[i]), sum);
      store(out + j, sum, mask);
    }
  };
  if (p.tokens * p.top_k * p.k <= kPackAlone)
    for (int64_t t = 0; t < p.tokens; ++t) one(t);
  else
    parallel((p.tokens + 15) / 16, [&](int64_t b) {
      for (int64_t t = 16 * b; t < std::min(p.tokens, 16 * b + 16); ++t) one(t);
    });
}

}  // namespace

void run_experts(const Experts& p) { p.dtype == Dtype::f32 ? experts<float>(p) : experts<bf16>(p); }
void run_combine(const Combine& p) { p.dtype == Dtype::f32 ? combine<float>(p) : combine<bf16>(p); }

}  // namespace ascend_cpu
