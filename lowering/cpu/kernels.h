// What ops.cpp (which knows torch) and the kernels (which do not) say to each other. No torch headers: they cost
// fifteen seconds of compile time a file.
#pragma once

#include <cstdint>
#include <functional>

namespace ascend_cpu {

enum class Act { none, relu, silu, gelu, gelu_tanh };
enum class Other { none, add, mul };

// y = combine(act(x @ w^T + bias), other); with `gated`, w holds 2N rows and y = act(gate) * up instead of act(...).
// Strides are in elements; the last axis of every operand is contiguous. All tensors share one dtype.
struct Linear {
  const void* x;
  const void* w;
  const void* bias;   // [N] ([2N] if gated) or null
  const void* other;  // [M, N] or null
  void* y;            // [M, N], row stride N
  int64_t m, n, k;
  int64_t x_stride, w_stride, other_stride;
  Act act;
  Other combine;
  bool gated;
};

// Runs body(i) for i in [0, count) on torch's threads; the order of the calls is unspecified.
void parallel(int64_t count, const std::function<void(int64_t)>& body);
int threads();

// Needs AVX-512 F, BW, VL, DQ and BF16: ask isa() first.
#if defined(__x86_64__)
void linear_bf16(const Linear& p);
#else
inline void linear_bf16(const Linear&) {}
#endif

enum class Isa { portable, avx512_bf16, amx_bf16 };

// The best that this processor and the environment variable ASCEND_DYNAMO_CPU_ISA (portable | avx512_bf16 |
// amx_bf16, an upper limit) allow; read once.
Isa isa();

}  // namespace ascend_cpu
