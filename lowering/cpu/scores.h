// What both attention kernels do to scores, which they keep times log2(e): 2^x is cheaper than e^x.
#pragma once

#include <limits>

#include "simd.h"

namespace ascend_cpu {

constexpr float kLog2e = 1.44269504f;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLowest = -3.3e38f;

// 2^x for x <= 0, to 2e-7; exact 0 for -inf, NaN stays NaN.
inline __m512 exp2_ps(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.f), x);
  const __m512 n = _mm512_roundscale_ps(x, 8);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.3390863e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6188262e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5503324e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022648e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, n);
}

// cap * tanh(x / cap)
inline __m512 cap_score(__m512 x, float cap) {
  const __m512 one = _mm512_set1_ps(1.f), two = _mm512_set1_ps(2.f);
  const __m512 e = exp_ps(_mm512_mul_ps(x, _mm512_set1_ps(2.f / cap)));
  return _mm512_mul_ps(_mm512_set1_ps(cap), _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(e, one))));
}

// The additive mask of one row for keys [j, j + 16), times log2(e). A finite one stays finite: a row whose keys all
// carry finfo.min is a mean over them, not an empty row. A key stride of 0 is one value for all keys.
inline __m512 row_bias(const Attention& p, const void* bias, const bool* mask, int64_t j, __mmask16 live) {
  __m512 v = _mm512_setzero_ps();
  if (bias) {
    if (p.bias_stride[3] == 0)
      v = _mm512_set1_ps(p.bias_is_float ? *static_cast<const float*>(bias)
                                         : _mm512_cvtss_f32(load(static_cast<const bf16*>(bias), 1)));
    else
      v = p.bias_is_float ? _mm512_maskz_loadu_ps(live, static_cast<const float*>(bias) + j)
                          : load(static_cast<const bf16*>(bias) + j, live);
    const __mmask16 finite = _mm512_cmp_ps_mask(v, _mm512_set1_ps(-kInf), _CMP_NEQ_UQ);
    v = _mm512_mul_ps(v, _mm512_set1_ps(kLog2e));
    v = _mm512_mask_max_ps(v, finite, _mm512_set1_ps(kLowest), v);
  }
  if (mask) {
    const __m128i keep = p.mask_stride[3] == 0 ? _mm_set1_epi8(*mask) : _mm_maskz_loadu_epi8(live, mask + j);
    const __mmask16 hidden = _mm_mask_testn_epi8_mask(live, keep, _mm_set1_epi8(-1));
    v = _mm512_mask_mov_ps(v, hidden, _mm512_set1_ps(-kInf));
  }
  return v;
}

}  // namespace ascend_cpu
