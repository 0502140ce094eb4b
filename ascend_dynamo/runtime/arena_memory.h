// Address space for arenas, and the instances that live in it.
//
// One range is reserved once, inaccessible and without memory behind it, so that "does this address belong to an
// arena?" is a subtraction and a comparison. Each slot of the range holds one instance, which grows in place.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "arena_plan.h"

namespace arena {

// NaN in fp16, bf16, fp32 and fp64, and different for memory that was never written and memory that was given back.
inline void poison_fresh(void* p, size_t bytes) { std::memset(p, 0xFF, bytes); }
inline void poison_freed(void* p, size_t bytes) {
  constexpr unsigned char pattern[2] = {0xFE, 0x7F};
  auto* to = static_cast<unsigned char*>(p);
  for (size_t i = 0; i < bytes; ++i) to[i] = pattern[i & 1];
}

struct Instance {
  std::mutex lock;
  char* base = nullptr;
  size_t committed = 0;
  std::shared_ptr<const Plan> plan;  // of the call that leases it, or whose blocks are still alive
  std::vector<uint32_t> occupant;    // by place of the plan: the block that lies there
  size_t live = 0;
  bool taken = false, leased = false, orphan = false, poison = false;

  bool idle() const { return !leased && live == 0; }

  // Blocks whose place is `p`'s must be dead before block `index` is handed out.
  bool clear_for(uint32_t index) const {
    const Planned& block = plan->blocks[index];
    for (uint32_t i = block.first_check; i < block.last_check; ++i) {
      const uint32_t before = plan->checks[i];
      if (occupant[plan->blocks[before].place] == before) return false;
    }
    return true;
  }

  void drop_memory() {
    if (committed == 0) return;
    madvise(base, committed, MADV_DONTNEED);
    mprotect(base, committed, PROT_NONE);
    committed = 0;
  }

  void give_up() {  // with the lock held and nothing alive
    drop_memory();
    plan.reset();
    taken = leased = orphan = false;
  }

  void free(char* p) {
    std::lock_guard<std::mutex> guard(lock);
    const size_t place = plan->place_of(static_cast<size_t>(p - base));
    const uint32_t index = place < occupant.size() ? occupant[place] : kNobody;
    if (index == kNobody) {  // as the heap does, for going on would corrupt somebody else's block
      std::fputs("ascend_dynamo arena: double free or foreign pointer\n", stderr);
      std::abort();
    }
    occupant[place] = kNobody;
    if (poison) poison_freed(p, plan->blocks[index].size);
    if (--live == 0 && orphan && !leased) give_up();
  }
};

class Reservation {
 public:
  static constexpr size_t kSlots = 64;

  // Null where the system refuses even a small range (a limit on address space).
  static Reservation* get() {
    static Reservation* const it = make();
    return it;
  }

  bool holds(const void* p) const { return reinterpret_cast<uintptr_t>(p) - start_ < kSlots * slot_; }
  Instance& at(const void* p) { return slots_[(reinterpret_cast<uintptr_t>(p) - start_) / slot_]; }
  size_t slot_bytes() const { return slot_; }
  void range(uint64_t* begin, uint64_t* end) const {
    *begin = start_;
    *end = start_ + kSlots * slot_;
  }

  Instance* take() {
    for (Instance& instance : slots_) {
      std::lock_guard<std::mutex> guard(instance.lock);
      if (instance.taken) continue;
      instance.taken = true;
      return &instance;
    }
    return nullptr;
  }

  // Make the first `bytes` of an instance usable; false where there is no such memory.
  bool commit(Instance& instance, size_t bytes) const {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    bytes = (bytes + page - 1) / page * page;
    if (bytes <= instance.committed) return true;
    if (bytes > slot_ || mprotect(instance.base, bytes, PROT_READ | PROT_WRITE) != 0) return false;
#ifdef MADV_HUGEPAGE
    if (bytes >= kHuge) madvise(instance.base, bytes, MADV_HUGEPAGE);
#endif
    instance.committed = bytes;
    return true;
  }

 private:
  static constexpr size_t kHuge = size_t{1} << 21;

  static Reservation* make() {
    for (size_t slot : {size_t{1} << 34, size_t{1} << 31, size_t{1} << 28}) {
      void* p = mmap(nullptr, kSlots * slot + kHuge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p != MAP_FAILED) return new Reservation(reinterpret_cast<uintptr_t>(p), slot);
    }
    return nullptr;
  }

  Reservation(uintptr_t p, size_t slot) : start_((p + kHuge - 1) / kHuge * kHuge), slot_(slot) {
    for (size_t i = 0; i < kSlots; ++i) slots_[i].base = reinterpret_cast<char*>(start_ + i * slot_);
  }

  uintptr_t start_;
  size_t slot_;
  std::array<Instance, kSlots> slots_;
};

// The instances of one backend. Graphs run one after the other, so they lease the same one; only calls at the same
// time, and blocks that outlive their call, need another.
class Group {
 public:
  Group() = default;
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  ~Group() {
    for (Instance* instance : instances_) {
      std::lock_guard<std::mutex> guard(instance->lock);
      instance->orphan = true;
      if (instance->idle()) instance->give_up();
    }
  }

  Instance* lease(const std::shared_ptr<const Plan>& plan, bool poison) {
    std::lock_guard<std::mutex> guard(lock_);
    for (Instance* instance : instances_) {
      std::lock_guard<std::mutex> inner(instance->lock);
      if (instance->idle()) return lease(*instance, plan, poison);
    }
    Instance* fresh = Reservation::get()->take();
    if (fresh == nullptr) return nullptr;
    instances_.push_back(fresh);
    std::lock_guard<std::mutex> inner(fresh->lock);
    return lease(*fresh, plan, poison);
  }

  // Give the memory of all idle instances back to the system; returns how many bytes.
  size_t trim() {
    std::lock_guard<std::mutex> guard(lock_);
    size_t bytes = 0;
    for (Instance* instance : instances_) {
      std::lock_guard<std::mutex> inner(instance->lock);
      if (!instance->idle()) continue;
      bytes += instance->committed;
      instance->drop_memory();
    }
    return bytes;
  }

  void measure(uint64_t* instances, uint64_t* committed, uint64_t* busy) {
    std::lock_guard<std::mutex> guard(lock_);
    *instances = instances_.size();
    *committed = *busy = 0;
    for (Instance* instance : instances_) {
      std::lock_guard<std::mutex> inner(instance->lock);
      *committed += instance->committed;
      *busy += !instance->idle();
    }
  }

 private:
  // An idle instance, its lock held; null where the system has no memory for it (another would get none either).
  static Instance* lease(Instance& instance, const std::shared_ptr<const Plan>& plan, bool poison) {
    if (!Reservation::get()->commit(instance, plan->bytes)) return nullptr;
    instance.leased = true;
    instance.plan = plan;
    instance.poison = poison;
    instance.occupant.assign(plan->places.size(), kNobody);
    return &instance;
  }

  std::mutex lock_;
  std::vector<Instance*> instances_;
};

}  // namespace arena
