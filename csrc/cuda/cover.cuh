// The cover of a packed weight, for any W (csrc/pattern/cover.h makes it).
//
// For each tile of 32 rows and 256 columns, columns are put into groups of four slots such that no
// row has more than one non-zero in a group. A *step* is 8 groups of 32 rows, a record of
//
//   values     16 B a lane: registers a0 .. a3 of rows 0-15, then of rows 16-31, as mma_sparse in
//              ptx.cuh has them, but for the high halves, which are 0
//   positions  2 B a lane: lane (g, t) has those of rows g and g + 8, and 16 more where t > 1, in
//              groups 4 (t & 1) .. 4 (t & 1) + 3: a nibble a group, bits 0-1 for row g, bits 2-3
//              for row g + 8
//   columns    1 B a slot: its column of the window, which is where it finds its x
//
// 0.594 B for each slot and row.
#pragma once

#include "numbers.cuh"

namespace sk {

constexpr int kCoverColumns = 256;  // of a window

struct Record {
  static constexpr int kPositionsAt = kWarp * 16;
  static constexpr int kColumnsAt = kPositionsAt + kWarp * 2;
  static constexpr int kBytes = kColumnsAt + kWarp;
  static constexpr int kChunks = kBytes / 16;
  static constexpr int kTailAt = kWarp;  // chunks; one a lane before it
  static_assert(kBytes % 16 == 0 && kChunks - kTailAt < kWarp, "copied 16 bytes a lane at a time");
};

}  // namespace sk
