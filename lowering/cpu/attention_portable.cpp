// Attention by ATen calls: the meaning of the kernels, and what runs where they cannot.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>

#include <algorithm>

#include "attention_ops.h"

namespace ascend_cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kBlockScores = 1 << 20;  // held at a time

// The part of a mask or bias for queries [i0, i1) and keys [j0, j1); broadcast axes stay as they are.
at::Tensor part(const at::Tensor& t, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  at::Tensor p = t;
  if (t.dim() >= 1 && t.size(-1) != 1) p = p.slice(-1, j0, j1);
  if (t.dim() >= 2 && t.size(-2) != 1) p = p.slice(-2, i0, i1);
  return p;
}

}  // namespace

at::Tensor mean_value(const at::Tensor& v) {
  return at::mean(v, {2}, false, v.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

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

}  // namespace ascend_cpu
