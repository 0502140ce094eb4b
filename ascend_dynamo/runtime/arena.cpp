// A CPU allocator for c10 that serves the allocations of a compiled graph's call from a planned arena.
//
// The first call of a graph (per shape) is recorded: every allocation of the calling thread, with its lifetime. Once
// offsets are planned for it, a call replays them: the n-th allocation, if it has the recorded size and the blocks that
// lay there are dead, gets base + offset. Anything else is the heap's. Outside such calls, and on other threads, this
// allocator only forwards. `arena.py` is the other half.

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include "arena_memory.h"
#include "arena_plan.h"

namespace arena {
namespace {

enum class State : uint64_t { kNew, kRecording, kRecorded, kPlanned, kOff };

struct Counts {
  uint64_t calls = 0, recorded = 0, replayed = 0, mismatches = 0, outlived = 0, unleased = 0, heaped = 0;
  uint64_t last_given = 0, last_escaped = 0, last_heap = 0;
};

// One graph at one shape.
struct Entry {
  Entry(std::shared_ptr<Group> g, bool p) : group(std::move(g)), poison(p) {}
  const std::shared_ptr<Group> group;
  const bool poison;
  std::mutex lock;
  State state = State::kNew;
  std::shared_ptr<Recording> recording;
  std::shared_ptr<const Plan> plan;
  Counts counts;
};

enum class Mode { kHeap, kRecord, kReplay };

// One call of an entry, on one thread.
struct Frame {
  std::shared_ptr<Entry> entry;
  Mode mode = Mode::kHeap;
  std::shared_ptr<Recording> recording;
  std::shared_ptr<const Plan> plan;
  Instance* instance = nullptr;
  uint32_t next = 0;
  bool mismatch = false, poison = false;
  uint64_t given = 0, escaped = 0, heap = 0;
};

// Blocks of recordings under way, by address: whichever thread frees one tells its recording.
struct Tracked {
  Recording* recording;
  uint32_t index;
};
struct Tracking {
  std::mutex lock;
  std::unordered_map<void*, Tracked> blocks;
  std::atomic<size_t> count{0};
};
Tracking& tracking() {
  static Tracking* const it = new Tracking;  // tensors are freed after static destruction
  return *it;
}

at::Allocator* heap = nullptr;

void track(Recording& recording, void* p, size_t bytes) {
  Tracking& t = tracking();
  std::lock_guard<std::mutex> guard(t.lock);
  const auto index = static_cast<uint32_t>(recording.blocks.size());
  recording.blocks.push_back({bytes, recording.events++, kAlive, p});
  t.blocks.insert_or_assign(p, Tracked{&recording, index});
  t.count.store(t.blocks.size(), std::memory_order_relaxed);
}

void untrack(void* p) {
  Tracking& t = tracking();
  std::lock_guard<std::mutex> guard(t.lock);
  const auto found = t.blocks.find(p);
  if (found == t.blocks.end()) return;
  Recording& recording = *found->second.recording;
  Recorded& block = recording.blocks[found->second.index];
  block.end = recording.events++;
  if (recording.poison) poison_freed(p, block.size);
  t.blocks.erase(found);
  t.count.store(t.blocks.size(), std::memory_order_relaxed);
}

// What is alive at the end of a recorded call escapes: from here on it is the heap's business.
void stop_tracking(const Recording& recording) {
  Tracking& t = tracking();
  std::lock_guard<std::mutex> guard(t.lock);
  for (const Recorded& block : recording.blocks) {
    if (block.end != kAlive) continue;
    const auto found = t.blocks.find(block.address);
    if (found != t.blocks.end() && found->second.recording == &recording) t.blocks.erase(found);
  }
  t.count.store(t.blocks.size(), std::memory_order_relaxed);
}

thread_local Frame* top = nullptr;  // no destructor: what is freed while a thread ends still finds it

void finish(Frame& frame, bool good);

struct Frames {
  std::vector<std::unique_ptr<Frame>> stack;
  ~Frames() {  // a thread that ended inside a call
    top = nullptr;
    while (!stack.empty()) pop(false);
  }
  void push(std::unique_ptr<Frame> frame) {
    stack.push_back(std::move(frame));
    top = stack.back().get();
  }
  void pop(bool good) {
    const std::unique_ptr<Frame> frame = std::move(stack.back());
    stack.pop_back();
    top = stack.empty() ? nullptr : stack.back().get();
    finish(*frame, good);
  }
};
thread_local Frames frames;

void release(void* p) {
  Reservation* const range = Reservation::get();
  if (range->holds(p)) return range->at(p).free(static_cast<char*>(p));
  if (tracking().count.load(std::memory_order_relaxed) != 0) untrack(p);
  heap->raw_deallocate(p);
}

// The arena's place for the next allocation of a replayed call; null where this is not the call that was recorded.
void* replay(Frame& frame, size_t bytes) {
  const uint32_t index = frame.next++;
  if (index >= frame.plan->blocks.size() || frame.plan->blocks[index].size != bytes) return nullptr;
  const Planned& block = frame.plan->blocks[index];
  if (block.offset == kEscapes) return nullptr;
  Instance& instance = *frame.instance;
  std::lock_guard<std::mutex> guard(instance.lock);
  if (!instance.clear_for(index)) return nullptr;
  instance.occupant[block.place] = index;
  ++instance.live;
  return instance.base + block.offset;
}

bool escapes(const Frame& frame, size_t bytes) {
  const auto& blocks = frame.plan->blocks;
  const uint32_t index = frame.next - 1;
  return index < blocks.size() && blocks[index].size == bytes && blocks[index].offset == kEscapes;
}

class Allocator final : public at::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    Frame* const frame = top;
    if (frame == nullptr || bytes == 0) return own(heap->raw_allocate(bytes));
    void* p = nullptr;
    if (frame->mode == Mode::kReplay && !frame->mismatch) {
      p = replay(*frame, bytes);
      if (p != nullptr) {
        ++frame->given;
      } else if (escapes(*frame, bytes)) {
        ++frame->escaped;
      } else {
        frame->mismatch = true;
      }
    }
    if (p == nullptr) {
      p = heap->raw_allocate(bytes);
      frame->heap += frame->mode != Mode::kReplay || frame->mismatch;
      if (frame->mode == Mode::kRecord) track(*frame->recording, p, bytes);
    }
    if (frame->poison) poison_fresh(p, bytes);
    return own(p);
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  // One deleter for all: oneDNN's scratch memory comes and goes through raw_allocate and raw_deallocate.
  static c10::DataPtr own(void* p) { return {p, p, &release, c10::Device(c10::DeviceType::CPU)}; }
};

Allocator* ours() {
  static Allocator* const it = new Allocator;
  return it;
}

// A graph whose allocations depend on its data never settles: more of its calls go wrong than right.
bool hopeless(const Counts& counts) { return counts.mismatches + counts.outlived > 8 + counts.replayed / 8; }

void finish(Frame& frame, bool good) {
  Entry& entry = *frame.entry;
  bool outlived = false;
  if (frame.mode == Mode::kRecord) stop_tracking(*frame.recording);
  if (frame.instance != nullptr) {
    Instance& instance = *frame.instance;
    std::lock_guard<std::mutex> guard(instance.lock);
    instance.leased = false;
    outlived = instance.live != 0;
    if (!outlived && instance.orphan) instance.give_up();
  }
  std::lock_guard<std::mutex> guard(entry.lock);
  Counts& counts = entry.counts;
  ++counts.calls;
  counts.last_given = frame.given;
  counts.last_escaped = frame.escaped;
  counts.last_heap = frame.heap;
  if (frame.mode == Mode::kRecord) {
    counts.recorded += good;
    if (entry.state == State::kRecording) {
      entry.state = good ? State::kRecorded : State::kNew;
      entry.recording = good ? frame.recording : nullptr;
    }
    return;
  }
  if (frame.mode == Mode::kHeap) {
    ++counts.heaped;
    return;
  }
  counts.mismatches += frame.mismatch;
  if (!good) return;  // what an exception keeps alive says nothing about other calls
  counts.outlived += outlived;
  counts.replayed += !frame.mismatch && !outlived;
  if ((frame.mismatch || outlived) && entry.state == State::kPlanned && entry.plan == frame.plan) {
    entry.state = hopeless(counts) ? State::kOff : State::kNew;
    entry.plan = nullptr;
  }
}

// 1 where the entry must be planned first.
int enter(const std::shared_ptr<Entry>& entry) {
  auto frame = std::make_unique<Frame>();
  frame->entry = entry;
  frame->poison = entry->poison;
  if (c10::GetCPUAllocator() == ours()) {
    std::lock_guard<std::mutex> guard(entry->lock);
    if (entry->state == State::kRecorded) return 1;
    if (entry->state == State::kNew) {
      frame->mode = Mode::kRecord;
      frame->recording = std::make_shared<Recording>();
      frame->recording->poison = frame->poison;
      entry->state = State::kRecording;
    } else if (entry->state == State::kPlanned) {
      frame->plan = entry->plan;
      frame->instance = entry->group->lease(frame->plan, entry->poison);
      frame->mode = frame->instance != nullptr ? Mode::kReplay : Mode::kHeap;
      entry->counts.unleased += frame->instance == nullptr;
    }
  }
  frames.push(std::move(frame));
  return 0;
}

}  // namespace
}  // namespace arena

#define ARENA_API extern "C" __attribute__((visibility("default")))

using arena::Entry;
using arena::Group;

// Null once this allocator serves the process, else why it does not.
ARENA_API const char* arena_install() {
  if (c10::GetCPUAllocator() == arena::ours()) return nullptr;
  if (arena::heap != nullptr || c10::GetCPUAllocator() != c10::GetDefaultCPUAllocator())
    return "another CPU allocator than torch's own is installed";
  if (c10::GetDefaultCPUAllocator()->raw_deleter() == nullptr) return "torch's CPU allocator has no plain deleter";
  if (arena::Reservation::get() == nullptr) return "no address space could be reserved (a limit, such as ulimit -v)";
  arena::heap = c10::GetDefaultCPUAllocator();
  c10::SetCPUAllocator(arena::ours());
  if (c10::GetCPUAllocator() == arena::ours()) return nullptr;
  arena::heap = nullptr;
  return "torch's CPU allocator was installed with a priority";
}

ARENA_API int arena_installed() { return c10::GetCPUAllocator() == arena::ours(); }

ARENA_API int arena_holds(const void* p) { return arena::Reservation::get()->holds(p); }

ARENA_API uint64_t arena_slot_bytes() { return arena::Reservation::get()->slot_bytes(); }

// Where the address space of all arenas begins and ends.
ARENA_API void arena_range(uint64_t* out) { arena::Reservation::get()->range(out, out + 1); }

ARENA_API std::shared_ptr<Group>* arena_group() {
  return new std::shared_ptr<Group>(std::make_shared<Group>());
}
ARENA_API void arena_group_close(std::shared_ptr<Group>* group) { delete group; }
ARENA_API uint64_t arena_trim(std::shared_ptr<Group>* group) { return (*group)->trim(); }
ARENA_API void arena_group_stats(std::shared_ptr<Group>* group, uint64_t* out) {
  (*group)->measure(out, out + 1, out + 2);
}

ARENA_API std::shared_ptr<Entry>* arena_entry(std::shared_ptr<Group>* group, int poison) {
  return new std::shared_ptr<Entry>(std::make_shared<Entry>(*group, poison != 0));
}
ARENA_API void arena_entry_close(std::shared_ptr<Entry>* entry) { delete entry; }

ARENA_API int arena_enter(std::shared_ptr<Entry>* entry) { return arena::enter(*entry); }

// Ends the innermost call of this thread, if it is one of this entry.
ARENA_API void arena_leave(std::shared_ptr<Entry>* entry, int good) {
  if (arena::top != nullptr && arena::top->entry == *entry) arena::frames.pop(good != 0);
}

// The recorded blocks that fit into `capacity`, and how many there are.
ARENA_API uint64_t arena_recorded(
    std::shared_ptr<Entry>* entry, uint64_t capacity, uint64_t* sizes, int64_t* starts, int64_t* ends) {
  std::lock_guard<std::mutex> guard((*entry)->lock);
  if ((*entry)->recording == nullptr) return 0;
  const auto& blocks = (*entry)->recording->blocks;
  for (size_t i = 0; i < std::min<size_t>(capacity, blocks.size()); ++i) {
    sizes[i] = blocks[i].size;
    starts[i] = blocks[i].start;
    ends[i] = blocks[i].end;
  }
  return blocks.size();
}

// Null once the recorded call is planned (or nothing is left to plan), else what is wrong with the offsets.
ARENA_API const char* arena_plan(std::shared_ptr<Entry>* entry, uint64_t count, const uint64_t* offsets, uint64_t bytes) {
  thread_local std::string error;
  std::lock_guard<std::mutex> guard((*entry)->lock);
  if ((*entry)->state != arena::State::kRecorded || (*entry)->recording->blocks.size() != count) return nullptr;
  auto plan = arena::make_plan(*(*entry)->recording, offsets, bytes, &error);
  if (plan == nullptr) return error.c_str();
  (*entry)->plan = std::move(plan);
  (*entry)->state = arena::State::kPlanned;
  return nullptr;
}

ARENA_API void arena_off(std::shared_ptr<Entry>* entry) {
  std::lock_guard<std::mutex> guard((*entry)->lock);
  (*entry)->state = arena::State::kOff;
  (*entry)->plan = nullptr;
}

ARENA_API void arena_entry_stats(std::shared_ptr<Entry>* entry, uint64_t* out) {
  std::lock_guard<std::mutex> guard((*entry)->lock);
  const arena::Counts& c = (*entry)->counts;
  const uint64_t plan = (*entry)->plan == nullptr ? 0 : (*entry)->plan->bytes;
  const uint64_t values[] = {static_cast<uint64_t>((*entry)->state), plan, c.calls, c.recorded, c.replayed,
      c.mismatches, c.outlived, c.unleased, c.heaped, c.last_given, c.last_escaped, c.last_heap};
  std::copy(std::begin(values), std::end(values), out);
}
