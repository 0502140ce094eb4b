// Attention, as torch sees it: checks, shapes, and what the kernels do not know (other dtypes, rows that see nothing).
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "attention_ops.h"

namespace ascend_cpu {
namespace {

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
  Attention p;
  p.dtype = p.stored = dtype_of(q);
  p.q = q1.const_data_ptr();
  p.k.data = k1.const_data_ptr();
  p.v.data = v1.const_data_ptr();
  p.y = y.mutable_data_ptr();
  if (bias) p.bias = b1.const_data_ptr();
  if (mask) p.mask = m1.const_data_ptr<bool>();
  if (sinks) p.sinks = s1.const_data_ptr<float>();
  p.bias_is_float = bias && b1.scalar_type() == at::kFloat;
  p.batch = batch;
  p.hq = hq;
  p.hk = hk;
  p.sq = sq;
  p.sk = sk;
  p.d = q.size(3);
  p.dv = dv;
  p.scale = static_cast<float>(how.scale);
  p.softcap = static_cast<float>(how.softcap);
  p.last = how.last;
  p.window = how.window;
  p.empty = how.empty();
  if (empties.defined()) p.empty_rows = empties.mutable_data_ptr<bool>();
  for (int i = 0; i < 4; ++i) {
    if (i < 3) {
      p.q_stride[i] = q1.stride(i);
      p.k.stride[i] = k1.stride(i);
      p.v.stride[i] = v1.stride(i);
      p.y_stride[i] = y.stride(i);
    }
    if (bias) p.bias_stride[i] = b1.stride(i);
    if (mask) p.mask_stride[i] = m1.stride(i);
  }
  run_attention(&p, 1);
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
