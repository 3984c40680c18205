// The cover of a packed weight, for any W (csrc/pattern/cover.h makes it).
//
// For each tile of 32 rows and 256 columns, columns are put into groups of four slots such that no
// row has more than kValues (1 or 2) non-zeros in a group. A *step* is 8 groups of 32 rows, a
// record of
//
//   values     kValues * 16 B a lane: registers a0 .. a3 of rows 0-15, then of rows 16-31, as
//              mma_sparse in ptx.cuh has them; with kValues = 1 only their low halves, the high
//              ones are 0
//   positions  kValues * 2 B a lane: lane (g, t) has those of rows g and g + 8, and 16 more where
//              t > 1, in groups 4 (t & 1) .. 4 (t & 1) + 3. Two values: as mma_sparse wants them.
//              One: a nibble a group, bits 0-1 for row g, bits 2-3 for row g + 8
//   columns    1 B a slot: its column of the window, which is where it finds its x
//
// 0.594 B (kValues = 1) or 1.156 B (2) for each slot and row.
#pragma once

#include "numbers.cuh"

namespace sk {

constexpr int kCoverColumns = 256;  // of a window

template <int kValues>
struct Record {
  static constexpr int kPositionsAt = kValues * 512;
  static constexpr int kColumnsAt = kPositionsAt + kValues * 64;
  static constexpr int kBytes = kColumnsAt + 32;
  static constexpr int kChunks = kBytes / 16;
  static constexpr int kTailAt = kValues * kWarp;  // chunks; one a lane before it
  static_assert(kBytes % 16 == 0 && kChunks - kTailAt < kWarp, "copied 16 bytes a lane at a time");
};

}  // namespace sk
