// What ops.cpp (which knows torch) and the kernels (which do not) say to each other. No torch headers: they cost
// fifteen seconds of compile time a file.
#pragma once

#include <cstdint>
#include <functional>

namespace ascend_cpu {

enum class Dtype { bf16, f32 };
enum class Act { none, relu, silu, gelu, gelu_tanh };
enum class Other { none, add, mul };

// y = combine(act(x @ w^T + bias), other); with `gated`, w holds 2N rows and y = act(gate) * up instead of act(...).
// Strides are in elements; the last axis of every operand is contiguous. All tensors share one dtype.
struct Linear {
  Dtype dtype;
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

// softmax(softcap(q @ k^T * scale) + bias, masked) @ v, streamed over the keys; row r of the result is query r.
// Strides are (batch, head, row) in elements for q, k, v, y, whose last axis is contiguous, and (batch, head, row,
// key) for bias and mask, 0 where broadcast; neighbouring keys are 1 apart, or 0. Hq is a multiple of Hk: query head h reads key head h / (Hq / Hk).
struct Attention {
  Dtype dtype;
  const void *q, *k, *v;
  void* y;
  const void* bias;     // additive, bf16 or float, or null
  const bool* mask;     // true = visible, or null
  const float* sinks;   // [Hq]: a logit per head that takes weight but has no value, or null
  bool bias_is_float;
  int64_t batch, hq, hk, sq, sk, d, dv;
  int64_t q_stride[3], k_stride[3], v_stride[3], y_stride[3], bias_stride[4], mask_stride[4];
  float scale, softcap;    // softcap 0: none
  int64_t last;            // key j is visible to query i iff j <= i + last
  int64_t window;          // and j > i + last - window
  float empty;             // value of a row that sees no key
  bool* empty_rows;        // [B, Hq, Sq], all false: set to true where a row sees no key; or null
};

constexpr int64_t kDecodeRows = 8;

// Runs body(i) for i in [0, count) on torch's threads; the order of the calls is unspecified.
void parallel(int64_t count, const std::function<void(int64_t)>& body);
int threads();

// Need AVX-512 F, BW, VL, DQ and BF16: ask isa() first.
#if defined(__x86_64__)
void run_linear(const Linear& p);
void run_attention(const Attention& p);
void run_decode(const Attention& p);  // run_attention's choice for at most kDecodeRows rows a key head
#else
inline void run_linear(const Linear&) {}
inline void run_attention(const Attention&) {}
#endif

enum class Isa { portable, avx512_bf16, amx_bf16 };

// The best that this processor and the environment variable ASCEND_DYNAMO_CPU_ISA (portable | avx512_bf16 |
// amx_bf16, an upper limit) allow; read once.
Isa isa();

}  // namespace ascend_cpu
