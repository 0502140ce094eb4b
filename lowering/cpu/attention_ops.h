// Attention as torch sees it, for the files that register its operators.
#pragma once

#include <limits>
#include <string_view>

#include "ops.h"

namespace ascend_cpu {

// What a call of attention means, beyond its tensors.
struct Scores {
  double scale, softcap;
  int64_t last, window;  // as in Attention
  std::string_view empty_row;

  float empty() const { return empty_row == "zero" ? 0.f : std::numeric_limits<float>::quiet_NaN(); }
};

// The mean of all values [B, Hk, Dv] of a head, what a row that sees no key gets with empty_row "uniform".
at::Tensor mean_value(const at::Tensor& v);

// q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv] of any dtype, on any processor: a block of queries at a time,
// so that memory is linear in the sequence.
at::Tensor attention_portable(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptTensor& bias,
                              const OptTensor& mask, const OptTensor& sinks, const Scores& how);

}  // namespace ascend_cpu
