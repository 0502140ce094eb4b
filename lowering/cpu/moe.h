// What moe_ops.cpp (which knows torch) and the kernels of the mixture of experts say to each other.
#pragma once

#include "kernels.h"

namespace ascend_cpu {

// y[s] = (act(gate) * (up + shift)) @ w_down[e]^T of every slot s: a token and one of its experts e, slots sorted by
// expert. Gate and up are halves of x[token[s]] @ w_up[e]^T, or take turns. Strides are in elements; the last axis of
// every operand is contiguous. All tensors share one dtype.
struct Experts {
  Dtype dtype;
  const void* x;          // [T, K]
  const void* w_up;       // [E, 2I, K]
  const void* w_down;     // [E, K, I]
  const void* b_up;       // [E, 2I] contiguous, or null
  const void* b_down;     // [E, K] contiguous, or null
  void* y;                // [slots, K] contiguous
  const int32_t* token;   // [slots]
  const int32_t* start;   // [E + 1]: the slots of expert e are start[e] .. start[e + 1]
  int64_t experts, slots, k, inner;
  int64_t x_stride, up_stride, up_row, down_stride, down_row;
  Act act;
  bool interleaved, limited;
  float alpha, limit, shift;
};

// out[t] = sum over j of weight[t * top_k + j] * y[place[t * top_k + j]], places below 0 left out.
struct Combine {
  Dtype dtype;
  const void* y;         // [slots, K]
  void* out;             // [T, K]
  const float* weight;
  const int32_t* place;
  int64_t tokens, top_k, k;
};

#if defined(__x86_64__)
void run_experts(const Experts& p);
void run_combine(const Combine& p);
#else
inline void run_experts(const Experts&) {}
inline void run_combine(const Combine&) {}
#endif

}  // namespace ascend_cpu
