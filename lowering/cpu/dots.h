// Dot products of many rows, streamed once from memory, with up to four packed ones.
#pragma once

#include "rows.h"
#include "tile.h"

namespace ascend_cpu {

constexpr int kDotLanes = 4;  // packed rows at most; sums kept per streamed row

// The sums over the lanes of each of four vectors.
inline __m128 sum_lanes(const __m512 (&v)[4]) {
  const auto fold = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const __m512d lo = _mm512_castps_pd(fold(v[0], v[1])), hi = _mm512_castps_pd(fold(v[2], v[3]));
  const __m512 t =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi)), _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi)));
  const __m256 u = _mm256_add_ps(_mm512_castps512_ps256(t), _mm512_extractf32x8_ps(t, 1));
  return _mm_add_ps(_mm256_castps256_ps128(u), _mm256_extractf128_ps(u, 1));
}

// Rows one stride apart, and rows wherever they are, of which those some rows on are prefetched: what the processor
// expects next is seldom there.
template <class S>
struct Apart {
  const S* base;
  int64_t stride;
  const S* operator()(int64_t row) const { return base + row * stride; }
  void prefetch(int64_t, int64_t, int64_t) const {}
};

template <class S>
struct Scattered {
  const S* const* at;  // goes on for kMore rows more than there are
  int64_t offset;      // of what is read in each row
  int64_t ahead;       // rows, less than kMore
  static constexpr int64_t kMore = 9;
  const S* operator()(int64_t row) const { return at[row] + offset; }
  void prefetch(int64_t row, int64_t k, int64_t elements) const {
    if (k < elements) _mm_prefetch(reinterpret_cast<const char*>(at[row + ahead] + offset + k), _MM_HINT_T0);
  }
};

// out[row][i] = dot(w row, x row i), i < 4, with x as [K/16 words][M][16 words], zero beyond K. One weight row at a
// time: two interleaved streams halve what the memory delivers. U sums per row of x hide the multiplier's latency.
// With `more` the products are added to what out holds.
template <class T, class S, int M, class Rows>
void dot_rows_of(const Rows& rows_at, int64_t elements, const T* x, int64_t rows, float* out, bool more = false) {
  constexpr int U = M == 1 ? 8 : M == 2 ? 4 : 2;
  constexpr int64_t step = 16 * kPer<T>, line = 64 / sizeof(S);
  for (int64_t row = 0; row < rows; ++row) {
    const S* w = rows_at(row);
    for (int64_t k = 0; k < elements; k += line) rows_at.prefetch(row, k, elements);
    __m512 acc[M][U];
#pragma GCC unroll 3
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) acc[i][u] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + step * U <= elements; k += step * U) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        const __m512i a = words_from<T>(w + k + step * u);
#pragma GCC unroll 3
        for (int i = 0; i < M; ++i)
          acc[i][u] = multiply_add<T>(acc[i][u], a, load_words(x + (k + step * u) * M + step * i));
      }
    }
    for (; k < elements; k += step) {
      const __m512i a = words_from<T>(w + k, elements - k);
#pragma GCC unroll 3
      for (int i = 0; i < M; ++i) acc[i][0] = multiply_add<T>(acc[i][0], a, load_words(x + k * M + step * i));
    }
    __m512 sums[kDotLanes];
#pragma GCC unroll 4
    for (int i = 0; i < kDotLanes; ++i) {
      sums[i] = i < M ? acc[i < M ? i : 0][0] : _mm512_setzero_ps();
      if (i < M)
#pragma GCC unroll 8
        for (int u = 1; u < U; ++u) sums[i] = _mm512_add_ps(sums[i], acc[i < M ? i : 0][u]);
    }
    float* to = out + row * kDotLanes;
    const __m128 sum = sum_lanes(sums);
    _mm_storeu_ps(to, more ? _mm_add_ps(sum, _mm_loadu_ps(to)) : sum);
  }
}

template <class T, int M>
void dot_rows(const T* w, int64_t stride, int64_t elements, const T* x, int64_t rows, float* out) {
  dot_rows_of<T, T, M>(Apart<T>{w, stride}, elements, x, rows, out);
}

template <class T>
using DotRows = void (*)(const T*, int64_t, int64_t, const T*, int64_t, float*);
template <class T>
constexpr DotRows<T> kDotRows[kDotLanes] = {dot_rows<T, 1>, dot_rows<T, 2>, dot_rows<T, 3>, dot_rows<T, 4>};

// Elements of `rows` packed rows of k elements.
template <class T>
constexpr int64_t dots_size(int64_t rows, int64_t k) {
  return rows * ((k + 16 * kPer<T> - 1) / (16 * kPer<T>) * 16 * kPer<T>);
}

// Packs one of `rows` rows for dot_rows. Together in one piece: rows that lie a multiple of 4 KiB apart would evict
// each other from the first cache.
template <class T>
void pack_dots(const T* row, int64_t i, int64_t rows, int64_t k, T* to) {
  constexpr int64_t step = 16 * kPer<T>;
  for (int64_t j = 0; j < k; j += step) _mm512_store_si512(to + j * rows + step * i, load_words(row + j, k - j));
}

}  // namespace ascend_cpu
