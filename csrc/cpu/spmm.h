// SpMM on a panel: y[n][:] = sum over the non-zeros of row n of W[n, k] * x[k][:].
//
// Per non-zero: one splat of the value, and kVecs fused multiply-adds whose memory operand is a row
// of the x panel. The accumulators of a row stay in registers for a whole column block. Column
// blocks keep the part of x in use near L1. A panel of pairs (Type::kPairs) has half the bytes, so
// column blocks twice as wide, for two integer operations on each register of it.
//
// Sums have three levels, so that their error stays small for any number of columns: the non-zeros
// of a row in a column block are summed from 0, kSumBlocks such sums are added up in the y panel,
// and those in a panel of totals.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace sk::SK_ISA {

constexpr int kSegmentsAhead = 4;
static_assert(kSegmentsAhead <= Schedule::kAhead);

// A narrow panel has too few accumulators to hide the latency of a multiply-add: the non-zeros of a
// row are dealt out to kSets independent ones, summed at the end. 4 and 8 vectors sum in the same
// order, so that a tile may be halved without a change in the result, but with kTwo.
template <int kVecs, bool kTwo, bool kFirst, class Element, class Real>
SK_INLINE void spmm_segment(int32_t count, const Real* v, const uint16_t* c, const Real* start,
                            const Element* x, Real* y) {
  using V = typename Simd<Real>::V;
  constexpr int kLanes = Simd<Real>::kCount;
  constexpr int kSums = kVecs * Simd<Element>::kTokens;
  constexpr int kSets = kTwo ? 2 : kVecs >= 4 ? 1 : kVecs >= 2 ? 2 : 4;
  constexpr int64_t kWidth = kVecs * kLanes;
  V acc[kSets][kSums];
  SK_FOR(s, kSets)
    SK_FOR(j, kSums) acc[s][j] = V{};

  auto accumulate = [&](V(&a)[kSums], int32_t p, uint16_t col) {
    add_row(a, splat(v + p), in_register(x + col * kWidth));
  };
  // Four columns by one load: up to 5 % where two loads a cycle are the limit.
  int32_t p = 0;
  for (; p + 4 <= count; p += 4) {
    const FourColumns four = load_columns(c + p);
    SK_FOR(i, 4) accumulate(acc[i % kSets], p + i, four[i]);
  }
  for (; p + kSets <= count; p += kSets)
    SK_FOR(s, kSets) accumulate(acc[s], p + s, c[p + s]);
  for (; p < count; p++) accumulate(acc[0], p, c[p]);

  SK_FOR(s, kSets / 2)
    SK_FOR(j, kSums) acc[s][j] = add(acc[s][j], acc[s + kSets / 2][j]);
  SK_FOR(s, kSets / 4)
    SK_FOR(j, kSums) acc[s][j] = add(acc[s][j], acc[s + kSets / 4][j]);
  SK_FOR(j, kSums)
    store(y + j * kLanes, add(kFirst ? splat(start) : load(y + j * kLanes), acc[0][j]));
}

// The values of a segment stand one behind the other: in walking order, or with `places` where CSR
// has them, which are fetched ahead.
template <int kVecs, bool kTwo, bool kFirst, class Element, class Real>
void spmm_run(const Run& run, const uint16_t* row, const uint32_t* places, const Real* values,
              const uint16_t* c, const Real* start, const Element* x, Real* y) {
  constexpr int64_t kTokens = kVecs * Simd<Real>::kCount * Simd<Element>::kTokens;
  constexpr int64_t kLine = 64 / sizeof(Real);
  const int32_t count = run.count;
  const Real* v = values;
  row += run.first;
  if (places) places += run.first;
  for (int32_t q = 0; q < run.segments; q++, v += count, c += count) {
    if (places) {
      v = values + places[q];
      const Real* next = values + places[q + kSegmentsAhead];
      for (int64_t i = 0; i < count + kLine; i += kLine) __builtin_prefetch(next + i);
    }
    spmm_segment<kVecs, kTwo, kFirst>(count, v, c, start + row[q], x, y + row[q] * kTokens);
  }
}

// total = y or total + y, and y = 0: the sums of kSumBlocks column blocks.
template <class Real>
void move_sums(bool is_first, int64_t size, Real* y, Real* total) {
  using V = typename Simd<Real>::V;
  for (int64_t i = 0; i < size; i += Simd<Real>::kCount) {
    const V sum = load(y + i);
    store(total + i, is_first ? sum : add(load(total + i), sum));
    store(y + i, V{});
  }
}

template <int kVecs, bool kTwo, class Element, class Real>
void spmm_block(const Walk& w, int64_t rows, bool in_place, const Real* values, const Real* start,
                const Element* x, Real* y) {
  constexpr int kLanes = Simd<Real>::kCount;
  const int64_t size = rows * kVecs * kLanes * Simd<Element>::kTokens;
  Real* total = y + size;
  const uint16_t* cols = w.cols;
  for (int64_t b = 0; b < w.col_blocks; b++, x += w.cols_per_block * kVecs * kLanes) {
    if (b > 0 && b % kSumBlocks == 0) move_sums(b == kSumBlocks, size, y, total);
    for (int64_t r = w.run_offsets[b]; r < w.run_offsets[b + 1]; r++) {
      const Run& run = w.runs[r];
      auto* f = b == 0 ? spmm_run<kVecs, kTwo, true, Element, Real>
                       : spmm_run<kVecs, kTwo, false, Element, Real>;
      f(run, w.row, in_place ? w.start : nullptr, values, cols, start, x, y);
      if (!in_place) values += int64_t{run.count} * run.segments;
      cols += int64_t{run.count} * run.segments;
    }
  }
  if (w.col_blocks > kSumBlocks)
    for (int64_t i = 0; i < size; i += kLanes) store(y + i, add(load(total + i), load(y + i)));
}

}  // namespace sk::SK_ISA
