// The pairs of a packed weight, for any W (sparsekern/kernels/cuda/pairs.py makes them).
//
// W is cut into steps of 32 rows and 64 columns, of which each lane of a warp has 32 pairs of
// neighbouring columns: those of operand A of mma in ptx.cuh, register by register. Slot s of a
// lane is register s % 4 of rows 16 (s / 4 % 2) .. + 15 and columns 16 (s / 8) .. + 15. A pair that
// has a value is stored in 4 bytes, of values of 8 bits in 2, the left column first; the others are
// not stored. A step is
//
//   masks   a word a lane: bit (8 (s % 4) + s / 4 + 2) % 32 is set if the lane has slot s, which
//           puts four slots into the same bit of four bytes; with values of 8 bits + 1, not + 2
//   starts  16 bits a lane: where its pairs begin, in bytes after the starts. Those of lane 0 begin
//           right there, and it has the length of the step instead, in units of 16 bytes
//   values  the pairs, lane by lane, in a lane by slot
//
// Steps begin at multiples of 16 bytes, and those of the same 32 rows follow one another, so a warp
// may begin at any of them.
// For a random mask of density d that is 3/32 + 2 (1 - (1 - d)^2) bytes a place of W, with values
// of 8 bits 3/32 + 1 - (1 - d)^2.
#pragma once

#include "numbers.cuh"

namespace sk {

constexpr int kStepColumns = 64;
constexpr int kSixteens = kStepColumns / 16;
constexpr int kSlots = 32;                                   // of a lane in a step
constexpr int kHeadWords = kWarp + kWarp / 2;                // masks and starts
constexpr int kMostStepWords = kHeadWords + kSlots * kWarp;  // where all pairs have values

// Bytes of a pair, and the bit of the mask that says that slot 0 is there: it counts these bytes.
template <class V>
constexpr unsigned kPairBytes = 2 * Stored<V>::kBytes;
template <class V>
constexpr int kPairBit = Stored<V>::kBytes;
static_assert(kPairBytes<bf16> == 1 << kPairBit<bf16> && kPairBytes<int8> == 1 << kPairBit<int8>);

// Calls visit(row, column, pair) with all pairs of a lane in the step at `head`; row and column are
// those of the step, the pair two 16-bit floats, the low half the left column. +0 is not stored, -0
// a stored zero.
template <class V, class Visit>
__device__ inline void visit_pairs(const unsigned* head, int lane, const Visit& visit) {
  const unsigned mask = head[lane];
  const int start = lane ? reinterpret_cast<const unsigned short*>(head + kWarp)[lane] : 0;
  const auto* at = reinterpret_cast<const unsigned char*>(head + kHeadWords) + start;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    unsigned pair = 0;
    if (mask >> (slot % 4 * 8 + slot / 4 + kPairBit<V>) % 32 & 1) {
      if constexpr (kPairBytes<V> == 4) {
        pair = *reinterpret_cast<const unsigned*>(at);
      } else {
        pair = to_bf16<V>(*reinterpret_cast<const unsigned short*>(at), 0);
      }
      at += kPairBytes<V>;
    }
    const int row = slot / 4 % 2 * 16 + slot % 2 * 8 + lane / 4;
    const int column = slot / 8 * 16 + slot % 4 / 2 * 8 + lane % 4 * 2;
    visit(row, column, pair);
  }
}

}  // namespace sk
