// Depth-first search for offsets within a capacity.
//
// Canonical solutions, dominance, decomposition during the search and bounds by sections follow MiniMalloc (Moffitt,
// "MiniMalloc: A Lightweight Memory Allocator for Hardware-Accelerated Machine Learning", ASPLOS 2023). Added here: the
// bound of a section counts each buffer from the lowest offset that it can still have; a buffer that was passed over
// must wait for one below it; and where it is certain that one of few buffers comes next in some section ("niche"),
// the search branches there, in the section that failed most often, wherever in memory that is.
//
// A solution is canonical if no buffer can move to a lower free place. Its buffers, sorted by offset, are each at the
// lowest place above what overlaps them and came before. So the search puts down buffers by rising offset, always at
// the lowest place, and every solvable problem has a solution of this kind.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <numeric>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using Int = std::int64_t;
using Ints = std::vector<Int>;
using Clock = std::chrono::steady_clock;

constexpr Int kOpen = -1;

enum class Outcome { kLimit = -1, kImpossible = 0, kFound = 1 };
enum class Niches { kNever, kAny, kForced };  // kForced: only where one buffer can come next

struct Buffers {
  Int count;
  const Int* first;  // sections [first, last) in which it is live
  const Int* last;
  const Int* span;   // length of its life
  const Int* size;
  const Int* stack;  // its size as the bound of a section may count it: rounded up where all offsets are
  const Int* align;
  const Int* fixed;  // the offset of a reserved region, or -1

  bool covers(Int i, Int section) const { return first[i] <= section && section < last[i]; }
};

class Search {
 public:
  Search(const Buffers& b, Int sections, Int capacity, Clock::time_point deadline, std::uint64_t seed)
      : b_(b), n_(b.count), sections_(sections), capacity_(capacity), deadline_(deadline), random_(seed) {
    near_.resize(n_);
    blocks_.resize(n_);
    pad_.assign(sections, 0);
    for (Int i = 0; i < n_; ++i) {
      for (Int s = b.first[i]; s < b.last[i]; ++s) pad_[s] = std::max(pad_[s], b.stack[i] - b.size[i]);
      for (Int j = 0; j < n_; ++j) {
        if (j == i || b.first[j] >= b.last[i] || b.first[i] >= b.last[j]) continue;
        (b.fixed[j] == kOpen ? near_ : blocks_)[i].push_back(j);
      }
      std::sort(blocks_[i].begin(), blocks_[i].end(), [&](Int x, Int y) { return b.fixed[x] < b.fixed[y]; });
    }
    lowest_.assign(n_, 0);
    release_.assign(n_, 0);
    rank_.assign(n_, 0);
    scale_.assign(n_, 1.0);
    top_.assign(sections, 0);
    limit_.assign(sections, 0);
    choices_.assign(sections, 0);
    load_.assign(sections, 0.0);
    failures_.assign(sections, 0.0);
    pair_twins();
  }

  // Tries until found, refuted, or `nodes` steps are done. `kind`: the order of preference among buffers that could lie
  // at the same offset; `noise` disturbs it. A niche is looked for in `look` sections; failures draw it by `focus`.
  Outcome run(Int kind, Niches niches, std::size_t look, double focus, double noise, Int nodes) {
    kind_ = kind;
    focus_ = focus;
    look_ = look;
    niches_ = niches;
    nodes_ = nodes;
    std::normal_distribution<double> normal(0.0, 1.0);
    for (double& x : scale_) x = noise > 0 ? std::exp(noise * normal(random_)) : 1.0;
    offset_.assign(b_.fixed, b_.fixed + n_);
    trail_.clear();
    placed_.clear();
    Ints open;
    for (Int i = 0; i < n_; ++i) {
      if (b_.fixed[i] != kOpen) continue;
      lowest_[i] = lift(i, 0);
      if (lowest_[i] + b_.size[i] > capacity_) return Outcome::kImpossible;
      open.push_back(i);
    }
    set_ranks(open);
    return split(open, 0, sections_);
  }

  const Ints& offsets() const { return offset_; }
  Int used() const { return used_; }

 private:
  // The lowest place from `offset` on that is aligned and free of reserved regions.
  Int lift(Int i, Int offset) const {
    const Int a = b_.align[i];
    offset = (offset + a - 1) / a * a;
    for (Int r : blocks_[i]) {
      if (offset + b_.size[i] <= b_.fixed[r]) break;
      const Int end = b_.fixed[r] + b_.size[r];
      if (offset < end) offset = (end + a - 1) / a * a;
    }
    return offset;
  }

  // Of buffers that are alike, only one order need be tried.
  void pair_twins() {
    twin_.assign(n_, kOpen);
    Ints sorted(n_);
    std::iota(sorted.begin(), sorted.end(), 0);
    auto key = [&](Int i) {
      return std::tuple<Int, Int, Int, Int, Int>(b_.first[i], b_.last[i], b_.size[i], b_.align[i], b_.fixed[i]);
    };
    std::stable_sort(sorted.begin(), sorted.end(), [&](Int x, Int y) { return key(x) < key(y); });
    for (Int k = 1; k < n_; ++k) {
      const Int i = sorted[k], before = sorted[k - 1];
      if (b_.fixed[i] == kOpen && key(i) == key(before)) twin_[i] = before;
    }
  }

  bool waits_for_twin(Int i) const { return twin_[i] != kOpen && offset_[twin_[i]] == kOpen; }

  // Ranks buffers by preference; the load of a section is that of these buffers alone.
  void set_ranks(const Ints& rows) {
    for (Int i : rows) std::fill(load_.begin() + b_.first[i], load_.begin() + b_.last[i], 0.0);
    for (Int i : rows) {
      for (Int s = b_.first[i]; s < b_.last[i]; ++s) load_[s] += double(b_.size[i]);
    }
    std::vector<std::tuple<double, double, double, Int>> keys;
    for (Int i : rows) {
      const double load = scale_[i] * *std::max_element(load_.begin() + b_.first[i], load_.begin() + b_.last[i]);
      const double span = scale_[i] * double(b_.span[i]), size = scale_[i] * double(b_.size[i]);
      const double area = span * double(b_.size[i]);
      switch (kind_) {
        case 0: keys.emplace_back(-span, -area, -load, i); break;
        case 1: keys.emplace_back(-load, -area, -span, i); break;
        case 2: keys.emplace_back(-load, -span, -area, i); break;
        case 3: keys.emplace_back(-area, -load, -span, i); break;
        default: keys.emplace_back(-size, -span, -load, i);
      }
    }
    std::sort(keys.begin(), keys.end());
    for (std::size_t k = 0; k < keys.size(); ++k) rank_[std::get<3>(keys[k])] = Int(k);
  }

  // The places where a new part begins: after sections that nothing open crosses.
  Ints cuts(const Ints& open, Int begin, Int end) const {
    Ints change(end - begin + 1, 0), found;
    for (Int i : open) {
      ++change[b_.first[i] - begin];
      --change[b_.last[i] - 1 - begin];
    }
    Int live = 0;
    for (Int s = begin; s + 1 < end; ++s) {
      live += change[s - begin];
      if (live == 0) found.push_back(s + 1);
    }
    return found;
  }

  // Independent parts one after the other, each from the bottom; one that is impossible refutes the whole.
  Outcome split(const Ints& open, Int begin, Int end) {
    if (open.empty()) return Outcome::kFound;
    Ints ends = cuts(open, begin, end);
    if (ends.empty()) return step(open, begin, end, 0, -1);
    ends.push_back(end);
    struct Part { Ints rows; Int begin, end; };
    std::vector<Part> parts;
    for (Int from = begin; Int to : ends) {
      Part part{{}, from, to};
      for (Int i : open) {
        if (b_.first[i] >= from && b_.last[i] <= to) part.rows.push_back(i);
      }
      if (!part.rows.empty()) parts.push_back(std::move(part));
      from = to;
    }
    std::stable_sort(parts.begin(), parts.end(), [](auto& x, auto& y) { return x.rows.size() < y.rows.size(); });
    for (const Part& part : parts) {
      Ints ranks;
      for (Int i : part.rows) ranks.push_back(rank_[i]);
      set_ranks(part.rows);
      const Outcome outcome = step(part.rows, part.begin, part.end, 0, -1);
      if (outcome == Outcome::kFound) continue;
      for (std::size_t k = 0; k < ranks.size(); ++k) rank_[part.rows[k]] = ranks[k];
      return outcome;
    }
    return Outcome::kFound;
  }

  // Puts down one of `open`, none below (`floor`, `rank`) in the order of offset and rank.
  Outcome step(Ints open, Int begin, Int end, Int floor, Int rank) {
    if (nodes_-- <= 0) return Outcome::kLimit;
    if ((++used_ & 63) == 0 && Clock::now() > deadline_) return Outcome::kLimit;
    if (!release(open, floor, rank)) return Outcome::kImpossible;
    for (std::size_t k = 1; k < open.size(); ++k) {  // by release and rank: nearly sorted from the step before
      const Int i = open[k];
      std::size_t at = k;
      for (; at > 0 && !before(open[at - 1], i); --at) open[at] = open[at - 1];
      open[at] = i;
    }
    if (!fits(open, begin, end)) return Outcome::kImpossible;
    Ints next;
    if (niches_ != Niches::kNever) {
      const Int section = niche(open, begin, end, next);
      if (section >= 0) {
        const bool choice = next.size() > 1;
        for (Int i : next) {
          if (waits_for_twin(i)) continue;
          const Outcome outcome = place(open, i, begin, end, floor, rank);
          if (outcome != Outcome::kImpossible) return outcome;
        }
        if (choice) failures_[section] += 1.0;
        return Outcome::kImpossible;
      }
    }
    Int ceiling = capacity_ + 1;  // what could wholly lie below a candidate would leave a hole that it can move into
    for (Int i : open) {
      ceiling = std::min(ceiling, lowest_[i] + b_.size[i]);
      if (!passed(i, floor, rank) && !waits_for_twin(i)) next.push_back(i);
    }
    for (Int i : next) {
      if (lowest_[i] >= ceiling) break;
      const Outcome outcome = place(open, i, begin, end, lowest_[i], rank_[i]);
      if (outcome != Outcome::kImpossible) return outcome;
    }
    return Outcome::kImpossible;
  }

  bool passed(Int i, Int floor, Int rank) const {
    return lowest_[i] < floor || (lowest_[i] == floor && rank_[i] < rank);
  }

  bool before(Int i, Int j) const { return std::pair(release_[i], rank_[i]) < std::pair(release_[j], rank_[j]); }

  // The lowest offset that each can still have. One that was passed over can only come on top of an open one.
  bool release(const Ints& open, Int floor, Int rank) {
    waiting_.clear();
    for (Int i : open) {
      if (passed(i, floor, rank)) waiting_.push_back(i);
      release_[i] = std::max(lowest_[i], floor);
    }
    for (Int i : waiting_) {
      Int support = capacity_ + 1;
      for (Int j : near_[i]) {
        if (offset_[j] == kOpen) support = std::min(support, release_[j] + b_.size[j]);
      }
      if (support + b_.size[i] > capacity_) {
        const double part = 1.0 / double(b_.last[i] - b_.first[i]);
        for (Int s = b_.first[i]; s < b_.last[i]; ++s) failures_[s] += part;
        return false;
      }
      release_[i] = lift(i, support);
    }
    return true;
  }

  // Whether what is still open can fit: in each section, the buffers in the order of their lowest offsets, each as
  // soon as it can come (this is the problem 1|r_j|C_max, which that order solves).
  bool fits(const Ints& open, Int begin, Int end) {
    std::fill(top_.begin() + begin, top_.begin() + end, 0);
    Int* top = top_.data();
    for (Int i : open) {
      const Int release = release_[i], stack = b_.stack[i];
      for (Int s = b_.first[i]; s < b_.last[i]; ++s) top[s] = std::max(top[s], release) + stack;
    }
    for (Int s = begin; s < end; ++s) {
      if (top[s] - pad_[s] > capacity_) {
        failures_[s] += 1.0;
        return false;
      }
    }
    return true;
  }

  // A section in which one of `next` must come next, at its lowest place; -1 if there is none.
  //
  // The lowest open buffer of a section carries all others that are open there, so it cannot start above `limit_`. If
  // nothing open outside the section can end below that limit, then nothing can lift such a buffer or come below it.
  Int niche(const Ints& open, Int begin, Int end, Ints& next) {
    for (Int s = begin; s < end; ++s) {
      limit_[s] = capacity_ + pad_[s];
      choices_[s] = 0;
    }
    for (Int i : open) {
      for (Int s = b_.first[i]; s < b_.last[i]; ++s) limit_[s] -= b_.stack[i];
    }
    for (Int i : open) {
      const Int release = release_[i];
      for (Int s = b_.first[i]; s < b_.last[i]; ++s) choices_[s] += release <= limit_[s];
    }
    sections_to_try_.clear();
    for (Int s = begin; s < end; ++s) {
      if (choices_[s] == 0 || (niches_ == Niches::kForced && choices_[s] > 1)) continue;
      const double promise = choices_[s] == 1 ? 0.0 : double(choices_[s]) / (1.0 + focus_ * failures_[s]);
      sections_to_try_.emplace_back(promise, s);
    }
    const std::size_t most = std::min(look_, sections_to_try_.size());
    std::partial_sort(sections_to_try_.begin(), sections_to_try_.begin() + most, sections_to_try_.end());
    for (std::size_t t = 0; t < most; ++t) {
      if (certain(open, sections_to_try_[t].second, next)) return sections_to_try_[t].second;
    }
    next.clear();
    return -1;
  }

  bool certain(const Ints& open, Int section, Ints& next) const {
    const Int limit = limit_[section];
    next.clear();
    for (Int i : open) {
      if (release_[i] > limit) break;
      if (!b_.covers(i, section)) continue;
      if (lowest_[i] != release_[i]) return false;
      for (Int j : near_[i]) {
        if (offset_[j] == kOpen && release_[j] + b_.size[j] <= limit && !b_.covers(j, section)) return false;
      }
      next.push_back(i);
    }
    return true;
  }

  Outcome place(const Ints& open, Int i, Int begin, Int end, Int floor, Int rank) {
    const std::size_t mark = trail_.size(), put = placed_.size();
    const Int top = lowest_[i] + b_.size[i];
    offset_[i] = lowest_[i];
    placed_.push_back(i);
    bool possible = true;
    for (Int j : near_[i]) {
      if (offset_[j] != kOpen || lowest_[j] >= top) continue;
      trail_.emplace_back(j, lowest_[j]);
      lowest_[j] = lift(j, top);
      possible &= lowest_[j] + b_.size[j] <= capacity_;
    }
    Outcome outcome = Outcome::kImpossible;
    if (possible) {
      Ints rest;
      rest.reserve(open.size());
      std::copy_if(open.begin(), open.end(), std::back_inserter(rest), [i](Int j) { return j != i; });
      const bool apart = rest.empty() || !cuts(rest, begin, end).empty();
      outcome = apart ? split(rest, begin, end) : step(std::move(rest), begin, end, floor, rank);
    }
    if (outcome == Outcome::kFound) return outcome;
    for (std::size_t k = put; k < placed_.size(); ++k) offset_[placed_[k]] = kOpen;
    placed_.resize(put);
    while (trail_.size() > mark) {
      lowest_[trail_.back().first] = trail_.back().second;
      trail_.pop_back();
    }
    return outcome;
  }

  const Buffers b_;
  const Int n_, sections_, capacity_;
  const Clock::time_point deadline_;
  std::mt19937_64 random_;
  std::vector<Ints> near_, blocks_;  // what overlaps in time: to be placed, reserved
  Ints pad_, offset_, lowest_, release_, twin_, rank_, top_, limit_, choices_, placed_, waiting_;
  std::vector<double> scale_, load_, failures_;
  std::vector<std::pair<double, Int>> sections_to_try_;
  std::vector<std::pair<Int, Int>> trail_;
  Int kind_ = 0, nodes_ = 0, used_ = 0;
  double focus_ = 0.0;
  std::size_t look_ = 0;
  Niches niches_ = Niches::kNever;
};

}  // namespace

// Returns 1 if `offsets` were found, 0 if there are none within the capacity, -1 if a limit was reached. The rounds go
// through all preferences and all uses of niches, first as they are, then disturbed, each time with more steps.
extern "C" __attribute__((visibility("default"))) int ascend_plan_exact(
    Int count, Int sections, const Int* first, const Int* last, const Int* span, const Int* size, const Int* stack,
    const Int* align, const Int* fixed, Int capacity, Int nodes, double seconds, std::uint64_t seed, Int* offsets) {
  constexpr Niches kNiches[] = {Niches::kAny, Niches::kForced, Niches::kNever, Niches::kAny};
  constexpr std::size_t kLook[] = {16, 16, 16, 100};
  constexpr double kFocus[] = {0.0, 0.1, 0.0, 0.1};
  constexpr Int kKinds = 5, kModes = 4;
  const auto deadline = Clock::now() + std::chrono::nanoseconds(Int(seconds * 1e9));
  Search search({count, first, last, span, size, stack, align, fixed}, sections, capacity, deadline, seed);
  Outcome outcome = Outcome::kLimit;
  double most = 2.0 * double(count);
  for (Int round = 0; outcome == Outcome::kLimit && search.used() < nodes && Clock::now() < deadline; ++round) {
    const Int mode = round / kKinds % kModes;
    const Int cycle = round / (kKinds * kModes);
    const double noise = cycle == 0 ? 0.0 : cycle % 2 == 1 ? 0.7 : 0.3;
    const Int steps = std::min(Int(most), nodes - search.used());
    outcome = search.run(round % kKinds, kNiches[mode], kLook[mode], kFocus[mode], noise, steps);
    if (round % kKinds == kKinds - 1) most *= 1.1;
  }
  if (outcome == Outcome::kFound) std::copy(search.offsets().begin(), search.offsets().end(), offsets);
  return static_cast<int>(outcome);
}
