// Attention of a few rows a key head (a decode step): keys and values are streamed once, at memory speed, and widened
// in registers where they are stored in fewer bits. A call holds several problems, one for each sequence in pages.
//
// Scores are kept as [key][4 rows], so that a vector is 4 keys of 4 rows; more rows are done in groups of 4 while the
// keys are in the cache. Long contexts are split into chunks of keys that several threads share; their results are
// merged at the end, in the same order for any number of threads.
#include <atomic>
#include <vector>

#include "scores.h"
#include "stream.h"

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

// Scores become weights: scaled, capped, biased, masked, their maximum taken off, exponentiated; then words along the
// keys, [word][row], in the place of s, which has room for 16 keys more than count. Quantised keys and values come with
// their scales.
template <class T>
Partial softmax(const Attention& p, const Row (&rows)[kRows], int64_t j0, int64_t count, float* s,
                const float* k_scale, const float* v_scale) {
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
  const auto scaled = [&](__m512 v, const float* by) {
    return by ? _mm512_mul_ps(v, _mm512_permutexvar_ps(key_of, _mm512_castps128_ps512(_mm_loadu_ps(by)))) : v;
  };
  __m512 top = hidden;
  for (int64_t j = 0; j < count; j += 16) {
    alignas(64) float bias[kRows * 16];
    if (biased)
      for (int r = 0; r < kRows; ++r)
        _mm512_store_ps(bias + 16 * r, r && same ? _mm512_load_ps(bias)
                                                 : row_bias(p, rows[r].bias, rows[r].mask, j0 + j, mask16(count - j)));
    for (int t = 0; t < 4; ++t) {
      float* here = s + (j + 4 * t) * kRows;
      __m512 v = scaled(_mm512_load_ps(here), k_scale ? k_scale + j + 4 * t : nullptr);
      v = _mm512_mul_ps(v, _mm512_set1_ps(p.softcap > 0 ? p.scale : p.scale * kLog2e));
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
    __m512 e = exp2_ps(_mm512_sub_ps(_mm512_load_ps(s + j * kRows), base));
    total = _mm512_add_ps(total, e);
    e = scaled(e, v_scale ? v_scale + j : nullptr);
    if constexpr (kPer<T> == 1) {
      _mm512_store_ps(s + j * kRows, e);
    } else {
      const __m256i pair = _mm256_set_epi16(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
      const __m256i narrow = _mm256_permutexvar_epi16(pair, (__m256i)_mm512_cvtneps_pbh(e));
      _mm256_store_si256(reinterpret_cast<__m256i*>(s + j / 2 * kRows), narrow);
    }
  }
  total = over_keys(total, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
  Partial result;
  _mm_storeu_ps(result.top, _mm512_castps512_ps128(top));
  _mm_storeu_ps(result.total, _mm512_castps512_ps128(total));
  return result;
}

// Whether no row of the group sees any of `keys` keys from j0 on. A finite bias hides too (its weights are exactly 0)
// if `finite`, which takes for granted that every row sees a key with an ordinary score.
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
struct Scores;
struct Sums;

// How the rows and keys of one problem are divided.
struct Plan {
  const Attention* p;
  int64_t count, groups, each, chunks;  // rows of a key head, in groups of at most `each`; pieces of its keys
  int64_t sums;                         // where its partial results begin, in floats

  explicit Plan(const Attention& a)
      : p(&a), count(a.hq / a.hk * a.sq), groups((count + kRows - 1) / kRows), each((count + groups - 1) / groups),
        chunks((a.sk + kChunkKeys - 1) / kChunkKeys), sums(0) {}

  Row row_at(int64_t b, int64_t h, int64_t i) const {
    const int64_t head = h * (p->hq / p->hk) + i / p->sq, query = i % p->sq, bytes = p->bias_is_float ? 4 : 2;
    Row row{head, query, query + p->last, query + p->last - p->window, nullptr, nullptr};
    if (p->bias)
      row.bias = static_cast<const char*>(p->bias) +
                 bytes * (b * p->bias_stride[0] + head * p->bias_stride[1] + query * p->bias_stride[2]);
    if (p->mask) row.mask = p->mask + b * p->mask_stride[0] + head * p->mask_stride[1] + query * p->mask_stride[2];
    return row;
  }
};

int64_t width_of(const Attention& p) { return (p.dv + 15) / 16 * 16; }

// Up to kRows rows of one key head, while they meet a chunk of keys.
template <class T>
struct Group {
  int64_t head, count;  // key head; rows
  Row rows[kRows];
  T *q, *q2;         // packed
  float *scores, *o;  // of the chunk; the weighted sums of the rows, then their Partial
};

constexpr int64_t kScores = (kChunkKeys + 16) * kRows;  // floats of a group's scores
constexpr int64_t kBlockBytes = 32 << 10;  // read for one head after the other where heads lie side by side
constexpr int64_t kNearKeys = 256;         // pages of so many keys or fewer are read whole, a head after the other
constexpr int64_t kMaxGroups = 16;         // that meet a chunk together

// One chunk of the keys of `heads` key heads from h0 on. Heads that lie side by side in memory are done a block of keys
// at a time, the next block being fetched in the order of memory: each head for itself would read crumbs.
template <class T, class S>
void attend(const Plan& plan, int64_t b, int64_t h0, int64_t heads, int64_t chunk, bool skip, float* sums,
            int64_t size) {
  const Attention& p = *plan.p;
  const int64_t j0 = std::max(chunk * kChunkKeys, p.table ? p.first() : 0), width = width_of(p);
  const int64_t keys = std::max<int64_t>(0, std::min(p.sk, (chunk + 1) * kChunkKeys) - j0);
  const int64_t q_size = dots_size<T>(plan.each, p.d), q2_size = dots_size<T>(plan.each, p.d2);
  T* packed = static_cast<T*>(scratch<Queries>(heads * plan.groups * (q_size + q2_size) * sizeof(T)));
  float* scores = static_cast<float*>(scratch<Scores>(heads * plan.groups * kScores * sizeof(float)));
  std::vector<Group<T>> seen;
  for (int64_t h = h0; h < h0 + heads; ++h)
    for (int64_t g = 0; g < plan.groups; ++g) {
      Group<T> group{h, std::min(plan.each, plan.count - g * plan.each), {}, packed, packed + q_size, scores,
                     sums + (((b * p.hk + h) * plan.chunks + chunk) * plan.groups + g) * size};
      for (int64_t i = 0; i < kRows; ++i)
        group.rows[i] = plan.row_at(b, h, g * plan.each + std::min(i, group.count - 1));
      if (hidden(p, group.rows, j0, keys, skip)) {
        Partial& partial = *reinterpret_cast<Partial*>(group.o + kRows * width);
        std::fill(group.o, group.o + kRows * width, 0.f);
        std::fill_n(partial.top, kRows, -kInf);
        std::fill_n(partial.total, kRows, 0.f);
        continue;
      }
      const auto pack = [&](const void* q, const int64_t (&stride)[3], int64_t d, T* to) {
        for (int64_t i = 0; i < group.count; ++i)
          pack_dots(static_cast<const T*>(q) + b * stride[0] + group.rows[i].head * stride[1] +
                        group.rows[i].query * stride[2],
                    i, group.count, d, to);
      };
      pack(p.q, p.q_stride, p.d, group.q);
      if (p.d2) pack(p.q2, p.q2_stride, p.d2, group.q2);
      seen.push_back(group);
      packed += q_size + q2_size;
      scores += kScores;
    }
  if (seen.empty()) return;

  // Calls body(group, rows, first key of a block, its length), and meanwhile fetches the next block.
  const auto blocks = [&](const Stored& t, int64_t d, auto body) {
    const S* at[kChunkKeys + Scattered<S>::kMore];
    rows_of(p, t, b, h0, j0, keys, at);
    std::fill_n(at + keys, Scattered<S>::kMore, at[keys - 1]);
    const int64_t bytes = d * sizeof(S), row = heads * bytes;
    const int64_t step = heads > 1 ? std::clamp<int64_t>(kBlockBytes / row / 2 * 2, 2, kChunkKeys) : keys;
    const bool by_token = t.stride[1] < t.stride[2];
    const int64_t parts = seen.size();
    for (int64_t j = 0; j < keys; j += step) {
      const int64_t count = std::min(step, keys - j), next = j + count, ahead = std::min(step, keys - next);
      for (int64_t i = 0; i < parts; ++i) {
        if (heads > 1)
          for (int64_t r = ahead * heads * i / parts; r < ahead * heads * (i + 1) / parts; ++r) {
            const int64_t key = next + (by_token ? r / heads : r % ahead), head = by_token ? r % heads : r / ahead;
            const char* from = reinterpret_cast<const char*>(at[key] + head * t.stride[1]);
            for (int64_t k = 0; k < bytes; k += 64) _mm_prefetch(from + k, _MM_HINT_T1);
          }
        const int64_t offset = (seen[i].head - h0) * t.stride[1];
        body(seen[i], Scattered<S>{at + j, offset, heads > 1 ? 2 : 8}, j, count);
      }
    }
  };
  blocks(p.k, p.d, [&](const Group<T>& g, const Scattered<S>& k, int64_t j, int64_t count) {
    kAllDots<T, S>[g.count - 1](k, p.d, g.q, count, g.scores + j * kRows, false);
  });
  if (p.d2)
    blocks(p.k2, p.d2, [&](const Group<T>& g, const Scattered<S>& k, int64_t j, int64_t count) {
      kAllDots<T, S>[g.count - 1](k, p.d2, g.q2, count, g.scores + j * kRows, true);
    });
  alignas(64) float k_scale[kChunkKeys], v_scale[kChunkKeys];
  for (const Group<T>& g : seen) {
    if (p.k.scale) scales_of(p, p.k, g.head, j0, keys, k_scale);
    if (p.v.scale) scales_of(p, p.v, g.head, j0, keys, v_scale);
    std::fill(g.scores + keys * kRows, g.scores + (keys + 15) / 16 * 16 * kRows, 0.f);
    *reinterpret_cast<Partial*>(g.o + kRows * width) = softmax<T>(
        p, g.rows, j0, keys, g.scores, p.k.scale ? k_scale : nullptr, p.v.scale ? v_scale : nullptr);
  }
  blocks(p.v, p.dv, [&](const Group<T>& g, const Scattered<S>& v, int64_t j, int64_t count) {
    const int32_t* words = reinterpret_cast<const int32_t*>(g.scores) + j / kPer<T> * kRows;
    kAllValues<T, S>[g.count - 1](v, words, count, p.dv, g.o, width, j > 0);
  });
}

// How many key heads are done together: those that lie side by side, if that leaves work for all threads. No result
// depends on it.
int64_t heads_together(const std::vector<Plan>& plans) {
  const Attention& p = *plans.front().p;
  const auto near = [&](const Stored& t) {
    return t.stride[1] < t.stride[2] || (p.table && t.stride[1] <= kNearKeys * t.stride[2]);
  };
  if (!near(p.k) || !near(p.v)) return 1;
  int64_t chunks = 0, groups = 1;
  for (const Plan& plan : plans) {
    chunks += plan.p->batch * plan.chunks;
    groups = std::max(groups, plan.groups);
  }
  for (int64_t heads = p.hk; heads > 1; --heads)
    if (p.hk % heads == 0 && heads * groups <= kMaxGroups && chunks * (p.hk / heads) >= 2 * threads()) return heads;
  return 1;
}

// Writes row i of a key head from the partial results of its chunks. False if keys were skipped because of a finite
// bias, and the row turned out to see no other.
template <class T>
bool finish(const Plan& plan, int64_t head, int64_t i, bool skip, const float* sums, int64_t size) {
  const Attention& p = *plan.p;
  const int64_t b = head / p.hk, g = i / plan.each, lane = i % plan.each, width = width_of(p);
  const Row row = plan.row_at(b, head % p.hk, i);
  const auto sum_of = [&](int64_t c) { return sums + ((head * plan.chunks + c) * plan.groups + g) * size; };
  const auto partial = [&](int64_t c) -> const Partial& {
    return *reinterpret_cast<const Partial*>(sum_of(c) + kRows * width);
  };
  const float sink = p.sinks ? p.sinks[row.head] * kLog2e : -kInf;
  float top = sink;
  for (int64_t c = 0; c < plan.chunks; ++c) top = std::max(top, partial(c).top[lane]);
  const float base = top == -kInf ? 0.f : top;
  __m512 total = exp2_ps(_mm512_set1_ps(sink - base));
  for (int64_t c = 0; c < plan.chunks; ++c)
    total = _mm512_fmadd_ps(exp2_ps(_mm512_set1_ps(partial(c).top[lane] - base)),
                            _mm512_set1_ps(partial(c).total[lane]), total);
  const __mmask16 empty = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_EQ_OQ);
  if (empty && p.empty_rows) p.empty_rows[(b * p.hq + row.head) * p.sq + row.query] = true;
  const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.f), total);
  T* y = static_cast<T*>(p.y) + b * p.y_stride[0] + row.head * p.y_stride[1] + row.query * p.y_stride[2];
  for (int64_t d = 0; d < p.dv; d += 16) {
    __m512 v = _mm512_setzero_ps();
    for (int64_t c = 0; c < plan.chunks; ++c)
      v = _mm512_fmadd_ps(exp2_ps(_mm512_set1_ps(partial(c).top[lane] - base)),
                          _mm512_loadu_ps(sum_of(c) + lane * width + d), v);
    v = _mm512_mask_mov_ps(_mm512_mul_ps(v, inverse), empty, _mm512_set1_ps(p.empty));
    store(y + d, v, mask16(p.dv - d));
  }
  return !(skip && p.bias && !(top > -1e36f));
}

// False if it must be done again without `skip`.
template <class T, class S>
bool decode(const Attention* list, int64_t problems, bool skip) {
  std::vector<Plan> plans;
  std::vector<int64_t> pieces{0}, rows{0};
  int64_t floats = 0;
  const int64_t size = kRows * width_of(*list) + sizeof(Partial) / sizeof(float);
  for (int64_t i = 0; i < problems; ++i) {
    Plan& plan = plans.emplace_back(list[i]);
    plan.sums = floats;
    floats += list[i].batch * list[i].hk * plan.chunks * plan.groups * size;
    rows.push_back(rows.back() + list[i].batch * list[i].hk * plan.count);
  }
  const int64_t heads = heads_together(plans);
  for (const Plan& plan : plans) pieces.push_back(pieces.back() + plan.p->batch * plan.p->hk / heads * plan.chunks);
  float* sums = static_cast<float*>(scratch<Sums>(floats * sizeof(float)));
  parallel(pieces.back(), [&](int64_t piece) {
    const int64_t i = problem_of(pieces, piece), item = piece - pieces[i];
    const Plan& plan = plans[i];
    const int64_t head = item / plan.chunks * heads, hk = plan.p->hk;
    attend<T, S>(plan, head / hk, head % hk, heads, item % plan.chunks, skip, sums + plan.sums, size);
  });
  std::atomic<bool> good{true};
  parallel(rows.back(), [&](int64_t row) {
    const int64_t i = problem_of(rows, row), item = row - rows[i];
    const Plan& plan = plans[i];
    if (!finish<T>(plan, item / plan.count, item % plan.count, skip, sums + plan.sums, size)) good = false;
  });
  return good;
}

template <class T>
void decode(const Attention* list, int64_t problems) {
  with_stored<T>(list->stored, [&]<class S>(const S*) {
    if (!decode<T, S>(list, problems, list->bias != nullptr)) decode<T, S>(list, problems, false);
  });
}

}  // namespace

void run_decode(const Attention* list, int64_t problems) {
  if (list->dtype == Dtype::f32)
    decode<float>(list, problems);
  else
    decode<bf16>(list, problems);
}

}  // namespace ascend_cpu
