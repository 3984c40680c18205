// The cover of a packed weight, for any W (csrc/packing/cover.h makes it).
//
// For each tile of 32 rows and 256 columns, columns are put into groups of four slots such that no
// row has more than one non-zero in a group. A *step* is 8 groups of 32 rows, a record of
//
//   values     8 a lane, of 16 bits or 8: registers a0 .. a3 of rows 0-15, then of rows 16-31, as
//              mma_sparse in ptx.cuh has them, but for the high halves, which are 0
//   positions  2 B a lane: lane (g, t) has those of rows g and g + 8, and 16 more where t > 1, in
//              groups 4 (t & 1) .. 4 (t & 1) + 3: a nibble a group, bits 0-1 for row g, bits 2-3
//              for row g + 8
//   columns    1 B a slot: its column of the window, which is where it finds its x
//
// 0.594 B for each slot and row, 0.344 B with values of 8 bits. A value is +0 where nothing is
// stored; a stored zero of 16 bits is -0.
#pragma once

#include "numbers.cuh"

namespace sk {

constexpr int kCoverColumns = 256;  // of a window

// Of a record.
constexpr int kLaneValues = 8, kRecordValues = kWarp * kLaneValues;
constexpr int kRecordIndexBytes = kWarp * 2 + kWarp;
constexpr int kMostRecordBytes = kRecordValues * 2 + kRecordIndexBytes;

template <class V>
struct Record {
  static constexpr int kLaneBytes = kLaneValues * Stored<V>::kBytes;
  static constexpr int kPositionsAt = kWarp * kLaneBytes;
  static constexpr int kColumnsAt = kPositionsAt + kWarp * 2;
  static constexpr int kBytes = kPositionsAt + kRecordIndexBytes;
  static constexpr int kChunks = kBytes / 16;
  static constexpr int kHead = kChunks < kWarp ? kChunks : kWarp;  // chunks; one a lane
  static constexpr int kTail = kChunks - kHead;
  static_assert(kBytes % 16 == 0 && kTail < kWarp, "copied 16 bytes a lane at a time");
};

// What a row has in a group of a record: a value and its slot.
struct CoverPlace {
  unsigned short value;  // a 16-bit float
  int slot;
};

template <class V>
__device__ inline CoverPlace cover_place(const unsigned char* record, int row, int group) {
  const int tile = row / 16, half = row / 8 % 2, g = row % 8;
  const int at = (g * 4 + tile * 2 + group / 4) * 2, bit = group % 4 * 4 + half * 2;
  const int position = record[Record<V>::kPositionsAt + at + bit / 8] >> bit % 8 & 3;
  const int register_at = tile * 4 + group / 4 * 2 + half;
  return {stored_bits<V>(record, (g * 4 + group % 4) * kLaneValues + register_at),
          group * 4 + position};
}

}  // namespace sk
