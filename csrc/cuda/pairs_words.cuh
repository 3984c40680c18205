// How warps take pairs (pairs.cuh) out of a stream of steps.
#pragma once

#include "pairs.cuh"
#include "warpgroups.cuh"

namespace sk {

// The words of a slice on their way through shared memory, in two buffers of kBufferBytes: while
// the steps of one are used, the other is filled, with as many whole steps as fit. kSharers warps,
// 1 or 2, take the same steps.
template <unsigned kBufferBytes, int kSharers = 1>
class Words {
 public:
  static constexpr unsigned kBytes = 2 * kBufferBytes;
  static constexpr unsigned kBarrierBytes = 2 * 8;
  static_assert(kMostStepWords * 4 <= kBufferBytes && kBufferBytes % 16 == 0,
                "a step fits where all pairs have values");

  // `shared` has kBytes for the sharers alone, `barriers` kBarrierBytes. `meeting`: the barrier at
  // which sharers meet, and which of them this warp is. Sharers meet before they go on.
  __device__ Words(const unsigned* words, unsigned shared, unsigned barriers, int meeting = 0,
                   int sharer = 0)
      : words_(words),
        shared_(shared),
        barriers_(barriers),
        meeting_(meeting),
        sharer_(sharer),
        lane_(threadIdx.x % kWarp) {
    if (has_warpgroups()) {
      if (sharer == 0 && lane_ < 2) init_barrier(barriers + lane_ * 8);
      __syncwarp();
    }
  }

  // Sends for the first of `count` steps; `bounds`: where each begins, and where the last one ends.
  __device__ void begin(const int* bounds, int count) {
    bounds_ = bounds;
    left_ = count;
    begin_ = __ldcg(bounds);
    look_ahead();
    now_ = fill(0);
    after_ = fill(1);
    buffer_ = 0;
    step_ = 0;
    at_ = shared_;
  }

  // The shared address of the next step, when it has arrived. The one before it is used up.
  __device__ unsigned next() {
    if (step_ == now_) {
      meet();  // by all lanes
      now_ = after_;
      after_ = fill(buffer_);
      buffer_ ^= 1;
      step_ = 0;
      at_ = shared_ + buffer_ * kBufferBytes;
    }
    if (step_++ == 0) wait(buffer_);
    return at_;
  }

  // The step there has so many bytes.
  __device__ void skip(unsigned bytes) { at_ += bytes; }

 private:
  __device__ void meet() {
    if (kSharers == 1) {
      __syncwarp();
    } else {
      sync_warps(meeting_, kSharers);
    }
  }

  // Where the next 32 steps end; beyond the last one it says nothing.
  __device__ void look_ahead() { ends_ = __ldcg(bounds_ + min(lane_ + 1, left_)); }

  // Sends for as many steps as fit. How many?
  __device__ int fill(int buffer) {
    const bool fits = lane_ < left_ && ends_ - begin_ <= static_cast<int>(kBufferBytes / 4);
    const int count = __popc(__ballot_sync(kAllLanes, fits));
    if (!count) return 0;
    const int end = __shfl_sync(kAllLanes, ends_, count - 1);
    const unsigned to = shared_ + buffer * kBufferBytes;
    const unsigned* from = words_ + begin_;
    if (has_warpgroups()) {
      if (sharer_ == 0 && lane_ == 0) {
        copy_bulk(to, from, (end - begin_) * 4, barriers_ + buffer * 8);
      }
    } else {
      for (int i = lane_ * 4; i < end - begin_; i += kWarp * 4)
        copy_async<16>(to + i * 4, from + i);
      commit_copies();
    }
    begin_ = end;
    left_ -= count;
    bounds_ += count;
    look_ahead();
    return count;
  }

  // Until the steps of a buffer have arrived.
  __device__ void wait(int buffer) {
    if (!has_warpgroups()) {
      wait_copies<0>();
    } else {
      wait_barrier(barriers_ + buffer * 8, phases_ >> buffer & 1);
      phases_ ^= 1u << buffer;
    }
    __syncwarp();
  }

  const unsigned* words_;
  const unsigned shared_, barriers_;
  const int meeting_, sharer_, lane_;
  const int* bounds_ = nullptr;  // of the steps not yet sent for
  int left_ = 0, begin_ = 0, ends_ = 0;
  int now_ = 0, after_ = 0;  // steps of this buffer, and of the other one
  int step_ = 0, buffer_ = 0;
  unsigned at_ = 0, phases_ = 0;  // a bit a barrier: that of the next arrival
};

// A lane's slots of one step.
template <class V>
class Slots {
 public:
  // Takes the slots of the next step. `first`: tiles of 16 rows that are skipped before the first.
  template <class Words>
  __device__ explicit Slots(Words& words, int first = 0) {
    const unsigned at = words.next(), lane = threadIdx.x % kWarp;
    mask_ = load_shared_u32(at + lane * 4);
    const unsigned start = load_shared_u16(at + kWarp * 4 + lane * 2);
    words.skip(__shfl_sync(kAllLanes, start, 0) * 16);
    at_ = at + kHeadWords * 4 + (lane ? start : 0);
    if (first) {
      at_ = dot_bytes(mask_ & kOfEach, 0x01010101u, at_);
      mask_ = rotate_right(mask_, 1);
    }
  }

  // The registers of 16 columns: operand A of rows 0-15, then of rows 16-31. In order, from 0 on.
  __device__ void load(unsigned (&a)[8], int sixteen) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) load_tile(a + tile * 4, 2 * sixteen + tile);
  }

  // The same of 16 rows alone.
  __device__ void load(unsigned (&a)[4], int sixteen) {
    load_tile(a, 2 * sixteen);
    at_ = dot_bytes(four_slots(2 * sixteen + 1), 0x01010101u, at_);
  }

 private:
  static constexpr unsigned kOfEach = kPairBytes<V> * 0x01010101u;

  static __device__ unsigned rotate_right(unsigned bits, unsigned by) {
    return by ? bits >> by | bits << (32 - by) : bits;
  }

  // A byte each: the bytes of a pair, if the lane has it.
  __device__ unsigned four_slots(int tile) const { return rotate_right(mask_, tile) & kOfEach; }

  __device__ void load_tile(unsigned* a, int tile) {
    const unsigned four = four_slots(tile);
    load_pair(a[0], at_, four & 0xffu);
    load_pair(a[1], dot_bytes(four, 0x00000001u, at_), four & 0xff00u);
    load_pair(a[2], dot_bytes(four, 0x00000101u, at_), four & 0xff0000u);
    load_pair(a[3], dot_bytes(four, 0x00010101u, at_), four & 0xff000000u);
    at_ = dot_bytes(four, 0x01010101u, at_);
    if constexpr (kIsScaled<V>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = to_bf16<V>(a[i], 0);
    }
  }

  static __device__ void load_pair(unsigned& pair, unsigned at, unsigned condition) {
    if constexpr (kPairBytes<V> == 4) {
      load_shared_if(pair, at, condition);
    } else {
      load_shared_u16_if(pair, at, condition);
    }
  }

  unsigned mask_, at_;
};

// Of a row of W the stored values in steps [first, end) times x of one token.
template <class V>
__device__ float sum_pairs(const unsigned* words, const int* steps, const unsigned short* x,
                           int row, int row_steps, int first, int end) {
  using X = typename Stored<V>::X;
  const int* my_steps = steps + static_cast<long long>(row / kWarp) * row_steps;
  float sum = 0;
  for (int step = first; step < end; ++step) {
    const auto add = [&](int of_step, int column, unsigned pair) {
      if (of_step != row % kWarp) return;
      const unsigned short* at = x + step * kStepColumns + column;
      if (pair & 0xffffu) sum = fmaf(Convert<X>::low(pair), Convert<X>::low(at[0]), sum);
      if (pair >> 16) sum = fmaf(Convert<X>::high(pair), Convert<X>::low(at[1]), sum);
    };
    for (int t = 0; t < 4; ++t) visit_pairs<V>(words + my_steps[step], row % 8 * 4 + t, add);
  }
  return sum;
}

}  // namespace sk
