// Linear layers on AVX-512 (bf16: AVX-512-BF16), straight from the plain [N, K] weight: no packed copy exists.
//
// Few rows of x: the weight is streamed once at memory speed, each row against all rows of x (dot products along K).
// Many rows: y^T is computed. x is packed, per call, so that its rows are lanes, and words of the weight are broadcast
// against them (tile.h), so that each weight element is read as it lies.
#include "dots.h"
#include "tile.h"

namespace ascend_cpu {
namespace {

constexpr int64_t kGemvRows = 3;       // with more rows of x the tiles are faster
constexpr int64_t kGemvBytes = 65536;  // weight bytes of one work item
constexpr int64_t kGemvBlock = 256;    // and at most so many weight rows

struct GemvX;

template <class T>
void few_rows(const Linear& p) {
  const int64_t row_bytes = std::max<int64_t>(p.k, 1) * sizeof(T) * (p.gated ? 2 : 1);
  const int64_t share = (p.n + threads() - 1) / threads();
  const int64_t fit = std::min(share, std::clamp<int64_t>(kGemvBytes / row_bytes, 16, kGemvBlock));
  const int64_t block = (fit + 15) / 16 * 16;
  const T* w = static_cast<const T*>(p.w);
  T* x = static_cast<T*>(scratch<GemvX>(dots_size<T>(p.m, p.k) * sizeof(T)));
  for (int64_t i = 0; i < p.m; ++i) pack_dots(static_cast<const T*>(p.x) + i * p.x_stride, i, p.m, p.k, x);
  const __m512i column = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(kDotLanes));
  parallel((p.n + block - 1) / block, [&](int64_t item) {
    float sums[2][kGemvBlock * kDotLanes];
    const int64_t j0 = item * block, count = std::min(block, p.n - j0);
    for (int half = 0; half < (p.gated ? 2 : 1); ++half)
      kDotRows<T>[p.m - 1](w + (j0 + half * p.n) * p.w_stride, p.w_stride, p.k, x, count, sums[half]);
    for (int64_t i = 0; i < p.m; ++i)
      for (int64_t j = 0; j < count; j += 16) {
        const __mmask16 mask = mask16(count - j);
        const auto sum = [&](int half) {
          return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, column, sums[half] + j * kDotLanes + i, 4);
        };
        const __m512 v = sum(0);
        finish<T>(p, i, j0 + j, v, p.gated ? sum(1) : v, mask);
      }
  });
}

constexpr int64_t kBlock = 64;  // weight rows of one work item
constexpr int64_t kPackedBytes = 2 << 20;  // of x at a time
constexpr int64_t kPackAlone = 131072;  // elements of x that one thread packs sooner than two have been woken

// The sums of one block of weight rows, [row][unit of the panel][lane], to rows of y.
template <class T>
void finish_block(const Linear& p, int64_t i0, int64_t j0, int64_t count, int64_t units, const float* sums,
                  const float* sums_up) {
  for (int64_t u = 0; u < units; ++u)
    for (int64_t j = 0; j < count; j += 16) {
      __m512i v[16], up[16];
      const __mmask16 mask = mask16(count - j);
      for (int r = 0; r < 16; ++r)
        v[r] = _mm512_load_si512(sums + ((j + r) * kTileUnits + u) * kUnit);
      transpose16(v);
      if (p.gated) {
        for (int r = 0; r < 16; ++r) up[r] = _mm512_load_si512(sums_up + ((j + r) * kTileUnits + u) * kUnit);
        transpose16(up);
      }
      const int64_t rows = std::min<int64_t>(kUnit, p.m - i0 - u * kUnit);
      for (int64_t r = 0; r < rows; ++r)
        finish<T>(p, i0 + u * kUnit + r, j0 + j, _mm512_castsi512_ps(v[r]),
                     _mm512_castsi512_ps(p.gated ? up[r] : v[r]), mask);
    }
}

struct Packed;

template <class T>
void many_rows(const Linear& p) {
  const int64_t units = (p.m + kUnit - 1) / kUnit, unit_stride = unit_size<T>(p.k);
  T* packed = static_cast<T*>(scratch<Packed>(units * unit_stride * sizeof(T)));
  const auto pack = [&](int64_t u) {
    const T* rows[kUnit];
    for (int64_t i = 0; i < kUnit; ++i) {
      const int64_t row = u * kUnit + i;
      rows[i] = row < p.m ? static_cast<const T*>(p.x) + row * p.x_stride : nullptr;
    }
    pack_unit(rows, p.k, packed + u * unit_stride);
  };
  if (p.m * p.k <= kPackAlone)
    for (int64_t u = 0; u < units; ++u) pack(u);
  else
    parallel(units, pack);

  const int64_t panels = (units + kTileUnits - 1) / kTileUnits, blocks = (p.n + kBlock - 1) / kBlock;
  const int64_t groups = std::clamp<int64_t>((4 * threads() + blocks - 1) / blocks, 1, panels);
  const T* w = static_cast<const T*>(p.w);
  parallel(blocks * groups, [&](int64_t item) {
    alignas(64) float sums[2][kBlock * kTileUnits * kUnit];
    const int64_t j0 = item / groups * kBlock, count = std::min(kBlock, p.n - j0);
    const int64_t g = item % groups;
    for (int64_t panel = panels * g / groups; panel < panels * (g + 1) / groups; ++panel) {
      const int64_t u0 = units * panel / panels, mv = units * (panel + 1) / panels - u0;
      const int64_t ahead = panel == panels * g / groups ? kTileRows * p.w_stride : 0;
      for (int half = 0; half < (p.gated ? 2 : 1); ++half)
        for (int64_t j = 0; j < count; j += kTileRows) {
          const T* rows[kTileRows];
          for (int r = 0; r < kTileRows; ++r)
            rows[r] = w + (j0 + half * p.n + std::min(j + r, count - 1)) * p.w_stride;
          kTiles<T>[mv - 1](rows, packed + u0 * unit_stride, unit_stride, p.k, ahead,
                         sums[half] + j * kTileUnits * kUnit);
        }
      finish_block<T>(p, u0 * kUnit, j0, count, mv, sums[0], sums[1]);
    }
  });
}

template <class T>
void linear(Linear p) {
  if (p.m <= kGemvRows) return few_rows<T>(p);
  // Every block of weight rows meets all packed rows of x, so these have to stay in the last cache.
  constexpr int64_t panel = kTileUnits * kUnit;
  const int64_t all = p.m, fit = kPackedBytes / (p.k * static_cast<int64_t>(sizeof(T))) / panel * panel;
  const int64_t rows = std::max<int64_t>(fit, 4 * panel);
  for (int64_t i = 0; i < all; i += rows) {
    p.m = std::min(rows, all - i);
    many_rows<T>(p);
    p.x = static_cast<const T*>(p.x) + rows * p.x_stride;
    p.y = static_cast<T*>(p.y) + rows * p.n;
    if (p.other) p.other = static_cast<const T*>(p.other) + rows * p.other_stride;
  }
}

}  // namespace

void run_linear(const Linear& p) {
  if (p.dtype == Dtype::f32)
    linear<float>(p);
  else
    linear<bf16>(p);
}

}  // namespace ascend_cpu
