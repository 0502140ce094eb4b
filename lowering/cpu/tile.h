// The register tile that linear layers and attention share: rows of one operand are broadcast, pair by pair, against
// packed rows of the other, whose lanes they meet. The result is transposed: lanes are rows of the packed operand.
#pragma once

#include <algorithm>

#include "simd.h"

namespace ascend_cpu {

inline __m512bh load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh load_pairs(const bf16* p, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, p); }

constexpr int kTileRows = 8;    // weight rows of one register tile
constexpr int kTileUnits = 3;   // times 16 rows of x: 8 x 3 sums, 3 loads and a broadcast fit in 32 registers
constexpr int64_t kUnit = 16;   // rows of x in one vector

inline int32_t pair_at(const bf16* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return v;
}

// out[r][lane] = dot(rows[r], x row of the lane), for MV units of packed x. Rows `ahead` elements on are
// prefetched; out is [kTileRows][kTileUnits][kUnit].
template <int MV>
void tile(const bf16* const* rows, const bf16* xp, int64_t unit_stride, int64_t k, int64_t ahead, float* out) {
  __m512 acc[kTileRows][MV];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < MV; ++v) acc[r][v] = _mm512_setzero_ps();
  const bf16 *w0 = rows[0], *w1 = rows[1], *w2 = rows[2], *w3 = rows[3], *w4 = rows[4], *w5 = rows[5], *w6 = rows[6],
             *w7 = rows[7];
  const auto step = [&](int64_t i, auto pair) __attribute__((always_inline)) {
    __m512bh x[MV];
#pragma GCC unroll 3
    for (int v = 0; v < MV; ++v) x[v] = load_pairs(xp + v * unit_stride + i * 16);
    const bf16* w[kTileRows] = {w0, w1, w2, w3, w4, w5, w6, w7};
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const __m512bh b = (__m512bh)_mm512_set1_epi32(pair(w[r] + i));
#pragma GCC unroll 3
      for (int v = 0; v < MV; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x[v], b);
    }
  };
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    // The next tile's rows, while the weight is still in memory: eight short streams start slowly on their own.
    if (ahead != 0)
      for (const bf16* w : {w0, w1, w2, w3, w4, w5, w6, w7}) _mm_prefetch(w + i + ahead, _MM_HINT_T1);
    for (int64_t j = 0; j < 32; j += 2) step(i + j, pair_at);
  }
  for (; i + 2 <= k; i += 2) step(i, pair_at);
  if (i < k) step(i, [](const bf16* p) { return static_cast<int32_t>(*p); });
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < MV; ++v) _mm512_store_ps(out + (r * kTileUnits + v) * kUnit, acc[r][v]);
}

using Tile = void (*)(const bf16* const*, const bf16*, int64_t, int64_t, int64_t, float*);
constexpr Tile kTiles[kTileUnits] = {tile<1>, tile<2>, tile<3>};

// Packs 16 rows of k elements: [k / 2][row][2]; a null row and an odd last k give zeros.
inline void pack_unit(const bf16* const (&rows)[16], int64_t k, bf16* to) {
  for (int64_t i = 0; i < k; i += 32) {
    __m512i r[16];
    const __mmask32 mask = mask32(k - i);
#pragma GCC unroll 16
    for (int row = 0; row < 16; ++row)
      r[row] = rows[row] ? _mm512_maskz_loadu_epi16(mask, rows[row] + i) : _mm512_setzero_si512();
    transpose16(r);
    const int64_t pairs = std::min<int64_t>(16, (k - i + 1) / 2);
    for (int64_t j = 0; j < pairs; ++j) _mm512_store_si512(to + (i / 2 + j) * 32, r[j]);
  }
}

}  // namespace ascend_cpu
