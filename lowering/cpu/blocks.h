// A block of keys for attention of many rows: its rows and values, whatever they are stored as, and its weights.
#pragma once

#include "rows.h"
#include "scores.h"
#include "values.h"

namespace ascend_cpu {

constexpr int64_t kKeys = 128;  // keys of one block
constexpr int kMaxRows = kTileUnits * kUnit;

// A block of rows: at their places, or widened into `wide` (with room for kKeys of them) if they are stored otherwise.
template <class T>
void read_rows(const Attention& p, const Stored& t, int64_t b, int64_t h, int64_t j0, int64_t count, int64_t d,
               T* wide, const T** to) {
  if constexpr (std::is_same_v<T, bf16>) {
    rows_of(p, t, b, h, j0, count, to);
  } else {
    with_stored<T>(p.stored, [&]<class S>(const S*) {
      if constexpr (std::is_same_v<T, S>) {
        rows_of(p, t, b, h, j0, count, to);
      } else {
        const S* rows[kKeys];
        alignas(64) float scale[kKeys];
        const int64_t stride = (d + 15) / 16 * 16;
        rows_of(p, t, b, h, j0, count, rows);
        if (t.scale) scales_of(p, t, h, j0, count, scale);
        pack_values(rows, t.scale ? scale : nullptr, count, d, stride, wide);
        for (int64_t i = 0; i < count; ++i) to[i] = wide + i * stride;
      }
    });
  }
}

// A block of values, packed.
template <class T>
void read_values(const Attention& p, int64_t b, int64_t h, int64_t j0, int64_t count, int64_t width, T* to) {
  with_stored<T>(p.stored, [&]<class S>(const S*) {
    const S* rows[kKeys];
    alignas(64) float scale[kKeys];
    rows_of(p, p.v, b, h, j0, count, rows);
    if (p.v.scale) scales_of(p, p.v, h, j0, count, scale);
    pack_values(rows, p.v.scale ? scale : nullptr, count, p.dv, width, to);
  });
}

// exp2(s * scale - top) as words along the keys; returns their sum. A missing second key counts nothing.
template <class T>
__m512 exponentials(const float* s, int64_t count, __m512 scale, __m512 top, T* to) {
  const auto weight = [&](int64_t j) {
    return exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(s + j * kMaxRows), scale, top));
  };
  __m512 sum = _mm512_setzero_ps(), sum1 = sum;
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t j = 0; j < count; ++j) {
      const __m512 a = weight(j);
      sum = _mm512_add_ps(sum, a);
      _mm512_store_ps(to + j * kMaxRows, a);
    }
  } else {
    alignas(64) static constexpr uint16_t kPair[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i pair = _mm512_load_si512(kPair);
    const auto emit = [&](int64_t j, __m512 a, __m512 b) {
      sum = _mm512_add_ps(sum, a);
      sum1 = _mm512_add_ps(sum1, b);
      const __m512i words = (__m512i)_mm512_cvtne2ps_pbh(b, a);
      _mm512_store_si512(to + j * kMaxRows, _mm512_permutexvar_epi16(pair, words));
    };
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) emit(j, weight(j), weight(j + 1));
    if (j < count) emit(j, weight(j), _mm512_setzero_ps());
  }
  return _mm512_add_ps(sum, sum1);
}

}  // namespace ascend_cpu
