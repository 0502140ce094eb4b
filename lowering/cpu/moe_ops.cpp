// The operators of the mixture of experts, as torch sees them: the router, and the sort in front of the experts.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "moe.h"
#include "ops.h"

namespace ascend_cpu {
namespace {

// NaN counts as the largest, as in topk; of equals the first is better.
inline bool better(float a, float b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

// The indices of the k best, best first.
void best_of(const float* values, int64_t n, int64_t k, int64_t* found) {
  int64_t have = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (have == k && !better(values[i], values[found[k - 1]])) continue;
    int64_t at = have < k ? have++ : k - 1;
    for (; at > 0 && better(values[i], values[found[at - 1]]); --at) found[at] = found[at - 1];
    found[at] = i;
  }
}

void softmax(float* x, int64_t n) {
  float top = x[0], sum = 0;
  for (int64_t i = 1; i < n; ++i) top = better(x[i], top) ? x[i] : top;
  for (int64_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - top);
  for (int64_t i = 0; i < n; ++i) x[i] /= sum;
}

enum class Scoring { softmax, sigmoid, topk_softmax };

Scoring scoring_of(std::string_view text) {
  if (text == "softmax") return Scoring::softmax;
  if (text == "sigmoid") return Scoring::sigmoid;
  TORCH_CHECK_VALUE(text == "topk_softmax", "ascend_cpu::moe_gate: scoring must be softmax, sigmoid or topk_softmax, ",
                    "got '", text, "'");
  return Scoring::topk_softmax;
}

constexpr int64_t kGateAlone = 8192;  // scores that one thread makes sooner than two have been woken

std::tuple<at::Tensor, at::Tensor> moe_gate(const at::Tensor& logits, const OptTensor& bias, int64_t top_k,
                                            std::string_view scoring, int64_t n_group, int64_t topk_group,
                                            bool normalize, double scale, double eps, bool /*sorted*/) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.scalar_type() != at::kDouble,
                    "ascend_cpu::moe_gate: logits must be [T, E], not of float64");
  const int64_t tokens = logits.size(0), experts = logits.size(1), groups = n_group;
  TORCH_CHECK_VALUE(groups > 0 && experts % groups == 0 && top_k > 0 && top_k <= experts,
                    "ascend_cpu::moe_gate: ", experts, " experts in ", groups, " groups, top_k ", top_k);
  const int64_t size = experts / groups;
  TORCH_CHECK_VALUE(groups == 1 || (topk_group > 0 && topk_group <= groups && (!bias || size > 1)),
                    "ascend_cpu::moe_gate: topk_group ", topk_group, " of ", groups);
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == experts), "ascend_cpu::moe_gate: bias must be [",
                    experts, "]");
  const Scoring kind = scoring_of(scoring);
  const at::Tensor wide = logits.to(at::kFloat).contiguous();
  const at::Tensor extra = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  at::Tensor weights = at::empty({tokens, top_k}, wide.options());
  at::Tensor ids = at::empty({tokens, top_k}, wide.options().dtype(at::kInt));
  const float *in = wide.const_data_ptr<float>(), *add = bias ? extra.const_data_ptr<float>() : nullptr;
  float* out = weights.mutable_data_ptr<float>();
  int32_t* chosen = ids.mutable_data_ptr<int32_t>();
  const auto rows = [&](int64_t first, int64_t last) {
    std::vector<float> scores(experts), choice(experts), worth(groups);
    std::vector<int64_t> found(std::max(top_k, std::max<int64_t>(topk_group, 2)));
    for (int64_t t = first; t < last; ++t) {
      std::copy_n(in + t * experts, experts, scores.data());
      if (kind == Scoring::softmax) softmax(scores.data(), experts);
      if (kind == Scoring::sigmoid)
        for (float& s : scores) s = 1.f / (1.f + std::exp(-s));
      for (int64_t e = 0; e < experts; ++e) choice[e] = add ? scores[e] + add[e] : scores[e];
      if (groups > 1) {
        for (int64_t g = 0; g < groups; ++g) {
          const float* of = choice.data() + g * size;
          best_of(of, size, add ? 2 : 1, found.data());
          worth[g] = add ? of[found[0]] + of[found[1]] : of[found[0]];
        }
        best_of(worth.data(), groups, topk_group, found.data());
        std::vector<bool> open(groups, false);
        for (int64_t i = 0; i < topk_group; ++i) open[found[i]] = true;
        for (int64_t e = 0; e < experts; ++e)
          if (!open[e / size]) choice[e] = -std::numeric_limits<float>::infinity();
      }
      best_of(choice.data(), experts, top_k, found.data());
      float* w = out + t * top_k;
      for (int64_t i = 0; i < top_k; ++i) {
        w[i] = scores[found[i]];
        chosen[t * top_k + i] = static_cast<int32_t>(found[i]);
      }
      if (kind == Scoring::topk_softmax) softmax(w, top_k);
      if (normalize) {
        const float sum = std::accumulate(w, w + top_k, 0.f) + static_cast<float>(eps);
        for (int64_t i = 0; i < top_k; ++i) w[i] /= sum;
      }
      for (int64_t i = 0; i < top_k; ++i) w[i] *= static_cast<float>(scale);
    }
  };
  if (tokens * experts <= kGateAlone)
    rows(0, tokens);
  else
    parallel((tokens + 15) / 16, [&](int64_t b) { rows(16 * b, std::min(tokens, 16 * b + 16)); });
  return {weights, ids};
}

Act act_of(std::string_view text) {
  if (text == "silu") return Act::silu;
  if (text == "gelu") return Act::gelu;
  if (text == "gelu_tanh") return Act::gelu_tanh;
  TORCH_CHECK_VALUE(text == "relu", "ascend_cpu::moe_experts: activation must be silu, gelu, gelu_tanh or relu, got '",
                    text, "'");
  return Act::relu;
}

// The slots sorted by expert. Slots without an expert of ours have no place.
struct Routing {
  std::vector<int32_t> start, token, place;
  int64_t slots = 0, most = 0;  // most: slots of the busiest expert

  Routing(const at::Tensor& ids, int64_t experts) : start(experts + 1, 0), place(ids.numel(), -1) {
    const int64_t top_k = ids.size(1), all = ids.numel();
    const at::Tensor flat = ids.to(at::kLong).contiguous();
    const int64_t* id = flat.const_data_ptr<int64_t>();
    const auto local = [&](int64_t s) { return id[s] >= 0 && id[s] < experts; };
    for (int64_t s = 0; s < all; ++s)
      if (local(s)) ++start[id[s] + 1];
    for (int64_t e = 0; e < experts; ++e) {
      most = std::max<int64_t>(most, start[e + 1]);
      start[e + 1] += start[e];
    }
    slots = start[experts];
    token.resize(slots);
    std::vector<int32_t> next(start.begin(), start.end() - 1);
    for (int64_t s = 0; s < all; ++s)
      if (local(s)) {
        place[s] = next[id[s]]++;
        token[place[s]] = static_cast<int32_t>(s / top_k);
      }
  }
};

struct Gating {
  Act act;
  bool interleaved, limited;
  double alpha, limit, shift;

  at::Tensor operator()(const at::Tensor& h) const {
    const int64_t n = h.size(-1) / 2;
    at::Tensor gate = interleaved ? h.slice(-1, 0, 2 * n, 2) : h.narrow(-1, 0, n);
    at::Tensor up = interleaved ? h.slice(-1, 1, 2 * n, 2) : h.narrow(-1, n, n);
    if (limited) {
      gate = gate.clamp_max(limit);
      up = up.clamp(-limit, limit);
    }
    at::Tensor glu = alpha != 1.     ? gate * at::sigmoid(gate * alpha)
                     : act == Act::silu ? at::silu(gate)
                     : act == Act::relu ? at::relu(gate)
                                        : at::gelu(gate, act == Act::gelu_tanh ? "tanh" : "none");
    return glu * (shift != 0. ? up + shift : up);
  }
};

at::Tensor experts_portable(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& w_up,
                            const at::Tensor& w_down, const OptTensor& b_up, const OptTensor& b_down,
                            const Routing& routing, const Gating& gating) {
  const int64_t k = x.size(1);
  at::Tensor y = at::zeros({routing.slots + 1, k}, x.options());  // the last row is that of slots without a place
  const auto at_expert = [](const OptTensor& b, int64_t e) { return b ? OptTensor(b->select(0, e)) : OptTensor(); };
  for (int64_t e = 0; e < w_up.size(0); ++e) {
    const int64_t begin = routing.start[e], m = routing.start[e + 1] - begin;
    if (m == 0) continue;
    const auto token = at::tensor(at::ArrayRef<int32_t>(routing.token.data() + begin, m), at::kInt);
    const at::Tensor h = at::linear(x.index_select(0, token), w_up.select(0, e), at_expert(b_up, e));
    y.narrow(0, begin, m).copy_(at::linear(gating(h), w_down.select(0, e), at_expert(b_down, e)));
  }
  std::vector<int32_t> place(routing.place);
  for (int32_t& s : place) s = s < 0 ? static_cast<int32_t>(routing.slots) : s;
  const at::Tensor picked = y.index_select(0, at::tensor(at::ArrayRef<int32_t>(place), at::kInt));
  const at::Tensor there =
      at::tensor(at::ArrayRef<int32_t>(routing.place), at::kInt).ge(0).view({weights.size(0), weights.size(1), 1});
  const at::Tensor rows = picked.view({weights.size(0), weights.size(1), k}) * weights.unsqueeze(-1);
  return rows.masked_fill(there.logical_not(), 0).sum(1).to(x.scalar_type());
}

at::Tensor moe_experts_with(bool allow_kernel, const at::Tensor& x, const at::Tensor& weights, const at::Tensor& ids,
                            const at::Tensor& w_up, const at::Tensor& w_down, std::string_view activation,
                            const OptTensor& b_up, const OptTensor& b_down, bool interleaved, double alpha,
                            std::optional<double> limit, double up_shift) {
  TORCH_CHECK_VALUE(x.dim() == 2 && ids.dim() == 2 && weights.sizes() == ids.sizes() && ids.size(0) == x.size(0) &&
                        w_up.dim() == 3 && w_down.dim() == 3 && w_up.size(0) == w_down.size(0) &&
                        w_up.size(2) == x.size(1) && w_down.size(1) == x.size(1) && w_up.size(1) == 2 * w_down.size(2),
                    "ascend_cpu::moe_experts: x ", x.sizes(), ", weights ", weights.sizes(), ", ids ", ids.sizes(),
                    ", w_gate_up ", w_up.sizes(), " and w_down ", w_down.sizes(),
                    " must be [T,H], [T,k], [T,k], [E,2I,H] and [E,H,I]");
  const Gating gating{act_of(activation), interleaved, limit.has_value(), alpha, limit.value_or(0.), up_shift};
  TORCH_CHECK_VALUE(alpha == 1. || gating.act == Act::silu, "ascend_cpu::moe_experts: alpha is for silu");
  const int64_t tokens = x.size(0), experts = w_up.size(0), k = x.size(1), inner = w_down.size(2);
  for (const auto& [b, n] : {std::pair(b_up, 2 * inner), std::pair(b_down, k)})
    TORCH_CHECK_VALUE(!b || (b->dim() == 2 && b->size(0) == experts && b->size(1) == n),
                      "ascend_cpu::moe_experts: a bias must be [", experts, ", ", n, "]");
  const Routing routing(ids, experts);
  const auto alike = [&](const at::Tensor& t) { return t.scalar_type() == x.scalar_type() && t.is_cpu(); };
  const auto plain = [&](const at::Tensor& t) {
    return alike(t) && (t.size(2) == 1 || t.stride(2) == 1) && t.stride(1) >= t.size(2) && t.stride(0) >= 0;
  };
  const bool here = isa() == Isa::avx512_bf16 || (isa() == Isa::amx_bf16 && routing.most <= 16);
  const bool known = x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16;
  if (!allow_kernel || !here || !known || !plain(w_up) || !plain(w_down) || (b_up && !alike(*b_up)) ||
      (b_down && !alike(*b_down)) || weights.scalar_type() == at::kDouble || k == 0 || inner == 0)
    return experts_portable(x, weights, w_up, w_down, b_up, b_down, routing, gating);

  at::Tensor out = at::empty({tokens, k}, x.options());
  if (tokens == 0) return out;
  const at::Tensor rows = x.stride(1) == 1 || k == 1 ? x : x.contiguous();
  const at::Tensor up_bias = b_up ? b_up->contiguous() : at::Tensor();
  const at::Tensor down_bias = b_down ? b_down->contiguous() : at::Tensor();
  const at::Tensor scales = weights.to(at::kFloat).contiguous();
  at::Tensor y = at::empty({routing.slots, k}, x.options());
  run_experts({dtype_of(x), rows.const_data_ptr(), w_up.const_data_ptr(), w_down.const_data_ptr(),
               b_up ? up_bias.const_data_ptr() : nullptr, b_down ? down_bias.const_data_ptr() : nullptr,
               y.mutable_data_ptr(), routing.token.data(), routing.start.data(), experts, routing.slots, k, inner,
               rows.stride(0), w_up.stride(0), w_up.stride(1), w_down.stride(0), w_down.stride(1), gating.act,
               interleaved, gating.limited, static_cast<float>(alpha), static_cast<float>(gating.limit),
               static_cast<float>(up_shift)});
  run_combine({dtype_of(x), y.const_data_ptr(), out.mutable_data_ptr(), scales.const_data_ptr<float>(),
               routing.place.data(), tokens, ids.size(1), k});
  return out;
}

template <bool kernel>
at::Tensor moe_experts(const at::Tensor& x, const at::Tensor& weights, const at::Tensor& ids, const at::Tensor& w_up,
                       const at::Tensor& w_down, std::string_view activation, const OptTensor& b_up,
                       const OptTensor& b_down, bool interleaved, double alpha, std::optional<double> limit,
                       double up_shift) {
  return moe_experts_with(kernel, x, weights, ids, w_up, w_down, activation, b_up, b_down, interleaved, alpha, limit,
                          up_shift);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ascend_cpu, m) {
  m.def(
      "moe_gate(Tensor logits, Tensor? bias, *, int top_k, str scoring, int n_group=1, int topk_group=1, "
      "bool normalize, float scale=1., float eps=1e-20, bool sorted=True) -> (Tensor weights, Tensor ids)");
  for (const std::string name : {"moe_experts", "moe_experts_portable"})
    m.def((name +
           "(Tensor x, Tensor weights, Tensor ids, Tensor w_gate_up, Tensor w_down, *, str activation, "
           "Tensor? b_gate_up=None, Tensor? b_down=None, bool interleaved=False, float alpha=1., float? limit=None, "
           "float up_shift=0.) -> Tensor")
              .c_str());
}

TORCH_LIBRARY_IMPL(ascend_cpu, CPU, m) {
  m.impl("moe_gate", moe_gate);
  m.impl("moe_experts", moe_experts<true>);
  m.impl("moe_experts_portable", moe_experts<false>);
}

}  // namespace ascend_cpu
