// Attention, as torch sees it: checks, shapes, and what the kernels do not know (other dtypes, rows that see nothing).
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <string>

#include "ops.h"

namespace ascend_cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kBlockScores = 1 << 20;  // that the portable form holds at a time

// What a call of attention means, beyond its tensors.
struct Scores {
  double scale, softcap;
  int64_t last, window;  // as in Attention
  std::string_view empty_row;

  float empty() const { return empty_row == "zero" ? 0.f : std::numeric_limits<float>::quiet_NaN(); }
};

Scores scores_of(const at::Tensor& q, const at::Tensor& k, double scale, std::string_view causal, int64_t window,
                 double softcap, std::string_view empty_row) {
  const int64_t sq = q.size(2), sk = k.size(2), all = sq + sk;
  TORCH_CHECK_VALUE(causal == "none" || causal == "top_left" || causal == "bottom_right",
                    "ascend_cpu::flash_attention: causal must be none, top_left or bottom_right, got '", causal, "'");
  TORCH_CHECK_VALUE(empty_row == "nan" || empty_row == "zero" || empty_row == "uniform",
                    "ascend_cpu::flash_attention: empty_row must be nan, zero or uniform, got '", empty_row, "'");
  const int64_t last = causal == "none" ? all : causal == "top_left" ? 0 : sk - sq;
  // Without causal, a window hides the keys before it only: j > i - window.
  const int64_t width = window < 0 ? 2 * all + 1 : std::min(window, 2 * all + 1);
  return {scale, softcap, last, causal == "none" && window >= 0 ? last + width : width, empty_row};
}

// The mean of all values [B, Hk, Dv] of a head, what a row that sees no key gets with empty_row "uniform".
at::Tensor mean_value(const at::Tensor& v) {
  return at::mean(v, {2}, false, v.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// The part of a mask or bias for queries [i0, i1) and keys [j0, j1); broadcast axes stay as they are.
at::Tensor part(const at::Tensor& t, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  at::Tensor p = t;
  if (t.dim() >= 1 && t.size(-1) != 1) p = p.slice(-1, j0, j1);
  if (t.dim() >= 2 && t.size(-2) != 1) p = p.slice(-2, i0, i1);
  return p;
}

// Any dtype, any processor: a block of queries at a time, so that memory is linear in the sequence.
at::Tensor attention_portable(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptTensor& bias,
                              const OptTensor& mask, const OptTensor& sinks, const Scores& how) {
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t batch = q.size(0), hq = q.size(1), hk = k.size(1), sq = q.size(2), sk = k.size(2), dv = v.size(3);
  const at::Tensor wide_k = k.to(wide), wide_v = v.to(wide);
  at::Tensor y = at::empty({batch, sq, hq, dv}, q.options()).transpose(1, 2);
  const int64_t step = std::max<int64_t>(16, kBlockScores / std::max<int64_t>(1, batch * hq * sk));
  for (int64_t i0 = 0; i0 < sq; i0 += step) {
    const int64_t i1 = std::min(sq, i0 + step), rows = i1 - i0;
    // Some of these queries see keys [j0, j1).
    const int64_t j1 = std::clamp<int64_t>(i1 + how.last, 0, sk);
    const int64_t j0 = std::clamp<int64_t>(i0 + how.last - how.window + 1, 0, j1), keys = j1 - j0;
    const at::Tensor mine = q.slice(2, i0, i1).to(wide).reshape({batch, hk, hq / hk * rows, q.size(3)});
    at::Tensor s = at::matmul(mine, wide_k.slice(2, j0, j1).transpose(-1, -2)).view({batch, hq, rows, keys});
    s.mul_(how.scale);
    if (how.softcap > 0) s.div_(how.softcap).tanh_().mul_(how.softcap);
    if (bias) s.add_(part(*bias, i0, i1, j0, j1));
    const at::Tensor i = at::arange(i0, i1, at::kLong).unsqueeze(1) + how.last, j = at::arange(j0, j1, at::kLong);
    at::Tensor hidden = (j > i).logical_or(j <= i - how.window);
    if (mask) hidden = hidden.logical_or(part(*mask, i0, i1, j0, j1).logical_not());
    s.masked_fill_(hidden, -kInfinity);
    if (sinks) s = at::cat({s, sinks->to(wide).view({1, -1, 1, 1}).expand({batch, hq, rows, 1})}, -1);
    const at::Tensor empty = (s == -kInfinity).all(-1, true);
    s = at::softmax(s, -1).masked_fill_(empty, 0.);
    const at::Tensor p = s.slice(-1, 0, keys);
    at::Tensor sum = at::matmul(p.reshape({batch, hk, hq / hk * rows, keys}), wide_v.slice(2, j0, j1));
    sum = sum.view({batch, hq, rows, dv});
    if (how.empty_row == "uniform")
      sum = at::where(empty, mean_value(v).repeat_interleave(hq / hk, 1).unsqueeze(2), sum);
    else
      sum = at::where(empty, static_cast<double>(how.empty()), sum);
    y.slice(2, i0, i1).copy_(sum);
  }
  return y;
}

// [B, Hq, Sq, Sk] by broadcasting, with neighbouring keys side by side (or one value for all of them): copied only if
// they are not, and only as far as it is there.
at::Tensor operand(const at::Tensor& t, at::IntArrayRef sizes) {
  const bool fits = t.dim() == 0 || t.size(-1) == 1 || t.stride(-1) == 1 || t.stride(-1) == 0;
  return (fits ? t : t.contiguous()).expand(sizes);
}

at::Tensor attention_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptTensor& bias,
                            const OptTensor& mask, const OptTensor& sinks, const Scores& how) {
  const int64_t batch = q.size(0), hq = q.size(1), hk = k.size(1), sq = q.size(2), sk = k.size(2), dv = v.size(3);
  const auto dense = [](const at::Tensor& t) { return t.stride(3) == 1 || t.size(3) == 1 ? t : t.contiguous(); };
  const at::Tensor q1 = dense(q), k1 = dense(k), v1 = dense(v);
  at::Tensor b1, m1, s1, empties;
  if (bias) b1 = operand(bias->scalar_type() == at::kBFloat16 ? *bias : bias->to(at::kFloat), {batch, hq, sq, sk});
  if (mask) m1 = operand(*mask, {batch, hq, sq, sk});
  if (sinks) s1 = sinks->to(at::kFloat).expand({hq}).contiguous();
  if (how.empty_row == "uniform") empties = at::zeros({batch, hq, sq}, q.options().dtype(at::kBool));
  at::Tensor y = at::empty({batch, sq, hq, dv}, q.options()).transpose(1, 2);
  Attention p{dtype_of(q), q1.const_data_ptr(), k1.const_data_ptr(), v1.const_data_ptr(), y.mutable_data_ptr(),
              bias ? b1.const_data_ptr() : nullptr, mask ? m1.const_data_ptr<bool>() : nullptr,
              sinks ? s1.const_data_ptr<float>() : nullptr, bias && b1.scalar_type() == at::kFloat,
              batch, hq, hk, sq, sk, q.size(3), dv, {}, {}, {}, {}, {}, {},
              static_cast<float>(how.scale), static_cast<float>(how.softcap), how.last, how.window, how.empty(),
              empties.defined() ? empties.mutable_data_ptr<bool>() : nullptr};
  for (int i = 0; i < 4; ++i) {
    if (i < 3) {
      p.q_stride[i] = q1.stride(i);
      p.k_stride[i] = k1.stride(i);
      p.v_stride[i] = v1.stride(i);
      p.y_stride[i] = y.stride(i);
    }
    if (bias) p.bias_stride[i] = b1.stride(i);
    if (mask) p.mask_stride[i] = m1.stride(i);
  }
  run_attention(p);
  if (!empties.defined() || !empties.any().item<bool>()) return y;
  const at::Tensor mean = mean_value(v).to(y.scalar_type()).repeat_interleave(hq / hk, 1).unsqueeze(2);
  return y.copy_(at::where(empties.unsqueeze(-1), mean, y));
}

at::Tensor attention(bool allow_kernel, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const OptTensor& bias, const OptTensor& mask, const OptTensor& sinks, const Scores& how) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(0) == k.size(0) &&
                        k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(2) &&
                        q.size(3) == k.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                    "ascend_cpu::flash_attention: q ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(),
                    " must be [B,Hq,Sq,D], [B,Hk,Sk,D] and [B,Hk,Sk,Dv] with Hq a multiple of Hk");
  TORCH_CHECK_VALUE(!mask || mask->scalar_type() == at::kBool, "ascend_cpu::flash_attention: mask must be bool");
  const auto type = q.scalar_type();
  const auto alike = [&](const at::Tensor& t) { return t.scalar_type() == type && t.is_cpu(); };
  const bool typed = type == at::kBFloat16 || type == at::kFloat || type == at::kHalf;
  if (!allow_kernel || isa() == Isa::portable || !typed || !alike(q) || !alike(k) || !alike(v) ||
      (bias && !bias->is_floating_point()) || q.numel() == 0 || k.numel() == 0 || v.numel() == 0 ||
      q.size(2) + k.size(2) > (1 << 29))
    return attention_portable(q, k, v, bias, mask, sinks, how);
  if (type != at::kHalf) return attention_kernel(q, k, v, bias, mask, sinks, how);
  const auto wide = [](const at::Tensor& t) { return t.to(at::kFloat); };
  return attention_kernel(wide(q), wide(k), wide(v), bias, mask, sinks, how).to(type);
}

at::Tensor flash_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptTensor& bias,
                           const OptTensor& mask, const OptTensor& sinks, double scale, std::string_view causal,
                           int64_t window, double softcap, std::string_view empty_row) {
  return attention(true, q, k, v, bias, mask, sinks, scores_of(q, k, scale, causal, window, softcap, empty_row));
}

at::Tensor flash_attention_portable(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                    const OptTensor& bias, const OptTensor& mask, const OptTensor& sinks,
                                    double scale, std::string_view causal, int64_t window, double softcap,
                                    std::string_view empty_row) {
  return attention(false, q, k, v, bias, mask, sinks, scores_of(q, k, scale, causal, window, softcap, empty_row));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ascend_cpu, m) {
  for (const std::string name : {"flash_attention", "flash_attention_portable"})
    m.def((name +
           "(Tensor q, Tensor k, Tensor v, *, Tensor? bias=None, Tensor? mask=None, Tensor? sinks=None, float scale, "
           "str causal='none', int window=-1, float softcap=0., str empty_row='nan') -> Tensor")
              .c_str());
}

TORCH_LIBRARY_IMPL(ascend_cpu, CPU, m) {
  m.impl("flash_attention", flash_attention);
  m.impl("flash_attention_portable", flash_attention_portable);
}

}  // namespace ascend_cpu
