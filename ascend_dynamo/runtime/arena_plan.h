// What a recorded call allocated, and where each block goes when the call is replayed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace arena {

constexpr uint32_t kNobody = UINT32_MAX;
constexpr int64_t kAlive = -1;            // the end of a block that outlives the recorded call
constexpr size_t kEscapes = SIZE_MAX;     // the offset of such a block: it lies on the heap
constexpr size_t kAlignment = 64;

struct Recorded {
  size_t size;
  int64_t start, end;  // in events, allocations and frees counted together
  void* address;
};

struct Recording {
  std::vector<Recorded> blocks;
  int64_t events = 0;
  bool poison = false;
};

struct Planned {
  size_t size, offset;
  uint32_t place;                    // which of the plan's distinct offsets
  uint32_t first_check, last_check;  // blocks that lay here before: dead, or the call is not the recorded one
};

struct Plan {
  std::vector<Planned> blocks;
  std::vector<uint32_t> checks;
  std::vector<size_t> places;
  size_t bytes = 0;

  uint32_t place_of(size_t offset) const {
    return static_cast<uint32_t>(std::lower_bound(places.begin(), places.end(), offset) - places.begin());
  }
};

// Who lies where, while blocks are laid down in the order of their allocation.
class Ground {
 public:
  // The blocks last laid on [begin, end), each once; then `owner` lies there.
  std::vector<uint32_t> lay(size_t begin, size_t end, uint32_t owner) {
    split(begin);
    split(end);
    const auto from = owners_.lower_bound(begin), to = owners_.lower_bound(end);
    std::vector<uint32_t> before;
    for (auto it = from; it != to; ++it) {
      if (it->second != kNobody) before.push_back(it->second);
    }
    owners_.erase(from, to);
    owners_[begin] = owner;
    std::sort(before.begin(), before.end());
    before.erase(std::unique(before.begin(), before.end()), before.end());
    return before;
  }

 private:
  void split(size_t at) {
    const auto next = owners_.upper_bound(at);
    owners_.try_emplace(at, std::prev(next)->second);
  }

  std::map<size_t, uint32_t> owners_{{0, kNobody}};  // where a run of bytes begins -> whose it is
};

// The plan that puts block i of a recording at offsets[i]; null, and why, where two blocks would share bytes.
inline std::shared_ptr<const Plan> make_plan(
    const Recording& recording, const size_t* offsets, size_t bytes, std::string* error) {
  auto plan = std::make_shared<Plan>();
  plan->bytes = bytes;
  Ground ground;
  for (uint32_t i = 0; i < recording.blocks.size(); ++i) {
    const Recorded& block = recording.blocks[i];
    const bool escapes = block.end == kAlive;
    const auto first = static_cast<uint32_t>(plan->checks.size());
    if (!escapes) {
      if (offsets[i] % kAlignment != 0 || offsets[i] > bytes || block.size > bytes - offsets[i]) {
        *error = "block " + std::to_string(i) + " is misaligned or outside the arena";
        return nullptr;
      }
      for (const uint32_t before : ground.lay(offsets[i], offsets[i] + block.size, i)) {
        if (recording.blocks[before].end > block.start) {
          *error = "blocks " + std::to_string(before) + " and " + std::to_string(i) + " overlap";
          return nullptr;
        }
        plan->checks.push_back(before);
      }
      plan->places.push_back(offsets[i]);
    }
    const auto last = static_cast<uint32_t>(plan->checks.size());
    plan->blocks.push_back({block.size, escapes ? kEscapes : offsets[i], kNobody, first, last});
  }
  std::sort(plan->places.begin(), plan->places.end());
  plan->places.erase(std::unique(plan->places.begin(), plan->places.end()), plan->places.end());
  for (Planned& block : plan->blocks) {
    if (block.offset != kEscapes) block.place = plan->place_of(block.offset);
  }
  return plan;
}

}  // namespace arena
