// What ops.cpp (which knows torch) and the kernels (which do not) say to each other. No torch headers: they cost
// fifteen seconds of compile time a file.
#pragma once

#include <cstdint>
#include <functional>

namespace ascend_cpu {

enum class Dtype { bf16, f32, f16, i8 };
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

// Where keys or values are, in elements of their dtype: token j of head h lies at batch b, or, in pages, at page
// table[j / page], place j % page. Neighbours along the last axis are 1 apart.
struct Stored {
  const void* data = nullptr;
  int64_t stride[3] = {};  // batch, or page; head; token
  const float* scale = nullptr;  // int8: what a token of a head is multiplied by
  int64_t scale_stride[3] = {};
};

// softmax(softcap(q @ k^T * scale) + bias, masked) @ v, streamed over the keys; row r of the result is query r.
// Strides are (batch, head, row) in elements for q and y, whose last axis is contiguous, and (batch, head, row, key)
// for bias and mask, 0 where broadcast; neighbouring keys are 1 apart, or 0. Hq is a multiple of Hk: query head h reads
// key head h / (Hq / Hk).
struct Attention {
  Dtype dtype = Dtype::f32;  // of q, y and the arithmetic: bf16 or f32
  Dtype stored = Dtype::f32;  // of k and v: any if dtype is f32, else bf16
  const void* q = nullptr;
  void* y = nullptr;
  Stored k, v;
  const void* bias = nullptr;    // additive, bf16 or float, or null
  const bool* mask = nullptr;    // true = visible, or null
  const float* sinks = nullptr;  // [Hq]: a logit per head that takes weight but has no value, or null
  bool bias_is_float = false;
  int64_t batch = 1, hq = 1, hk = 1, sq = 0, sk = 0, d = 0, dv = 0;
  int64_t q_stride[3] = {}, y_stride[3] = {}, bias_stride[4] = {}, mask_stride[4] = {};
  float scale = 1, softcap = 0;  // softcap 0: none
  int64_t last = 0;              // key j is visible to query i iff j <= i + last
  int64_t window = 0;            // and j > i + last - window
  float empty = 0;               // value of a row that sees no key
  bool* empty_rows = nullptr;    // [B, Hq, Sq], all false: set to true where a row sees no key; or null

  // A second part of q and k (the rotary one of latent attention), whose products are added; none if d2 is 0.
  const void* q2 = nullptr;
  Stored k2;
  int64_t d2 = 0, q2_stride[3] = {};

  // Pages of the one sequence (batch is 1), or null. A negative page holds zeros: `zeros` is a row of them, of all
  // heads if these are nearer to each other than tokens are.
  const int32_t* table = nullptr;
  int64_t page = 1;
  const void* zeros = nullptr;

  // Keys before this one are hidden from every query, and never read if they are in pages (they may be gone).
  int64_t first() const { return last - window + 1 > 0 ? last - window + 1 : 0; }
};

constexpr int64_t kDecodeRows = 8;

// Runs body(i) for i in [0, count) on torch's threads; the order of the calls is unspecified.
void parallel(int64_t count, const std::function<void(int64_t)>& body);
int threads();

// Need AVX-512 F, BW, VL, DQ and BF16: ask isa() first.
#if defined(__x86_64__)
void run_linear(const Linear& p);
// Attentions of one dtype, stored dtype, and list of operands (bias and so on, given or not), d, dv and heads.
void run_attention(const Attention* p, int64_t count);
void run_decode(const Attention* p, int64_t count);  // run_attention's choice for at most kDecodeRows rows a key head
#else
inline void run_linear(const Linear&) {}
inline void run_attention(const Attention*, int64_t) {}
#endif

enum class Isa { portable, avx512_bf16, amx_bf16 };

// The best that this processor and the environment variable ASCEND_DYNAMO_CPU_ISA (portable | avx512_bf16 |
// amx_bf16, an upper limit) allow; read once.
Isa isa();

}  // namespace ascend_cpu
