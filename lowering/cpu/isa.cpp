// What this processor can do.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace ascend_cpu {
namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512bf16"))
    return Isa::portable;
  // CPUID leaf 7, EDX bit 22 is AMX-BF16. Compilers before GCC 13 have no name for it.
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (d >> 22) & 1 ? Isa::amx_bf16 : Isa::avx512_bf16;
#else
  return Isa::portable;
#endif
}

Isa allowed() {
  const char* limit = std::getenv("ASCEND_DYNAMO_CPU_ISA");
  if (limit && !std::strcmp(limit, "portable")) return Isa::portable;
  if (limit && !std::strcmp(limit, "avx512_bf16")) return Isa::avx512_bf16;
  return Isa::amx_bf16;
}

}  // namespace

Isa isa() {
  static const Isa value = std::min(detect(), allowed());
  return value;
}

}  // namespace ascend_cpu
