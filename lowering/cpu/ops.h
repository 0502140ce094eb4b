// What the files that register operators with torch share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels.h"

namespace ascend_cpu {

using OptTensor = std::optional<at::Tensor>;

inline Dtype dtype_of(const at::Tensor& t) { return t.scalar_type() == at::kFloat ? Dtype::f32 : Dtype::bf16; }

}  // namespace ascend_cpu
