// The pairs of a packed weight, for any W (sparsekern/kernels/cuda/pairs.py makes them).
//
// W is cut into steps of 32 rows and 64 columns, of which each lane of a warp has 32 pairs of
// neighbouring columns: those of operand A of mma in ptx.cuh, register by register. Slot s of a
// lane is register s % 4 of rows 16 (s / 4 % 2) .. + 15 and columns 16 (s / 8) .. + 15. A pair that
// has a value is a word, low half the left column; the others are not stored. A step is
//
//   masks   a word a lane: bit (8 (s % 4) + s / 4 + 2) % 32 is set if the lane has slot s, which
//           puts four slots into the same bit of four bytes
//   starts  16 bits a lane: where its words begin, in bytes after the starts. Those of lane 0 begin
//           right there, and it has the length of the step instead, in units of 16 bytes
//   values  the words, lane by lane, in a lane by slot
//
// Steps begin at multiples of 16 bytes, and those of the same 32 rows follow one another, so a warp
// may begin at any of them.
// For a random mask of density d that is 3/32 + 2 (1 - (1 - d)^2) bytes a place of W.
#pragma once

#include "numbers.cuh"

namespace sk {

constexpr int kStepColumns = 64;
constexpr int kSixteens = kStepColumns / 16;
constexpr int kSlots = 32;                                   // of a lane in a step
constexpr int kHeadWords = kWarp + kWarp / 2;                // masks and starts
constexpr int kMostStepWords = kHeadWords + kSlots * kWarp;  // where all pairs have values

// Calls visit(row, column, pair) with all pairs of a lane in the step at `head`; row and column are
// those of the step, the low half of the pair is the left column. +0 is not stored, -0 a stored
// zero.
template <class Visit>
__device__ inline void visit_pairs(const unsigned* head, int lane, const Visit& visit) {
  const unsigned mask = head[lane];
  const int start = lane ? reinterpret_cast<const unsigned short*>(head + kWarp)[lane] : 0;
  const unsigned* words = head + kHeadWords + start / 4;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const unsigned is_here = mask >> (slot % 4 * 8 + slot / 4 + 2) % 32 & 1;
    const unsigned pair = is_here ? *words : 0;
    words += is_here;
    const int row = slot / 4 % 2 * 16 + slot % 2 * 8 + lane / 4;
    const int column = slot / 8 * 16 + slot % 4 / 2 * 8 + lane % 4 * 2;
    visit(row, column, pair);
  }
}

}  // namespace sk
