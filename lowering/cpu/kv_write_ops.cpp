// New tokens written to their slots of a paged cache, in place: copies of rows, quantised where the cache is int8.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "ops.h"

namespace ascend_cpu {
namespace {

constexpr int64_t kGrain = 32 << 10;  // bytes that one thread copies at least

// One cache [blocks, block_size, H, D] and what is written to it, [T, H, D].
struct Write {
  const char* name;
  at::Tensor values, cache;
  OptTensor scale;
};

void check(const char* op, const Write& w, const at::Tensor& slots) {
  const bool int8 = w.cache.scalar_type() == at::kChar;
  TORCH_CHECK_VALUE(w.values.dim() == 3 && w.cache.dim() == 4 && slots.dim() == 1 &&
                        w.values.size(0) == slots.size(0) && w.values.size(1) == w.cache.size(2) &&
                        w.values.size(2) == w.cache.size(3),
                    op, ": ", w.values.sizes(), " cannot be written to ", slots.sizes(), " slots of ", w.name, " ",
                    w.cache.sizes());
  TORCH_CHECK_VALUE(int8 == w.scale.has_value(), op, ": ", w.name, " is ", w.cache.scalar_type(), " with ",
                    w.scale ? "scales" : "no scales",
                    "; an int8 cache needs scales [blocks, block_size, heads], another takes none");
  TORCH_CHECK_VALUE(!w.scale || (w.scale->scalar_type() == at::kFloat &&
                                 w.scale->sizes() == w.cache.sizes().slice(0, 3)),
                    op, ": the scales of ", w.name, " ", w.cache.sizes(), " must be float32 ",
                    w.cache.sizes().slice(0, 3));
  const int64_t size = w.cache.size(1), room = w.cache.size(0) * size;
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < slots.size(0); ++t)
    TORCH_CHECK_INDEX(slot[t] < room, op, ": slot ", slot[t], " is beyond the cache, which has ", w.cache.size(0),
                      " blocks of ", size, " tokens; slots are block * block_size + offset, -1 for padding");
}

// Calls body(token, block, offset) for the real tokens, each of so many bytes.
template <class F>
void for_slots(const at::Tensor& slots, int64_t size, int64_t bytes, F body) {
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, bytes));
  at::parallel_for(0, slots.size(0), grain, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t)
      if (slot[t] >= 0) body(t, slot[t] / size, slot[t] % size);
  });
}

void copy(const Write& w, const at::Tensor& slots) {
  const at::Tensor values = w.values.to(w.cache.scalar_type()).contiguous();
  const int64_t heads = values.size(1), width = values.size(2), item = values.element_size();
  const auto stride = w.cache.strides();
  const char* from = static_cast<const char*>(values.const_data_ptr());
  char* to = static_cast<char*>(w.cache.mutable_data_ptr());
  const bool whole = stride[3] == 1 || width == 1;
  // Heads side by side are one row.
  const bool merged = whole && (stride[2] == width || heads == 1);
  const int64_t rows = merged ? 1 : heads, row = merged ? heads * width : width;
  for_slots(slots, w.cache.size(1), heads * width * item, [&](int64_t t, int64_t block, int64_t offset) {
    for (int64_t h = 0; h < rows; ++h) {
      const char* src = from + (t * heads + h) * width * item;
      char* dst = to + (block * stride[0] + offset * stride[1] + h * stride[2]) * item;
      if (whole)
        std::memcpy(dst, src, row * item);
      else
        for (int64_t d = 0; d < row; ++d) std::memcpy(dst + d * stride[3] * item, src + d * item, item);
    }
  });
}

// Symmetric int8: scale = max|x| / 127, 1 if that is 0; zeros and a scale that is not finite if x is not.
template <class T>
void quantise(const Write& w, const at::Tensor& values, const at::Tensor& slots) {
  const int64_t heads = values.size(1), width = values.size(2);
  const auto stride = w.cache.strides(), scale_stride = w.scale->strides();
  const T* from = values.const_data_ptr<T>();
  int8_t* to = w.cache.mutable_data_ptr<int8_t>();
  float* scales = w.scale->mutable_data_ptr<float>();
  for_slots(slots, w.cache.size(1), heads * width * sizeof(T), [&](int64_t t, int64_t block, int64_t offset) {
    for (int64_t h = 0; h < heads; ++h) {
      const T* x = from + (t * heads + h) * width;
      int8_t* q = to + block * stride[0] + offset * stride[1] + h * stride[2];
      T top = 0;
      bool nan = false;
      for (int64_t d = 0; d < width; ++d) {
        top = std::max(top, std::abs(x[d]));
        nan = nan || x[d] != x[d];
      }
      float scale = static_cast<float>(nan ? std::numeric_limits<T>::quiet_NaN() : top / 127);
      if (scale == 0) scale = 1;
      const bool finite = std::isfinite(scale);
      const T unit = finite ? scale : 1;
      for (int64_t d = 0; d < width; ++d)
        q[d * stride[3]] = finite ? static_cast<int8_t>(std::clamp<T>(std::nearbyint(x[d] / unit), -127, 127)) : 0;
      scales[block * scale_stride[0] + offset * scale_stride[1] + h * scale_stride[2]] = scale;
    }
  });
}

void write(const Write& w, const at::Tensor& slots) {
  if (w.values.numel() == 0) return;
  if (!w.scale) {
    copy(w, slots);
  } else if (w.values.scalar_type() == at::kDouble) {
    quantise<double>(w, w.values.contiguous(), slots);
  } else {
    quantise<float>(w, w.values.to(at::kFloat).contiguous(), slots);
  }
}

// Both caches are checked before either is written.
void write_both(const char* op, const Write& a, const Write& b, const at::Tensor& slot_mapping) {
  const at::Tensor slots = slot_mapping.to(at::kLong).contiguous();
  check(op, a, slots);
  check(op, b, slots);
  write(a, slots);
  write(b, slots);
  for (const Write* w : {&a, &b})
    for (const OptTensor& t : {OptTensor(w->cache), w->scale})
      if (t && !t->is_inference()) t->unsafeGetTensorImpl()->bump_version();
}

void kv_write(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_cache, const at::Tensor& v_cache,
              const at::Tensor& slot_mapping, const OptTensor& k_scale, const OptTensor& v_scale) {
  write_both("ascend_cpu::kv_write", {"k_cache", k, k_cache, k_scale}, {"v_cache", v, v_cache, v_scale}, slot_mapping);
}

void mla_kv_write(const at::Tensor& ckv, const at::Tensor& k_rope, const at::Tensor& ckv_cache,
                  const at::Tensor& rope_cache, const at::Tensor& slot_mapping) {
  write_both("ascend_cpu::mla_kv_write", {"ckv_cache", ckv.unsqueeze(1), ckv_cache.unsqueeze(2), {}},
             {"rope_cache", k_rope.unsqueeze(1), rope_cache.unsqueeze(2), {}}, slot_mapping);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ascend_cpu, m) {
  m.def(
      "kv_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, *, "
      "Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None) -> ()");
  m.def(
      "mla_kv_write(Tensor ckv, Tensor k_rope, Tensor(a!) ckv_cache, Tensor(b!) rope_cache, Tensor slot_mapping) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(ascend_cpu, CPU, m) {
  m.impl("kv_write", kv_write);
  m.impl("mla_kv_write", mla_kv_write);
}

}  // namespace ascend_cpu
