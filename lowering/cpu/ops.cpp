// Linear layers, as torch sees them: checks, shapes, the choice between our kernels and ATen's.
#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include <atomic>
#include <string>

#include "ops.h"

namespace ascend_cpu {

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void parallel(int64_t count, const std::function<void(int64_t)>& body) {
  const int64_t workers = std::min<int64_t>(count, threads());
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  // A counter instead of equal shares: a thread that lost its core to another process takes fewer items.
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
  });
}

namespace {

// "[act][_mul]" or "add" or "swiglu": other is multiplied in after "_mul" (and "mul"), else added.
struct Epilogue {
  Act act = Act::none;
  Other combine = Other::none;
  bool gated = false;
};

Epilogue parse(std::string_view text, bool has_other) {
  Epilogue e;
  std::string_view act = text;
  const auto ends = [&](std::string_view tail) {
    return act.size() >= tail.size() && act.substr(act.size() - tail.size()) == tail;
  };
  if (has_other) e.combine = Other::add;
  if (act == "mul" || ends("_mul")) {
    TORCH_CHECK_VALUE(has_other, "ascend_cpu::linear: epilogue '", text, "' needs the argument other");
    e.combine = Other::mul;
    act = act == "mul" ? "none" : act.substr(0, act.size() - 4);
  }
  e.gated = act == "swiglu";
  if (act == "relu") e.act = Act::relu;
  else if (act == "silu" || act == "swiglu") e.act = Act::silu;
  else if (act == "gelu") e.act = Act::gelu;
  else if (act == "gelu_tanh") e.act = Act::gelu_tanh;
  else
    TORCH_CHECK_VALUE(act == "none", "ascend_cpu::linear: unknown epilogue '", text,
                      "'; known: none, relu, silu, gelu, gelu_tanh, swiglu, mul, and any of these with _mul");
  return e;
}

at::Tensor activation(Act act, const at::Tensor& x) {
  switch (act) {
    case Act::relu: return at::relu(x);
    case Act::silu: return at::silu(x);
    case Act::gelu: return at::gelu(x);
    case Act::gelu_tanh: return at::gelu(x, "tanh");
    default: return x;
  }
}

at::Tensor portable(const at::Tensor& x, const at::Tensor& w, const OptTensor& bias, const Epilogue& e,
                    const OptTensor& other) {
  at::Tensor y = at::linear(x, w, bias);
  if (e.gated) {
    const auto halves = y.chunk(2, -1);
    y = activation(e.act, halves[0]).mul_(halves[1]);
  } else {
    y = activation(e.act, y);
  }
  if (e.combine == Other::add) y = at::add(y, *other);
  if (e.combine == Other::mul) y = at::mul(y, *other);
  return y.contiguous();
}

// The stride between the rows of t seen as [rows, last axis], or -1 if there is none.
int64_t row_stride(const at::Tensor& t) {
  const int64_t dims = t.dim();
  if (t.size(-1) != 1 && t.stride(-1) != 1) return -1;
  int64_t stride = -1, expected = -1;
  for (int64_t d = dims - 2; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (stride < 0) stride = expected = t.stride(d);
    if (t.stride(d) != expected) return -1;
    expected *= t.size(d);
  }
  return stride < 0 ? t.size(-1) : stride;
}

// Whether our kernels are the best there is for tensors of this dtype, most of them with `rows` rows. In bf16, tiles of
// x in AMX registers beat ours as soon as repacking the weight is paid for. In fp32, MKL is as fast on Intel's
// processors (which have AMX if they have bf16) and slower on AMD's.
bool kernel_is_best(at::ScalarType dtype, int64_t rows) {
  if (dtype == at::kFloat) return isa() == Isa::avx512_bf16;
  return dtype == at::kBFloat16 && (isa() == Isa::avx512_bf16 || (isa() == Isa::amx_bf16 && rows <= 16));
}

at::Tensor linear_with(bool allow_kernel, const at::Tensor& x, const at::Tensor& w, const OptTensor& bias,
                       std::string_view text, const OptTensor& other) {
  const Epilogue e = parse(text, other.has_value());
  TORCH_CHECK_VALUE(x.dim() >= 1 && w.dim() == 2 && x.size(-1) == w.size(1), "ascend_cpu::linear: x ", x.sizes(),
                    " and w ", w.sizes(), " must be [..., K] and [N, K]");
  TORCH_CHECK_VALUE(!e.gated || w.size(0) % 2 == 0, "ascend_cpu::linear: swiglu needs an even number of weight rows, ",
                    "got ", w.size(0));
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == w.size(0)), "ascend_cpu::linear: bias must be [",
                    w.size(0), "]");
  auto sizes = x.sizes().vec();
  const int64_t k = sizes.back(), n = e.gated ? w.size(0) / 2 : w.size(0);
  sizes.back() = n;
  TORCH_CHECK_VALUE(!other || other->sizes() == sizes, "ascend_cpu::linear: other must be ", at::IntArrayRef(sizes));
  int64_t m = 1;
  for (size_t d = 0; d + 1 < sizes.size(); ++d) m *= sizes[d];

  const auto alike = [&](const OptTensor& t) { return !t || (t->scalar_type() == x.scalar_type() && t->is_cpu()); };
  const int64_t w_stride = w.size(0) == 1 ? k : w.stride(0);
  if (!allow_kernel || !kernel_is_best(x.scalar_type(), m) || !alike(x) || !alike(w) || !alike(bias) || !alike(other) ||
      k == 0 ||
      (k != 1 && w.stride(1) != 1) || w_stride < k || (bias && bias->numel() > 1 && bias->stride(0) != 1))
    return portable(x, w, bias, e, other);

  at::Tensor rows = x, extra = other ? *other : x;
  int64_t x_stride = row_stride(rows), other_stride = other ? row_stride(extra) : 0;
  if (x_stride < 0) {
    rows = x.contiguous();
    x_stride = k;
  }
  if (other_stride < 0) {
    extra = other->contiguous();
    other_stride = n;
  }
  at::Tensor y = at::empty(sizes, x.options());
  if (m == 0 || n == 0) return y;
  run_linear({dtype_of(x), rows.const_data_ptr(), w.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
               other ? extra.const_data_ptr() : nullptr, y.mutable_data_ptr(), m, n, k, x_stride, w_stride,
               other_stride, e.act, e.combine, e.gated});
  return y;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& w, const OptTensor& bias, std::string_view epilogue,
                  const OptTensor& other) {
  return linear_with(true, x, w, bias, epilogue, other);
}

at::Tensor linear_portable(const at::Tensor& x, const at::Tensor& w, const OptTensor& bias, std::string_view epilogue,
                           const OptTensor& other) {
  return linear_with(false, x, w, bias, epilogue, other);
}

std::string isa_name() {
  switch (isa()) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx_bf16: return "amx_bf16";
    default: return "portable";
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ascend_cpu, m) {
  m.def("linear(Tensor x, Tensor w, Tensor? bias=None, str epilogue='none', Tensor? other=None) -> Tensor");
  m.def("linear_portable(Tensor x, Tensor w, Tensor? bias=None, str epilogue='none', Tensor? other=None) -> Tensor");
  m.def("isa() -> str", isa_name);
}

TORCH_LIBRARY_IMPL(ascend_cpu, CPU, m) {
  m.impl("linear", linear);
  m.impl("linear_portable", linear_portable);
}

}  // namespace ascend_cpu
