// Attention over pages, as torch sees it: checks, one problem for each sequence, and what runs without vectors.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "attention_ops.h"

namespace ascend_cpu {
namespace {

// A call: queries [T, Hq, D] and caches [blocks, size, Hk, D]. Latent attention has a second part of queries and keys,
// and its values are its keys.
struct Call {
  std::string op;
  at::Tensor q, k, v;
  OptTensor q2, k2, k_scale, v_scale;
  at::Tensor table;  // int32 [B, pages], contiguous
  std::vector<int64_t> starts, lengths;
  OptTensor mask, sinks;
  double scale, softcap = 0;
  bool causal;
  int64_t window = -1;

  int64_t size() const { return k.size(1); }
  int64_t queries(size_t b) const { return starts[b + 1] - starts[b]; }

  // Sequences with queries and keys; of the others, and of padding, the result is 0.
  bool has_work(size_t b) const { return queries(b) > 0 && lengths[b] > 0; }

  Scores scores(size_t b) const {
    const int64_t sq = queries(b), sk = lengths[b], all = sq + sk, own = sk - sq, last = causal ? own : all;
    const int64_t width = window < 0 ? 2 * all + 1 : std::min(window, 2 * all + 1);
    return {scale, softcap, last, window < 0 ? width + all : last - own + width, "zero"};
  }

  // Keys that no query of the sequence sees.
  int64_t first(size_t b) const {
    const Scores s = scores(b);
    return std::clamp<int64_t>(s.last - s.window + 1, 0, lengths[b]);
  }
};

std::vector<int64_t> numbers(const at::Tensor& t) {
  if (t.scalar_type() == at::kInt && t.is_contiguous())
    return {t.const_data_ptr<int32_t>(), t.const_data_ptr<int32_t>() + t.numel()};
  const at::Tensor wide = t.to(at::kLong).contiguous();
  return {wide.const_data_ptr<int64_t>(), wide.const_data_ptr<int64_t>() + wide.numel()};
}

void check_operands(const Call& c) {
  TORCH_CHECK_VALUE(c.q.dim() == 3 && c.k.dim() == 4 && c.v.dim() == 4 &&
                        c.k.sizes().slice(0, 3) == c.v.sizes().slice(0, 3) && c.q.size(2) == c.k.size(3) &&
                        c.k.size(2) > 0 && c.k.size(1) > 0 && c.q.size(1) % c.k.size(2) == 0,
                    c.op, ": q ", c.q.sizes(), " and caches ", c.k.sizes(), " and ", c.v.sizes(),
                    " must be [T,Hq,D], [blocks,block_size,Hk,D] and [blocks,block_size,Hk,Dv] with Hq a multiple of "
                    "Hk");
  TORCH_CHECK_VALUE(!c.q2 || (c.q2->dim() == 3 && c.q2->sizes().slice(0, 2) == c.q.sizes().slice(0, 2) &&
                              c.k2->dim() == 4 && c.k2->sizes().slice(0, 3) == c.k.sizes().slice(0, 3) &&
                              c.q2->size(2) == c.k2->size(3)),
                    c.op, ": the rotary part of queries and of keys must have the shape of the latent part, but for "
                    "its last axis");
  for (const auto& [cache, scales] : {std::pair(c.k, c.k_scale), std::pair(c.v, c.v_scale)}) {
    TORCH_CHECK_VALUE((cache.scalar_type() == at::kChar) == scales.has_value(), c.op, ": a cache is ",
                      cache.scalar_type(), " with ", scales ? "scales" : "no scales",
                      "; an int8 cache needs scales [blocks, block_size, heads], another takes none");
    TORCH_CHECK_VALUE(!scales || scales->sizes() == cache.sizes().slice(0, 3), c.op, ": scales ", scales->sizes(),
                      " of a cache ", cache.sizes());
  }
  TORCH_CHECK_VALUE(!c.mask || (c.mask->scalar_type() == at::kBool && c.mask->dim() == 2 &&
                                c.mask->size(0) == c.q.size(0)),
                    c.op, ": mask must be bool [T, keys]");
  TORCH_CHECK_VALUE(!c.sinks || c.sinks->numel() == c.q.size(1), c.op, ": sinks must be [Hq]");
}

void check_lengths(const Call& c) {
  const int64_t tokens = c.q.size(0), room = c.table.size(1) * c.size(), most = c.lengths.empty() ? 0 :
                *std::max_element(c.lengths.begin(), c.lengths.end());
  TORCH_CHECK_VALUE(c.starts.size() == c.lengths.size() + 1 &&
                        c.table.size(0) == static_cast<int64_t>(c.lengths.size()) && c.starts[0] >= 0 &&
                        c.starts.back() <= tokens && std::is_sorted(c.starts.begin(), c.starts.end()),
                    c.op, ": q_start [", at::IntArrayRef(c.starts), "] of ", c.lengths.size(),
                    " sequences must ascend within [0, ", tokens, "], one entry more than sequences, of which the "
                    "block table has ", c.table.size(0));
  for (size_t b = 0; b < c.lengths.size(); ++b)
    TORCH_CHECK_VALUE(c.lengths[b] >= 0 && c.lengths[b] <= room, c.op, ": kv_len[", b, "] is ", c.lengths[b],
                      ", but the block table holds ", room, " keys");
  TORCH_CHECK_VALUE(!c.mask || c.mask->size(1) >= most, c.op, ": mask has ", c.mask ? c.mask->size(1) : 0,
                    " keys, but a sequence has ", most);
}

// Every page that will be read is one of the cache. Entries that no query sees may be anything. True if some of what
// will be read was never stored.
bool check_pages(const Call& c) {
  int32_t least = 0;
  const int64_t blocks = c.k.size(0), size = c.size(), width = c.table.size(1);
  for (size_t b = 0; b < c.lengths.size(); ++b) {
    if (!c.has_work(b)) continue;
    const int32_t* page = c.table.const_data_ptr<int32_t>() + b * width;
    for (int64_t i = c.first(b) / size; i < (c.lengths[b] + size - 1) / size; ++i) {
      TORCH_CHECK_INDEX(page[i] < blocks, c.op, ": block_table[", b, ", ", i, "] is ", page[i],
                        ", but the cache has ", blocks, " blocks");
      least = std::min(least, page[i]);
    }
  }
  return least < 0;
}

// The keys [from, length) of one sequence, dense: [1, H, keys, D]. Zeros where a page was never stored, and in front of
// what the queries see.
at::Tensor gather(const Call& c, const at::Tensor& cache, const OptTensor& scale, size_t b, int64_t from,
                  at::ScalarType dtype) {
  const int64_t size = c.size(), first = from / size, last = (c.lengths[b] + size - 1) / size;
  const at::Tensor pages = c.table.select(0, b).slice(0, first, last).to(at::kLong), real = pages.clamp_min(0);
  at::Tensor rows = cache.index_select(0, real).to(dtype);
  if (scale) rows = rows * scale->index_select(0, real).unsqueeze(-1);
  rows = at::where((pages >= 0).view({-1, 1, 1, 1}), rows, at::zeros({}, rows.options()));
  rows = rows.flatten(0, 1).slice(0, 0, c.lengths[b] - first * size);
  const int64_t gone = c.first(b) - first * size;
  if (gone > 0) rows.slice(0, 0, gone).zero_();
  return rows.slice(0, from - first * size).transpose(0, 1).unsqueeze(0);
}

at::Tensor portable(const Call& c) {
  at::Tensor y = at::zeros({c.q.size(0), c.q.size(1), c.v.size(3)}, c.q.options());
  const auto wide = c.q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (size_t b = 0; b < c.lengths.size(); ++b) {
    if (!c.has_work(b)) continue;
    const auto mine = [&](const at::Tensor& t) { return t.slice(0, c.starts[b], c.starts[b + 1]); };
    const int64_t from = c.first(b) / c.size() * c.size();
    at::Tensor q = mine(c.q), k = gather(c, c.k, c.k_scale, b, from, wide);
    const at::Tensor v = gather(c, c.v, c.v_scale, b, from, wide);
    if (c.q2) {
      q = at::cat({q, mine(*c.q2)}, -1);
      k = at::cat({k, gather(c, *c.k2, {}, b, from, wide)}, -1);
    }
    Scores how = c.scores(b);
    how.last -= from;
    OptTensor mask;
    if (c.mask) mask = mine(*c.mask).slice(1, from, c.lengths[b]).unsqueeze(0).unsqueeze(0);
    q = q.to(wide).transpose(0, 1).unsqueeze(0);
    mine(y).copy_(attention_portable(q, k, v, {}, mask, c.sinks, how).squeeze(0).transpose(0, 1));
  }
  return y;
}

bool one_apart(const at::Tensor& t) { return t.stride(-1) == 1 || t.size(-1) == 1; }

// The arithmetic that the kernels have for these operands, if any: bf16 from bf16 caches, else float.
std::optional<Dtype> arithmetic(const Call& c) {
  const auto q = c.q.scalar_type(), k = c.k.scalar_type();
  const bool fits = one_apart(c.k) && one_apart(c.v) && (!c.k2 || one_apart(*c.k2));
  const bool alike = c.v.scalar_type() == k && (!c.k2 || c.k2->scalar_type() == k) &&
                     (!c.q2 || c.q2->scalar_type() == q);
  const bool scaled = !c.k_scale || (c.k_scale->scalar_type() == at::kFloat && c.v_scale->scalar_type() == at::kFloat);
  if (!fits || !alike || !scaled || isa() == Isa::portable || c.q.numel() == 0 || c.k.numel() == 0 || c.v.numel() == 0)
    return {};
  if (q == at::kBFloat16 && k == at::kBFloat16) return Dtype::bf16;
  const bool known = k == at::kFloat || k == at::kBFloat16 || k == at::kHalf || k == at::kChar;
  return known && (q == at::kFloat || q == at::kBFloat16 || q == at::kHalf) ? std::optional(Dtype::f32) : std::nullopt;
}

Dtype stored_as(at::ScalarType type) {
  if (type == at::kFloat) return Dtype::f32;
  if (type == at::kBFloat16) return Dtype::bf16;
  return type == at::kHalf ? Dtype::f16 : Dtype::i8;
}

Stored stored(const at::Tensor& cache, const OptTensor& scale) {
  Stored s;
  s.data = cache.const_data_ptr();
  if (scale) s.scale = scale->const_data_ptr<float>();
  // Block, head, token; of the scales, the token last as well.
  const int axes[3] = {0, 2, 1};
  for (int i = 0; i < 3; ++i) {
    s.stride[i] = cache.stride(axes[i]);
    if (scale) s.scale_stride[i] = scale->stride(axes[i]);
  }
  return s;
}

// Elements from a token's first to the last that is read with it: heads may lie side by side.
int64_t span(const at::Tensor& cache) {
  const bool near = cache.stride(2) < cache.stride(1);
  return (near ? (cache.size(2) - 1) * cache.stride(2) : 0) + cache.size(3);
}

at::Tensor kernel(const Call& c, Dtype dtype, bool holes) {
  const auto type = dtype == Dtype::f32 ? at::kFloat : at::kBFloat16;
  const auto operand = [&](const at::Tensor& t) {
    const at::Tensor typed = t.to(type);
    return one_apart(typed) ? typed : typed.contiguous();
  };
  const at::Tensor q = operand(c.q);
  at::Tensor q2, mask, sinks;
  if (c.q2) q2 = operand(*c.q2);
  if (c.mask) mask = c.mask->stride(1) == 1 || c.mask->stride(1) == 0 ? *c.mask : c.mask->contiguous();
  if (c.sinks) sinks = c.sinks->to(at::kFloat).contiguous();
  const int64_t hq = c.q.size(1), dv = c.v.size(3);
  at::Tensor zeros;
  if (holes || c.window >= 0)
    zeros = at::zeros({std::max({span(c.k), span(c.v), c.k2 ? span(*c.k2) : 0})}, at::kFloat);
  at::Tensor y = at::empty({c.q.size(0), hq, dv}, q.options());

  Attention shared;
  shared.dtype = dtype;
  shared.stored = stored_as(c.k.scalar_type());
  shared.k = stored(c.k, c.k_scale);
  shared.v = stored(c.v, c.v_scale);
  shared.hq = hq;
  shared.hk = c.k.size(2);
  shared.d = c.k.size(3);
  shared.dv = dv;
  if (c.k2) {
    shared.k2 = stored(*c.k2, {});
    shared.d2 = c.k2->size(3);
  }
  const auto rows = [](int64_t (&stride)[3], const at::Tensor& t) {
    stride[1] = t.stride(1);
    stride[2] = t.stride(0);
  };
  rows(shared.q_stride, q);
  rows(shared.y_stride, y);
  if (c.q2) rows(shared.q2_stride, q2);
  if (c.mask) {
    shared.mask_stride[2] = mask.stride(0);
    shared.mask_stride[3] = mask.stride(1);
  }
  if (c.sinks) shared.sinks = sinks.const_data_ptr<float>();
  shared.scale = static_cast<float>(c.scale);
  shared.softcap = static_cast<float>(c.softcap);
  shared.page = c.size();
  if (zeros.defined()) shared.zeros = zeros.const_data_ptr();

  const auto at_token = [&](const at::Tensor& t, int64_t token) {
    return static_cast<const char*>(t.const_data_ptr()) + token * t.stride(0) * t.element_size();
  };
  std::vector<Attention> list;
  int64_t done = 0;  // tokens that have a result
  const auto fill_zeros = [&](int64_t until) {
    if (until > done) y.slice(0, done, until).zero_();
  };
  for (size_t b = 0; b < c.lengths.size(); ++b) {
    if (!c.has_work(b)) continue;
    fill_zeros(c.starts[b]);
    done = c.starts[b + 1];
    const Scores how = c.scores(b);
    Attention& p = list.emplace_back(shared);
    p.q = at_token(q, c.starts[b]);
    p.y = const_cast<char*>(at_token(y, c.starts[b]));
    if (c.q2) p.q2 = at_token(q2, c.starts[b]);
    if (c.mask) p.mask = reinterpret_cast<const bool*>(at_token(mask, c.starts[b]));
    p.sq = c.queries(b);
    p.sk = c.lengths[b];
    p.last = how.last;
    p.window = how.window;
    p.table = c.table.const_data_ptr<int32_t>() + b * c.table.size(1);
  }
  fill_zeros(c.q.size(0));
  if (!list.empty()) run_attention(list.data(), list.size());
  return y.to(c.q.scalar_type());
}

at::Tensor run(bool allow_kernel, Call c, const at::Tensor& table, const at::Tensor& q_start,
               const at::Tensor& kv_len) {
  TORCH_CHECK_VALUE(table.dim() == 2, c.op, ": block_table must be [B, max_blocks], got ", table.sizes());
  c.table = table.to(at::kInt).contiguous();
  c.starts = numbers(q_start);
  c.lengths = numbers(kv_len);
  check_operands(c);
  check_lengths(c);
  const bool holes = check_pages(c);
  const auto dtype = allow_kernel ? arithmetic(c) : std::nullopt;
  return dtype ? kernel(c, *dtype, holes) : portable(c);
}

template <bool kernel>
at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                           const at::Tensor& block_table, const at::Tensor& q_start, const at::Tensor& kv_len,
                           double scale, bool causal, int64_t window, double softcap, const OptTensor& sinks,
                           const OptTensor& mask, const OptTensor& k_scale, const OptTensor& v_scale) {
  Call c{.op = "ascend_cpu::paged_attention", .q = q, .k = k_cache, .v = v_cache, .k_scale = k_scale,
         .v_scale = v_scale, .mask = mask, .sinks = sinks, .scale = scale, .softcap = softcap, .causal = causal,
         .window = window};
  return run(kernel, std::move(c), block_table, q_start, kv_len);
}

template <bool kernel>
at::Tensor mla_attention(const at::Tensor& q_latent, const at::Tensor& q_rope, const at::Tensor& ckv_cache,
                         const at::Tensor& rope_cache, const at::Tensor& block_table, const at::Tensor& q_start,
                         const at::Tensor& kv_len, double scale, bool causal, const OptTensor& mask) {
  TORCH_CHECK_VALUE(ckv_cache.dim() == 3 && rope_cache.dim() == 3,
                    "ascend_cpu::mla_attention: caches must be [blocks, block_size, size], got ", ckv_cache.sizes(),
                    " and ", rope_cache.sizes());
  const at::Tensor latents = ckv_cache.unsqueeze(2);
  Call c{.op = "ascend_cpu::mla_attention", .q = q_latent, .k = latents, .v = latents, .q2 = q_rope,
         .k2 = rope_cache.unsqueeze(2), .mask = mask, .scale = scale, .causal = causal};
  return run(kernel, std::move(c), block_table, q_start, kv_len);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ascend_cpu, m) {
  for (const std::string suffix : {"", "_portable"}) {
    m.def(("paged_attention" + suffix +
           "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor q_start, Tensor kv_len, *, "
           "float scale, bool causal=True, int window=-1, float softcap=0., Tensor? sinks=None, Tensor? mask=None, "
           "Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor")
              .c_str());
    m.def(("mla_attention" + suffix +
           "(Tensor q_latent, Tensor q_rope, Tensor ckv_cache, Tensor rope_cache, Tensor block_table, Tensor q_start, "
           "Tensor kv_len, *, float scale, bool causal=True, Tensor? mask=None) -> Tensor")
              .c_str());
  }
}

TORCH_LIBRARY_IMPL(ascend_cpu, CPU, m) {
  m.impl("paged_attention", paged_attention<true>);
  m.impl("paged_attention_portable", paged_attention<false>);
  m.impl("mla_attention", mla_attention<true>);
  m.impl("mla_attention_portable", mla_attention<false>);
}

}  // namespace ascend_cpu
