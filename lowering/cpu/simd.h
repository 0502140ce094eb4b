// AVX-512 pieces shared by the kernels: bf16 conversion, tails, a 16x16 transpose, exp, erf and tanh.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace ascend_cpu {

using bf16 = uint16_t;  // only the bits travel; arithmetic is float

inline __m512 widen(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

inline __mmask16 mask16(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }
inline __mmask32 mask32(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

inline __m512 load(const bf16* p, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, p)); }

// Rounds to nearest even; NaN stays NaN. vcvtneps2bf16 would flush subnormals, which eager does not.
inline __m256i narrow(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), lsb);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i safe = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16));
}

inline void store(bf16* p, __m512 v, __mmask16 mask) { _mm256_mask_storeu_epi16(p, mask, narrow(v)); }

inline __m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

// What is stored in fewer bits than it is computed in.
struct f16 {
  uint16_t bits;
};
inline __m512 load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline __m512 load(const f16* p, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p)); }
inline __m512 load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline __m512 load(const int8_t* p, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, p)));
}

inline void store(float* p, __m512 v, __mmask16 mask) { _mm512_mask_storeu_ps(p, mask, v); }

// Rows become columns.
inline void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// exp to about 1 ulp of float; exact 0 and inf beyond the range, NaN stays NaN.
inline __m512 exp_ps(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
  p = _mm512_scalef_ps(p, n);
  // inf - inf above is NaN: put the limits back.
  p = _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, _mm512_set1_ps(-104.f), _CMP_LT_OQ), _mm512_setzero_ps());
  const __m512 inf = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000));
  return _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, _mm512_set1_ps(88.8f), _CMP_GT_OQ), inf);
}

inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

inline __m512 silu(__m512 x) {
  // x / (1 + exp(-x)): -inf / inf is NaN, as in eager.
  const __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.f), e));
}

// x * (1 + erf(x / sqrt 2)) / 2, written as relu(x) - |x| / 2 * erfc(|x| / sqrt 2) so that nothing cancels for x < 0.
// erfc by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
inline __m512 gelu(__m512 x) {
  const __m512 a = _mm512_abs_ps(x), z = _mm512_mul_ps(a, _mm512_set1_ps(0.70710678f)), one = _mm512_set1_ps(1.f);
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  const __m512 e = exp_ps(_mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), z), z));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(a, _mm512_set1_ps(0.5f)), _mm512_mul_ps(_mm512_mul_ps(p, t), e));
  const __m512 y = _mm512_sub_ps(_mm512_max_ps(x, _mm512_setzero_ps()), tail);
  // inf * 0 above: right for -inf (eager gives NaN), not for inf.
  const __m512 inf = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000));
  return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, inf, _CMP_EQ_OQ), x);
}

inline __m512 gelu_tanh(__m512 x) {
  // 0.5 x (1 + tanh(u)) = x * sigmoid(2u)
  const __m512 inner = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.f));
  const __m512 u2 = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.5957691216f)), inner);
  return _mm512_mul_ps(x, sigmoid(u2));
}

inline __m512 activate(Act act, __m512 v) {
  switch (act) {
    case Act::relu: return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ),
                                              _mm512_setzero_ps());
    case Act::silu: return silu(v);
    case Act::gelu: return gelu(v);
    case Act::gelu_tanh: return gelu_tanh(v);
    default: return v;
  }
}

// One output row segment [j, j + 16) of row i, from the fp32 sums (and, if gated, the sums of the other half).
template <class T>
inline void finish(const Linear& p, int64_t i, int64_t j, __m512 v, __m512 up, __mmask16 mask) {
  const T* bias = static_cast<const T*>(p.bias);
  if (bias) {
    v = _mm512_add_ps(v, load(bias + j, mask));
    if (p.gated) up = _mm512_add_ps(up, load(bias + p.n + j, mask));
  }
  v = activate(p.act, v);
  if (p.gated) v = _mm512_mul_ps(v, up);
  if (p.combine != Other::none) {
    const __m512 o = load(static_cast<const T*>(p.other) + i * p.other_stride + j, mask);
    v = p.combine == Other::add ? _mm512_add_ps(v, o) : _mm512_mul_ps(v, o);
  }
  store(static_cast<T*>(p.y) + i * p.n + j, v, mask);
}

// Memory for the length of one call, 64-byte aligned; none if it has no bytes.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : data_(bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr) {
    if (bytes && !data_) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  void* data() const { return data_; }

 private:
  void* data_;
};

// Scratch of the calling thread: grows, never shrinks, 64-byte aligned; one per Tag.
template <class Tag>
inline void* scratch(size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = 0;
    buffer.data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!buffer.data) throw std::bad_alloc();
    buffer.size = bytes;
  }
  return buffer.data;
}

}  // namespace ascend_cpu
