// Attention of a few rows a key head (a decode step): keys and values are streamed once, at memory speed.
//
// Scores are kept as [key][4 rows], so that a vector is 4 keys of 4 rows; more rows are done in groups of 4 while the
// keys are in the cache. Long contexts are split into chunks of keys that several threads share; their results are
// merged at the end, in the same order for any number of threads.
#include <atomic>

#include "dots.h"
#include "scores.h"

namespace ascend_cpu {
namespace {

constexpr int64_t kChunkKeys = 512;
constexpr int kRows = kDotLanes;
static_assert(kDecodeRows % kRows == 0);

struct Row {
  int64_t head, query, upto, after;  // sees the keys in (after, upto]
  const void* bias;
  const bool* mask;
};

// Of one chunk and group of rows, per row: the largest score, the sum of weights, the weighted sum of values.
struct Partial {
  float top[kRows], total[kRows];
};

// The largest (or the sum) over the 4 keys of each row, in all lanes of the row.
template <class F>
__m512 over_keys(__m512 v, F f) {
  v = f(v, _mm512_shuffle_f32x4(v, v, 0x4e));
  return f(v, _mm512_shuffle_f32x4(v, v, 0xb1));
}

// o[row][d] = sum over words of p[word][row] * v[word][d], for NV vectors of d from d0 on.
template <class T, int R, int NV>
void values(const T* v, int64_t stride, const int32_t* p, int64_t count, int64_t left, float* o, int64_t width) {
  __m512 acc[R][NV];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) acc[r][i] = _mm512_setzero_ps();
  const auto part = [&](const T* row, int i) {
    return load_words(row + i * 16 * kPer<T>, std::clamp<int64_t>(left - i * 16 * kPer<T>, 0, 16 * kPer<T>));
  };
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t j = 0; j < count; j += kPer<T>, v += kPer<T> * stride, p += kRows) {
    __m512i x[NV];
    if constexpr (kPer<T> == 1) {
#pragma GCC unroll 8
      for (int i = 0; i < NV; ++i) x[i] = part(v, i);
    } else {
      const bool pair = j + 1 < count;
#pragma GCC unroll 4
      for (int i = 0; i < NV / 2; ++i) {
        const __m512i a = part(v, i), b = pair ? part(v + stride, i) : _mm512_setzero_si512();
        x[2 * i] = _mm512_permutex2var_epi16(a, low, b);
        x[2 * i + 1] = _mm512_permutex2var_epi16(a, high, b);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i b = _mm512_set1_epi32(p[r]);
#pragma GCC unroll 8
      for (int i = 0; i < NV; ++i) acc[r][i] = multiply_add<T>(acc[r][i], x[i], b);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i)
      if (16 * i < left) _mm512_storeu_ps(o + r * width + 16 * i, acc[r][i]);
}

template <class T, int R>
void all_values(const T* v, int64_t stride, const int32_t* p, int64_t count, int64_t dv, float* o, int64_t width) {
  constexpr int NV = R <= 2 ? 8 : 4;
  for (int64_t d = 0; d < dv; d += 16 * NV) values<T, R, NV>(v + d, stride, p, count, dv - d, o + d, width);
}

template <class T>
using AllValues = void (*)(const T*, int64_t, const int32_t*, int64_t, int64_t, float*, int64_t);
template <class T>
constexpr AllValues<T> kAllValues[kRows] = {all_values<T, 1>, all_values<T, 2>, all_values<T, 3>, all_values<T, 4>};

// Scores become weights: scaled, capped, biased, masked, their maximum taken off, exponentiated; then words along the
// keys, [word][row]. s and p have room for 16 keys more than count.
template <class T>
Partial softmax(const Attention& p, const Row (&rows)[kRows], int64_t j0, int64_t count, float* s, int32_t* words) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i key_of = _mm512_srli_epi32(lane, 2), row_of = _mm512_and_si512(lane, _mm512_set1_epi32(3));
  alignas(64) int32_t upto[16], after[16];
  bool same = true;
  for (int i = 0; i < 16; ++i) {
    const Row& row = rows[i % kRows];
    upto[i] = static_cast<int32_t>(std::clamp<int64_t>(row.upto - j0, -1, count - 1));
    after[i] = static_cast<int32_t>(std::clamp<int64_t>(row.after - j0, -1, count));
    same = same && row.bias == rows[0].bias && row.mask == rows[0].mask;
  }
  const __m512i last = _mm512_load_si512(upto), first = _mm512_load_si512(after);
  const __m512i at = _mm512_add_epi32(_mm512_slli_epi32(row_of, 4), key_of);
  const __m512 hidden = _mm512_set1_ps(-kInf);
  const bool biased = p.bias || p.mask;
  __m512 top = hidden;
  for (int64_t j = 0; j < count; j += 16) {
    alignas(64) float bias[kRows * 16];
    if (biased)
      for (int r = 0; r < kRows; ++r)
        _mm512_store_ps(bias + 16 * r, r && same ? _mm512_load_ps(bias)
                                                 : row_bias(p, rows[r].bias, rows[r].mask, j0 + j, mask16(count - j)));
    for (int t = 0; t < 4; ++t) {
      float* here = s + (j + 4 * t) * kRows;
      __m512 v = _mm512_mul_ps(_mm512_load_ps(here), _mm512_set1_ps(p.softcap > 0 ? p.scale : p.scale * kLog2e));
      if (p.softcap > 0) v = _mm512_mul_ps(cap_score(v, p.softcap), _mm512_set1_ps(kLog2e));
      const __m512i key = _mm512_add_epi32(key_of, _mm512_set1_epi32(static_cast<int32_t>(j) + 4 * t));
      __mmask16 seen = _mm512_cmple_epi32_mask(key, last) & _mm512_cmpgt_epi32_mask(key, first);
      if (biased) {
        const __m512 add = _mm512_i32gather_ps(_mm512_add_epi32(at, _mm512_set1_epi32(4 * t)), bias, 4);
        v = _mm512_add_ps(v, add);
        if (p.mask) seen &= _mm512_cmp_ps_mask(add, hidden, _CMP_NEQ_UQ);
      }
      v = _mm512_mask_mov_ps(hidden, seen, v);
      _mm512_store_ps(here, v);
      top = _mm512_max_ps(v, top);
    }
  }
  top = over_keys(top, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
  const __m512 base = _mm512_mask_mov_ps(top, _mm512_cmp_ps_mask(top, hidden, _CMP_EQ_OQ), _mm512_setzero_ps());
  __m512 total = _mm512_setzero_ps();
  for (int64_t j = 0; j < count; j += 4) {
    const __m512 e = exp2_ps(_mm512_sub_ps(_mm512_load_ps(s + j * kRows), base));
    total = _mm512_add_ps(total, e);
    if constexpr (kPer<T> == 1) {
      _mm512_store_ps(reinterpret_cast<float*>(words) + j * kRows, e);
    } else {
      const __m256i pair = _mm256_set_epi16(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
      const __m256i narrow = _mm256_permutexvar_epi16(pair, (__m256i)_mm512_cvtneps_pbh(e));
      _mm256_store_si256(reinterpret_cast<__m256i*>(words + j / 2 * kRows), narrow);
    }
  }
  total = over_keys(total, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
  Partial result;
  _mm_storeu_ps(result.top, _mm512_castps512_ps128(top));
  _mm_storeu_ps(result.total, _mm512_castps512_ps128(total));
  return result;
}

// Whether no row of the group sees any of `keys` keys from j0 on. A finite bias hides too (its weights are exactly 0) if
// `finite`, which takes for granted that every row sees a key with an ordinary score.
bool hidden(const Attention& p, const Row (&rows)[kRows], int64_t j0, int64_t keys, bool finite) {
  const __m512 limit = _mm512_set1_ps(finite ? -1e38f : -kInf);
  for (int r = 0; r < kRows; ++r) {
    const Row& row = rows[r];
    const int64_t from = std::max(j0, row.after + 1), to = std::min(j0 + keys, row.upto + 1);
    if (from >= to) continue;
    if (!p.bias && !p.mask) return false;
    if (r && row.bias == rows[r - 1].bias && row.mask == rows[r - 1].mask && row.query == rows[r - 1].query) continue;
    for (int64_t j = from; j < to; j += 16) {
      const __mmask16 live = mask16(to - j);
      if (_mm512_mask_cmp_ps_mask(live, row_bias(p, row.bias, row.mask, j, live), limit, _CMP_NLE_UQ)) return false;
    }
  }
  return true;
}

struct Queries;
struct Sums;

// False if it must be done again without `skip`: keys were skipped because of a finite bias, and a row turned out to
// see no other.
template <class T>
bool decode(const Attention& p, bool skip) {
  const int64_t per_key = p.hq / p.hk, count = per_key * p.sq, heads = p.batch * p.hk;
  const int64_t groups = (count + kRows - 1) / kRows, each = (count + groups - 1) / groups;  // rows of a group
  const int64_t chunks = (p.sk + kChunkKeys - 1) / kChunkKeys, width = (p.dv + 15) / 16 * 16;
  // Of each (head, chunk, group): the weighted sums of its rows, then its Partial.
  const int64_t size = kRows * width + sizeof(Partial) / sizeof(float);
  float* sums = static_cast<float*>(scratch<Sums>(heads * chunks * groups * size * sizeof(float)));

  const auto row_at = [&](int64_t b, int64_t h, int64_t i) {
    const int64_t head = h * per_key + i / p.sq, query = i % p.sq, bytes = p.bias_is_float ? 4 : 2;
    Row row{head, query, query + p.last, query + p.last - p.window, nullptr, nullptr};
    if (p.bias)
      row.bias = static_cast<const char*>(p.bias) +
                 bytes * (b * p.bias_stride[0] + head * p.bias_stride[1] + query * p.bias_stride[2]);
    if (p.mask) row.mask = p.mask + b * p.mask_stride[0] + head * p.mask_stride[1] + query * p.mask_stride[2];
    return row;
  };

  parallel(heads * chunks, [&](int64_t item) {
    const int64_t b = item / chunks / p.hk, h = item / chunks % p.hk, j0 = item % chunks * kChunkKeys;
    const int64_t keys = std::min(kChunkKeys, p.sk - j0);
    const T* k = static_cast<const T*>(p.k) + b * p.k_stride[0] + h * p.k_stride[1] + j0 * p.k_stride[2];
    const T* v = static_cast<const T*>(p.v) + b * p.v_stride[0] + h * p.v_stride[1] + j0 * p.v_stride[2];
    T* packed = static_cast<T*>(scratch<Queries>(dots_size<T>(each, p.d) * sizeof(T)));
    alignas(64) float s[(kChunkKeys + 16) * kRows];
    alignas(64) int32_t words[(kChunkKeys + 16) * kRows];
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t mine = std::min(each, count - g * each);
      Row rows[kRows];
      for (int64_t i = 0; i < kRows; ++i) rows[i] = row_at(b, h, g * each + std::min(i, mine - 1));
      float* o = sums + (item * groups + g) * size;
      Partial& partial = *reinterpret_cast<Partial*>(o + kRows * width);
      if (hidden(p, rows, j0, keys, skip)) {
        std::fill(o, o + kRows * width, 0.f);
        std::fill_n(partial.top, kRows, -kInf);
        std::fill_n(partial.total, kRows, 0.f);
        continue;
      }
      for (int64_t i = 0; i < mine; ++i)
        pack_dots(static_cast<const T*>(p.q) + b * p.q_stride[0] + rows[i].head * p.q_stride[1] +
                      rows[i].query * p.q_stride[2],
                  i, mine, p.d, packed);
      kDotRows<T>[mine - 1](k, p.k_stride[2], p.d, packed, keys, s);
      std::fill(s + keys * kRows, s + (keys + 15) / 16 * 16 * kRows, 0.f);
      partial = softmax<T>(p, rows, j0, keys, s, words);
      kAllValues<T>[mine - 1](v, p.v_stride[2], words, keys, p.dv, o, width);
    }
  });

  std::atomic<bool> good{true};
  parallel(heads * count, [&](int64_t item) {
    const int64_t head = item / count, i = item % count, b = head / p.hk, g = i / each, lane = i % each;
    const Row row = row_at(b, head % p.hk, i);
    const auto sum_of = [&](int64_t c) { return sums + ((head * chunks + c) * groups + g) * size; };
    const auto partial = [&](int64_t c) -> const Partial& {
      return *reinterpret_cast<const Partial*>(sum_of(c) + kRows * width);
    };
    const float sink = p.sinks ? p.sinks[row.head] * kLog2e : -kInf;
    float top = sink;
    for (int64_t c = 0; c < chunks; ++c) top = std::max(top, partial(c).top[lane]);
    if (skip && p.bias && !(top > -1e36f)) good = false;
    const float base = top == -kInf ? 0.f : top;
    __m512 total = exp2_ps(_mm512_set1_ps(sink - base));
    for (int64_t c = 0; c < chunks; ++c)
      total = _mm512_fmadd_ps(exp2_ps(_mm512_set1_ps(partial(c).top[lane] - base)),
                              _mm512_set1_ps(partial(c).total[lane]), total);
    const __mmask16 empty = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_EQ_OQ);
    if (empty && p.empty_rows) p.empty_rows[(b * p.hq + row.head) * p.sq + row.query] = true;
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.f), total);
    T* y = static_cast<T*>(p.y) + b * p.y_stride[0] + row.head * p.y_stride[1] + row.query * p.y_stride[2];
    for (int64_t d = 0; d < p.dv; d += 16) {
      __m512 v = _mm512_setzero_ps();
      for (int64_t c = 0; c < chunks; ++c)
        v = _mm512_fmadd_ps(exp2_ps(_mm512_set1_ps(partial(c).top[lane] - base)),
                            _mm512_loadu_ps(sum_of(c) + lane * width + d), v);
      v = _mm512_mask_mov_ps(_mm512_mul_ps(v, inverse), empty, _mm512_set1_ps(p.empty));
      store(y + d, v, mask16(p.dv - d));
    }
  });
  return good;
}

template <class T>
void decode(const Attention& p) {
  if (!decode<T>(p, p.bias != nullptr)) decode<T>(p, false);
}

}  // namespace

void run_decode(const Attention& p) {
  if (p.dtype == Dtype::f32)
    decode<float>(p);
  else
    decode<bf16>(p);
}

}  // namespace ascend_cpu
