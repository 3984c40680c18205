// Which of the thread blocks that share a block of rows adds up their sums.
#pragma once

#include "numbers.cuh"

namespace sk {

// A counter of global memory, 0 before and after: how many have arrived, that is, written their
// sums; how many have left; and a bit for each part of the sums that somebody has taken.
//
// Of one part, the last to arrive takes it. Of several, the first blocks take one each when all
// have arrived. None waits for long, so that blocks need not run at the same time: the last to
// arrive takes what the others have left. All of this by one thread.
class Shares {
 public:
  static constexpr int kMostParts = 8;

  __device__ Shares(int* counter, int share, int shares, int parts)
      : counter_(counter), share_(share), shares_(shares), all_((1 << parts) - 1) {}

  // The parts to add up now, a bit each; the sums of this block are written.
  __device__ int arrive(bool may_wait) {
    __threadfence();
    bool all_here = (atomicAdd(counter_, 1) & kCount) + 1 == shares_;
    is_last_ = all_here;
    if (all_ == 1) {
      __threadfence();
      return is_last_;
    }
    const int own = 1 << share_ & all_;
    for (int i = 0; i < kTries && may_wait && own && !all_here; ++i) {
      all_here = (atomicAdd(counter_, 0) & kCount) == shares_;
    }
    return all_here && own ? take(own) : 0;
  }

  // Those that nobody has taken, for the last to arrive.
  __device__ int rest() { return is_last_ && all_ != 1 ? take(all_) : 0; }

  // The last use of the counter.
  __device__ void leave() {
    if (all_ == 1) {
      if (is_last_) *counter_ = 0;
      return;
    }
    const int before = atomicAdd(counter_, kOneLeft);
    if (before / kOneLeft % (kCount + 1) + 1 == shares_) *counter_ = 0;
  }

 private:
  static constexpr int kCount = 1023, kOneLeft = 1024, kOnePart = 1 << 20;
  static constexpr int kTries = 8;  // about a microsecond each

  __device__ int take(int parts) {
    const int before = atomicOr(counter_, parts * kOnePart) / kOnePart;
    __threadfence();
    return parts & ~before;
  }

  int* counter_;
  int share_, shares_, all_;
  bool is_last_ = false;
};

}  // namespace sk
