// The two products of a decode step: queries with keys, and weights with values, over rows that lie anywhere.
#pragma once

#include "dots.h"

namespace ascend_cpu {

// o[row][d] = sum over words of p[word][row] * v[word][d], for NV vectors of d from d0 on; `left` of them are there.
// With `more` the sum begins with what o holds.
template <class T, class S, int R, int NV>
void values(const Scattered<S>& v, int64_t d0, const int32_t* p, int64_t count, int64_t left, float* o, int64_t width,
            bool more) {
  __m512 acc[R][NV];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i)
      acc[r][i] = more && 16 * i < left ? _mm512_loadu_ps(o + r * width + 16 * i) : _mm512_setzero_ps();
  const auto part = [&](const S* row, int i) {
    const int64_t at = i * 16 * kPer<T>;
    return words_from<T>(row + d0 + at, std::clamp<int64_t>(left - at, 0, 16 * kPer<T>));
  };
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t j = 0; j < count; j += kPer<T>, p += kDotLanes) {
    for (int64_t i = 0; i < kPer<T>; ++i)
      for (int64_t d = 0; d < NV * 16; d += 64 / sizeof(S)) v.prefetch(j + i, d0 + d, d0 + left);
    __m512i x[NV];
    if constexpr (kPer<T> == 1) {
#pragma GCC unroll 8
      for (int i = 0; i < NV; ++i) x[i] = part(v(j), i);
    } else {
      const bool pair = j + 1 < count;
#pragma GCC unroll 4
      for (int i = 0; i < NV / 2; ++i) {
        const __m512i a = part(v(j), i), b = pair ? part(v(j + 1), i) : _mm512_setzero_si512();
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

template <class T, class S, int R>
void all_values(const Scattered<S>& v, const int32_t* p, int64_t count, int64_t dv, float* o, int64_t width,
                bool more) {
  constexpr int NV = R <= 2 ? 8 : 4;
  for (int64_t d = 0; d < dv; d += 16 * NV) values<T, S, R, NV>(v, d, p, count, dv - d, o + d, width, more);
}

template <class S>
using AllValues = void (*)(const Scattered<S>&, const int32_t*, int64_t, int64_t, float*, int64_t, bool);
template <class T, class S>
constexpr AllValues<S> kAllValues[kDotLanes] = {all_values<T, S, 1>, all_values<T, S, 2>, all_values<T, S, 3>,
                                            all_values<T, S, 4>};

template <class T, class S, int M>
void all_dots(const Scattered<S>& k, int64_t elements, const T* x, int64_t rows, float* out, bool more) {
  dot_rows_of<T, S, M>(k, elements, x, rows, out, more);
}

template <class T, class S>
using AllDots = void (*)(const Scattered<S>&, int64_t, const T*, int64_t, float*, bool);
template <class T, class S>
constexpr AllDots<T, S> kAllDots[kDotLanes] = {all_dots<T, S, 1>, all_dots<T, S, 2>, all_dots<T, S, 3>,
                                               all_dots<T, S, 4>};

}  // namespace ascend_cpu
