// The layout `gather`: the packed weight that spmm_gather.cu reads, and how a lane decodes it.
//
// W [N, K] is cut into slices of 32 rows, all of them sorted by nnz; lane r of a warp owns row r of
// the slice. A lane reads the non-zeros of its row in column order, in *granules* of 16 bytes of
// values: 8 entries of 16 bits or 16 of 8. Granule g holds the values of 32 lanes (lane-major) and,
// in a second array, as many column deltas:
//
//   4 bits: a word for eight entries, i < 4 in the low nibble of byte i, i >= 4 in the high nibble
//           of byte i - 4. Bits 0-2 count pairs of columns since the last entry, bit 3 says which
//           one of the pair.
//   8 bits: entry i in byte i, the columns since the last entry.
//
// An entry whose value is +0 is a step without a product: it bridges a longer gap, or lets a lane
// wait for the others. So no pattern is an exception. A stored zero of 16 bits is -0, which is
// multiplied. All lanes of a slice take the same number of granules.
//
// The granules of a slice are cut into *pieces* of nearly equal length, one for each warp:
//
//   bounds       [pieces + 1]   granules before each piece
//   slice_of     [pieces]
//   first_piece  [slices + 1]   pieces before each slice; it has one at least
//   starts       [pieces, 32]   the column (4 bits: of the pair) to which the first step adds
//
// Made by sparsekern/kernels/cuda/gather.py.
#pragma once

#include "numbers.cuh"

namespace sk {

constexpr int kGranuleBytes = 16;  // of the values of a lane

template <class V>
constexpr int kEntries = kGranuleBytes / Stored<V>::kBytes;  // of a lane in a granule

// The deltas of one granule of a lane, so many bytes.
template <int kBytes>
struct DeltaWords;
template <>
struct DeltaWords<4> {
  using Type = unsigned;
};
template <>
struct DeltaWords<8> {
  using Type = uint2;
};
template <>
struct DeltaWords<16> {
  using Type = uint4;
};
template <class V, int kBits>
using Deltas = typename DeltaWords<kEntries<V> * kBits / 8>::Type;

__device__ inline unsigned word(unsigned v, int) { return v; }
__device__ inline unsigned word(const uint2& v, int i) { return i == 0 ? v.x : v.y; }

template <class V, int kBits>
struct Granule {
  uint4 values;
  Deltas<V, kBits> deltas;
};

// A lane's share of the granules that are on their way: kDepth of them, in shared memory, each lane
// waiting for its own copies alone. Registers would not do: a warp that waits for one load waits
// for all later ones that use the same scoreboard, and there are six.
template <class V, int kBits, int kDepth>
class Granules {
 public:
  using Word = Deltas<V, kBits>;
  static constexpr int kSlotBytes = kWarp * (16 + static_cast<int>(sizeof(Word)));
  static constexpr int kWarpBytes = kDepth * kSlotBytes;

  // `shared` has kWarpBytes for this warp. Reads the granules of `range`.
  __device__ Granules(unsigned shared, const uint4* values, const Word* deltas, const Range& range)
      : values_at_(shared + threadIdx.x % kWarp * 16),
        deltas_at_(shared + kWarp * 16 +
                   threadIdx.x % kWarp * static_cast<unsigned>(sizeof(Word))) {
    begin(values, deltas, range);
  }

  // In place of what was begun and not yet read.
  __device__ void begin_again(const uint4* values, const Word* deltas, const Range& range) {
    wait_copies<0>();
    begin(values, deltas, range);
  }

  // Begins to bring the first granules to L2.
  static __device__ void prefetch(const uint4* values, const Word* deltas, const Range& range) {
    const int lane = threadIdx.x % kWarp;
    const int granule = range.begin + lane / 4;  // 128 bytes of values are a quarter of one
    if (granule < range.end) {
      const long long at = static_cast<long long>(granule) * kWarp;
      prefetch_to_l2(values + at + lane % 4 * 8);
      if (lane % 4 == 0) prefetch_to_l2(deltas + at);
    }
  }

  // The next granule has arrived in the registers returned.
  __device__ Granule<V, kBits> front() const {
    wait_copies<kDepth - 1>();
    Granule<V, kBits> g;
    if constexpr (sizeof(Word) == 4) {
      g.deltas = load_shared_u32(deltas_at_ + slot_);
    } else if constexpr (sizeof(Word) == 8) {
      g.deltas = load_shared_v2(deltas_at_ + slot_);
    } else {
      g.deltas = load_shared_v4(deltas_at_ + slot_);
    }
    g.values = load_shared_v4(values_at_ + slot_);
    return g;
  }

  // Sends for another one in the place of the front. Call it when the front has been used.
  __device__ void advance() {
    copy(slot_);
    slot_ = slot_ == kWarpBytes - kSlotBytes ? 0 : slot_ + kSlotBytes;
  }

 private:
  __device__ void begin(const uint4* values, const Word* deltas, const Range& range) {
    const long long first = static_cast<long long>(range.begin) * kWarp + threadIdx.x % kWarp;
    slot_ = 0;
    values_ = values + first;
    deltas_ = deltas + first;
    ahead_ = range.end - range.begin;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) copy(i * kSlotBytes);
  }

  __device__ void copy(unsigned slot) {
    if (ahead_ > 0) {
      copy_async<16>(values_at_ + slot, values_);
      copy_async<sizeof(Word)>(deltas_at_ + slot, deltas_);
      values_ += kWarp;
      deltas_ += kWarp;
      --ahead_;
    }
    commit_copies();
  }

  const uint4* values_;
  const Word* deltas_;
  unsigned values_at_, deltas_at_, slot_;  // shared addresses, and bytes from them
  int ahead_;                              // granules not yet sent for
};

}  // namespace sk
