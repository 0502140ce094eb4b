// The second product of attention: values, packed as words along the keys, broadcast against packed weights.
#pragma once

#include "tile.h"

namespace ascend_cpu {

// Words of values along the keys, [word][dv rounded up to 16]; keys beyond count and columns beyond dv are zero.
inline void pack_values(const bf16* const* v, const float*, int64_t count, int64_t dv, int64_t width, bf16* to) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t j = 0; j < count; j += 2)
    for (int64_t i = 0; i < width; i += 32) {
      const __mmask32 mask = i < dv ? mask32(dv - i) : 0;
      const __m512i a = _mm512_maskz_loadu_epi16(mask, v[j] + i);
      const __m512i b = j + 1 < count ? _mm512_maskz_loadu_epi16(mask, v[j + 1] + i) : _mm512_setzero_si512();
      bf16* at = to + j * width + 2 * i;
      _mm512_store_si512(at, _mm512_permutex2var_epi16(a, low, b));
      if (i + 16 < width) _mm512_store_si512(at + 32, _mm512_permutex2var_epi16(a, high, b));
    }
}

// Rows of what is stored as S, widened and, with scales, multiplied by theirs.
template <class S>
inline void pack_values(const S* const* v, const float* scale, int64_t count, int64_t dv, int64_t width, float* to) {
  for (int64_t j = 0; j < count; ++j) {
    const __m512 unit = _mm512_set1_ps(scale ? scale[j] : 1.f);
    for (int64_t i = 0; i < width; i += 16)
      _mm512_store_ps(to + j * width + i, _mm512_mul_ps(load(v[j] + i, i < dv ? mask16(dv - i) : 0), unit));
  }
}

// o[d][unit] = o * alpha + sum over words of v[word][d] * p[word][unit], for 8 values of d.
template <class T, int MV>
void values_tile(const T* v, int64_t width, const T* p, int64_t words, const __m512* alpha, float* o) {
  __m512 acc[kTileRows][MV];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
    for (int u = 0; u < MV; ++u)
      acc[r][u] = _mm512_mul_ps(_mm512_load_ps(o + (r * kTileUnits + u) * kUnit), alpha[u]);
  for (int64_t j = 0; j < words; ++j) {
    __m512i x[MV];
#pragma GCC unroll 3
    for (int u = 0; u < MV; ++u) x[u] = load_words(p + (j * kTileUnits + u) * kUnit * kPer<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const __m512i b = _mm512_set1_epi32(word_at(v + (j * width + r) * kPer<T>));
#pragma GCC unroll 3
      for (int u = 0; u < MV; ++u) acc[r][u] = multiply_add<T>(acc[r][u], x[u], b);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
    for (int u = 0; u < MV; ++u) _mm512_store_ps(o + (r * kTileUnits + u) * kUnit, acc[r][u]);
}

template <class T>
using ValuesTile = void (*)(const T*, int64_t, const T*, int64_t, const __m512*, float*);
template <class T>
constexpr ValuesTile<T> kValuesTiles[kTileUnits] = {values_tile<T, 1>, values_tile<T, 2>, values_tile<T, 3>};

}  // namespace ascend_cpu
