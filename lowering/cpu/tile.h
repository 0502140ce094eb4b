// The register tile that linear layers and attention share: rows of one operand are broadcast, word by word, against
// packed rows of the other, whose lanes they meet. The result is transposed: lanes are rows of the packed operand.
// A word is 4 bytes along the sum: a pair of bf16 (vdpbf16ps) or one float (fma).
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace ascend_cpu {

template <class T>
constexpr int kPer = 4 / sizeof(T);  // elements of a word

constexpr int kTileRows = 8;   // rows of the broadcast operand in one register tile
constexpr int kTileUnits = 3;  // times 16 packed rows: 8 x 3 sums, 3 loads and a broadcast fit in 32 registers
constexpr int kUnit = 16;      // packed rows in one vector
constexpr int64_t kChunk = 256;  // floats that one sum takes before it is added to the total: a long sum loses digits

// 16 words, or the n elements that are left; zero beyond.
inline __m512i load_words(const bf16* p, int64_t n) { return _mm512_maskz_loadu_epi16(mask32(n), p); }
inline __m512i load_words(const float* p, int64_t n) { return _mm512_maskz_loadu_epi32(mask16(n), p); }

template <class T>
inline __m512i load_words(const T* p) {
  return _mm512_loadu_si512(p);
}

template <class T>
inline int32_t word_at(const T* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return v;
}

template <class T>
inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
  if constexpr (std::is_same_v<T, float>)
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  else
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// out[r][lane] = dot(rows[r], x row of the lane), for MV units of packed x. Rows `ahead` elements on are
// prefetched; out is [kTileRows][kTileUnits][kUnit], and with More the products are added to what it holds.
template <class T, int MV, bool More = false>
void tile(const T* const* rows, const T* xp, int64_t unit_stride, int64_t k, int64_t ahead, float* out) {
  __m512 acc[kTileRows][MV];
  const T *w0 = rows[0], *w1 = rows[1], *w2 = rows[2], *w3 = rows[3], *w4 = rows[4], *w5 = rows[5], *w6 = rows[6],
          *w7 = rows[7];
  const auto step = [&](int64_t i, auto word) __attribute__((always_inline)) {
    __m512i x[MV];
#pragma GCC unroll 3
    for (int v = 0; v < MV; ++v) x[v] = load_words(xp + v * unit_stride + i * kUnit);
    const T* w[kTileRows] = {w0, w1, w2, w3, w4, w5, w6, w7};
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const __m512i b = _mm512_set1_epi32(word(w[r] + i));
#pragma GCC unroll 3
      for (int v = 0; v < MV; ++v) acc[r][v] = multiply_add<T>(acc[r][v], x[v], b);
    }
  };
  for (int64_t i = 0, end; i == 0 || i < k; i = end) {
    end = kPer<T> == 1 ? std::min(k, i + kChunk) : k;
    const bool first = i == 0 && !More;
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < MV; ++v) acc[r][v] = _mm512_setzero_ps();
    for (; i + 16 * kPer<T> <= end; i += 16 * kPer<T>) {
      // The next tile's rows, while they are still in memory: eight short streams start slowly on their own.
      if (ahead != 0)
        for (const T* w : {w0, w1, w2, w3, w4, w5, w6, w7}) _mm_prefetch(w + i + ahead, _MM_HINT_T1);
      for (int64_t j = 0; j < 16 * kPer<T>; j += kPer<T>) step(i + j, word_at<T>);
    }
    for (; i + kPer<T> <= end; i += kPer<T>) step(i, word_at<T>);
    if constexpr (kPer<T> == 2)
      if (i < end) step(i, [](const T* p) { return static_cast<int32_t>(*p); });
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < MV; ++v) {
        float* to = out + (r * kTileUnits + v) * kUnit;
        _mm512_store_ps(to, first ? acc[r][v] : _mm512_add_ps(acc[r][v], _mm512_load_ps(to)));
      }
  }
}

template <class T>
using Tile = void (*)(const T* const*, const T*, int64_t, int64_t, int64_t, float*);
template <class T>
constexpr Tile<T> kTiles[kTileUnits] = {tile<T, 1>, tile<T, 2>, tile<T, 3>};
template <class T>
constexpr Tile<T> kMoreTiles[kTileUnits] = {tile<T, 1, true>, tile<T, 2, true>, tile<T, 3, true>};

// Elements of one packed unit of rows of k elements.
template <class T>
constexpr int64_t unit_size(int64_t k) {
  return (k + kPer<T> - 1) / kPer<T> * kPer<T> * kUnit;
}

// Packs 16 rows of k elements: [word][row]; a null row and a last word without its second half give zeros.
template <class T>
void pack_unit(const T* const (&rows)[kUnit], int64_t k, T* to) {
  constexpr int64_t step = 16 * kPer<T>;
  for (int64_t i = 0; i < k; i += step) {
    __m512i r[kUnit];
#pragma GCC unroll 16
    for (int row = 0; row < kUnit; ++row)
      r[row] = rows[row] ? load_words(rows[row] + i, k - i) : _mm512_setzero_si512();
    transpose16(r);
    const int64_t words = std::min<int64_t>(16, (k - i + kPer<T> - 1) / kPer<T>);
    for (int64_t j = 0; j < words; ++j) _mm512_store_si512(to + i * kUnit + j * step, r[j]);
  }
}

}  // namespace ascend_cpu
