// Rows of keys and values, wherever they are: one pointer a token, so that pages cost the kernels nothing.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace ascend_cpu {

// Calls at(i, token in a row of memory, page or -1) for keys j0 + i, i < count, that are in pages.
template <class F>
inline void for_pages(const Attention& p, int64_t j0, int64_t count, F at) {
  const int64_t first = p.first();
  int64_t index = j0 / p.page, place = j0 % p.page;
  for (int64_t i = 0; i < count; ++index, place = 0) {
    const int64_t end = std::min(count, i + p.page - place);
    // What no query sees is not looked up: its page may be another sequence's by now.
    const int64_t page = j0 + end <= first ? -1 : p.table[index];
    for (; i < end; ++i, ++place) at(i, place, j0 + i < first ? -1 : page);
  }
}

// to[i] = the row of key j0 + i of a head, i < count.
template <class S>
inline void rows_of(const Attention& p, const Stored& t, int64_t b, int64_t h, int64_t j0, int64_t count,
                    const S** to) {
  const S* base = static_cast<const S*>(t.data) + h * t.stride[1];
  const int64_t step = t.stride[2], page_step = t.stride[0];
  if (!p.table) {
    base += b * t.stride[0] + j0 * step;
    for (int64_t i = 0; i < count; ++i) to[i] = base + i * step;
    return;
  }
  const S* zeros = static_cast<const S*>(p.zeros);
  for_pages(p, j0, count, [&](int64_t i, int64_t place, int64_t page) {
    to[i] = page < 0 ? zeros : base + page * page_step + place * step;
  });
}

// to[i] = what the row of key j0 + i is multiplied by; 1 beyond, up to a multiple of 16.
inline void scales_of(const Attention& p, const Stored& t, int64_t h, int64_t j0, int64_t count, float* to) {
  for_pages(p, j0, count, [&](int64_t i, int64_t place, int64_t page) {
    to[i] = page < 0 ? 1.f : t.scale[page * t.scale_stride[0] + place * t.scale_stride[2] + h * t.scale_stride[1]];
  });
  std::fill(to + count, to + (count + 15) / 16 * 16, 1.f);
}

// Words of arithmetic in T from what is stored as S: as they are, or widened to float.
template <class T, class S>
inline __m512i words_from(const S* p) {
  if constexpr (std::is_same_v<T, S>)
    return _mm512_loadu_si512(p);
  else
    return _mm512_castps_si512(load(p));
}

template <class T, class S>
inline __m512i words_from(const S* p, int64_t n) {
  if constexpr (std::is_same_v<T, bf16> && std::is_same_v<S, bf16>)
    return _mm512_maskz_loadu_epi16(mask32(n), p);
  else
    return _mm512_castps_si512(load(p, mask16(n)));
}

// Calls body(pointer to an element of the stored type) for the types that arithmetic in T reads.
template <class T, class F>
inline void with_stored(Dtype stored, F body) {
  if constexpr (std::is_same_v<T, bf16>) {
    body(static_cast<const bf16*>(nullptr));
  } else {
    switch (stored) {
      case Dtype::f32: return body(static_cast<const float*>(nullptr));
      case Dtype::bf16: return body(static_cast<const bf16*>(nullptr));
      case Dtype::f16: return body(static_cast<const f16*>(nullptr));
      case Dtype::i8: return body(static_cast<const int8_t*>(nullptr));
    }
  }
}

// One of several problems that share a call, found by the number of a piece of work: pieces of problem i begin at
// starts[i], and starts ends with their count.
inline int64_t problem_of(const std::vector<int64_t>& starts, int64_t piece) {
  return std::upper_bound(starts.begin(), starts.end(), piece) - starts.begin() - 1;
}

}  // namespace ascend_cpu
