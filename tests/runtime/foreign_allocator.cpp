// Somebody else's CPU allocator: forwards to torch's own, as a debugging or counting one would.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

namespace {
struct Foreign final : at::Allocator {
  c10::DataPtr allocate(size_t n) override { return c10::GetDefaultCPUAllocator()->allocate(n); }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetDefaultCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};
}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API void foreign_install() { c10::SetCPUAllocator(new Foreign); }

// Torch's own allocator, but nobody may replace it.
API void foreign_raise() { c10::SetCPUAllocator(c10::GetDefaultCPUAllocator(), 9); }
