// SpMM on a panel: y[n][:] = sum over the non-zeros of row n of W[n, k] * x[k][:].
//
// Per non-zero: one splat of the value, and kVecs fused multiply-adds whose memory operand is a row
// of the x panel. The accumulators of a row stay in registers for a whole column block. Column
// blocks keep the part of x in use near L1.
//
// Sums have three levels, so that their error stays small for any number of columns: the non-zeros
// of a row in a column block are summed from 0, kSumBlocks such sums are added up in the y panel,
// and those in a panel of totals.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace sk::SK_ISA {

// A narrow panel has too few accumulators to hide the latency of a multiply-add: the non-zeros of a
// row are dealt out to kSets independent ones, summed at the end. 4 and 8 vectors sum in the same
// order, so that a tile may be halved without a change in the result.
template <int kVecs, bool kFirst, class Real>
SK_INLINE void spmm_segment(int32_t count, const Real* v, const uint16_t* c, const Real* start,
                            const Real* x, Real* y) {
  using V = typename Simd<Real>::V;
  constexpr int kLanes = Simd<Real>::kCount;
  constexpr int kSets = kVecs >= 4 ? 1 : kVecs >= 2 ? 2 : 4;
  constexpr int64_t kWidth = kVecs * kLanes;
  V acc[kSets][kVecs];
  SK_FOR(s, kSets)
    SK_FOR(j, kVecs) acc[s][j] = V{};

  auto accumulate = [&](V(&a)[kVecs], int32_t p) {
    const V w = splat(v + p);
    const Real* in = in_register(x + c[p] * kWidth);
    SK_FOR(j, kVecs) a[j] = fma(w, load(in + j * kLanes), a[j]);
  };
  int32_t p = 0;
  for (; p + kSets <= count; p += kSets)
    SK_FOR(s, kSets) accumulate(acc[s], p + s);
  for (; p < count; p++) accumulate(acc[0], p);

  SK_FOR(s, kSets / 2)
    SK_FOR(j, kVecs) acc[s][j] = add(acc[s][j], acc[s + kSets / 2][j]);
  SK_FOR(s, kSets / 4)
    SK_FOR(j, kVecs) acc[s][j] = add(acc[s][j], acc[s + kSets / 4][j]);
  SK_FOR(j, kVecs)
    store(y + j * kLanes, add(kFirst ? splat(start) : load(y + j * kLanes), acc[0][j]));
}

template <int kVecs, bool kFirst, class Real>
void spmm_run(const Run& run, const uint16_t* row, const Real* v, const uint16_t* c,
              const Real* start, const Real* x, Real* y) {
  const int32_t count = run.count;
  row += run.first;
  for (int32_t q = 0; q < run.segments; q++, v += count, c += count)
    spmm_segment<kVecs, kFirst>(count, v, c, start + row[q], x,
                                y + row[q] * int64_t{kVecs * Simd<Real>::kCount});
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

template <int kVecs, class Real>
void spmm_block(const Walk& w, int64_t rows, const Real* walked, const Real* start, const Real* x,
                Real* y) {
  constexpr int kLanes = Simd<Real>::kCount;
  const int64_t size = rows * kVecs * kLanes;
  Real* total = y + size;
  const uint16_t* cols = w.cols;
  for (int64_t b = 0; b < w.col_blocks; b++, x += w.cols_per_block * kVecs * kLanes) {
    if (b > 0 && b % kSumBlocks == 0) move_sums(b == kSumBlocks, size, y, total);
    for (int64_t r = w.run_offsets[b]; r < w.run_offsets[b + 1]; r++) {
      const Run& run = w.runs[r];
      auto* f = b == 0 ? spmm_run<kVecs, true, Real> : spmm_run<kVecs, false, Real>;
      f(run, w.row, walked, cols, start, x, y);
      walked += int64_t{run.count} * run.segments;
      cols += int64_t{run.count} * run.segments;
    }
  }
  if (w.col_blocks > kSumBlocks)
    for (int64_t i = 0; i < size; i += kLanes) store(y + i, add(load(total + i), load(y + i)));
}

}  // namespace sk::SK_ISA
