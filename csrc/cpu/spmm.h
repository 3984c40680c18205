// SpMM on a panel: y[n][:] = sum over the non-zeros of row n of W[n, k] * x[k][:].
//
// Per non-zero: one splat of the value, and kVecs fused multiply-adds whose memory operand is a row
// of the x panel. The accumulators of a row stay in registers for a whole column block. Column
// blocks keep the part of x in use near L1. A panel of pairs (Type::kPairs) has half the bytes, so
// column blocks twice as wide, for two integer operations on each register of it; with dot products
// (Type::kDots) for two shuffles on two registers, that serve two non-zeros.
//
// Sums have three levels, so that their error stays small for any number of columns: the non-zeros
// of a row in a column block, or kLongest of them, are summed from 0, kSumBlocks such sums are
// added up in the y panel, and those in a panel of totals.
#pragma once

#include "dots.h"
#include "kernels.h"
#include "simd.h"

namespace sk::SK_ISA {

constexpr int kSegmentsAhead = 4;
static_assert(kSegmentsAhead <= Schedule::kAhead);

// What a segment adds to its row of the y panel: the values and columns of its `count` non-zeros
// meet rows of x. A narrow panel has too few accumulators to hide the latency of a multiply-add:
// the non-zeros of a row are dealt out to kSets independent ones, summed at the end. 4 and 8
// vectors sum in the same order, so that a tile may be halved without a change in the result, but
// with kTwo.
template <int kVecs, bool kTwo, class Panel, class Number>
struct MultiplyAdds {
  using Element = Panel;
  using Real = Number;
  using Value = Number;
  static constexpr int kVectors = kVecs;

  template <bool kFirst>
  static SK_INLINE void segment(int32_t count, const Value* v, const uint16_t* c, const Real* start,
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
};

#ifdef SK_DOTS
// Two non-zeros by one instruction: the rows of their columns are interleaved on the way, and every
// other pair of non-zeros has sums of its own.
template <int kVecs>
struct Dots {
  using Element = Pair;
  using Real = float;
  using Value = bf16;
  static constexpr int kVectors = kVecs;

  template <bool kFirst>
  static SK_INLINE void segment(int32_t count, const bf16* v, const uint16_t* c, const float* start,
                                const Pair* x, float* y) {
    constexpr int64_t kWidth = kVecs * kLanes;
    Vec acc[2][kVecs][2];
    SK_FOR(s, 2)
      SK_FOR(j, kVecs) acc[s][j][0] = acc[s][j][1] = zero();

    auto x_row = [&](uint16_t col) { return in_register(x + col * kWidth); };
    auto accumulate = [&](int s, const bf16* w, const Pair* a, const Pair* b) {
      const Pairs both = splat_two(w);
      SK_FOR(j, kVecs) add_two(acc[s][j], both, load(a + j * kLanes), load(b + j * kLanes));
    };
    int32_t p = 0;
    for (; p + 4 <= count; p += 4) {
      const FourColumns four = load_columns(c + p);
      accumulate(0, v + p, x_row(four[0]), x_row(four[1]));
      accumulate(1, v + p + 2, x_row(four[2]), x_row(four[3]));
    }
    if (count & 2) {
      accumulate(0, v + p, x_row(c[p]), x_row(c[p + 1]));
      p += 2;
    }
    if (count & 1) {
      const Pair* in = x_row(c[p]);
      const Pairs one = splat_one(v + p);
      SK_FOR(j, kVecs) add_two(acc[1][j], one, load(in + j * kLanes), Pairs{});
    }
    SK_FOR(j, kVecs) {
      in_order(acc[0][j]);
      in_order(acc[1][j]);
      SK_FOR(i, 2) {
        float* to = y + (2 * j + i) * kLanes;
        const Vec sum = add(acc[0][j][i], acc[1][j][i]);
        store(to, add(kFirst ? splat(start) : load(to), sum));
      }
    }
  }
};
#endif

// Tokens in a row of the panels.
template <class Sums>
constexpr int64_t tokens_of() {
  using Element = typename Sums::Element;
  return int64_t{Sums::kVectors} * Simd<Element>::kCount * Simd<Element>::kTokens;
}

// A column block is wide where W is nearly empty, and a row may be full even so.
constexpr int32_t kLongest = 512;

// What a long segment adds behind its first kLongest non-zeros.
template <class Sums>
__attribute__((noinline)) void add_rest(int32_t count, const typename Sums::Value* v,
                                        const uint16_t* c, const typename Sums::Real* start,
                                        const typename Sums::Element* x, typename Sums::Real* y) {
  for (int32_t p = kLongest; p < count; p += kLongest) {
    const int32_t rest = count - p, at_once = rest < kLongest ? rest : kLongest;
    Sums::template segment<false>(at_once, v + p, c + p, start, x, y);
  }
}

// The values of a segment stand one behind the other: in walking order, or with `places` where CSR
// has them, which are fetched ahead.
template <class Sums, bool kFirst>
void spmm_run(const Run& run, const uint16_t* row, const uint32_t* places,
              const typename Sums::Value* values, const uint16_t* c,
              const typename Sums::Real* start, const typename Sums::Element* x,
              typename Sums::Real* y) {
  using Real = typename Sums::Real;
  using Value = typename Sums::Value;
  constexpr int64_t kTokens = tokens_of<Sums>();
  constexpr int64_t kLine = 64 / sizeof(Value);
  const int32_t count = run.count, at_once = count < kLongest ? count : kLongest;
  const Value* v = values;
  row += run.first;
  if (places) places += run.first;
  for (int32_t q = 0; q < run.segments; q++, v += count, c += count) {
    if (places) {
      v = values + places[q];
      const Value* next = values + places[q + kSegmentsAhead];
      for (int64_t i = 0; i < count + kLine; i += kLine) __builtin_prefetch(next + i);
    }
    Real* sums = y + row[q] * kTokens;
    Sums::template segment<kFirst>(at_once, v, c, start + row[q], x, sums);
    if (at_once < count) add_rest<Sums>(count, v, c, start + row[q], x, sums);
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

template <class Sums>
void spmm_block(const Walk& w, int64_t rows, bool in_place, const typename Sums::Value* values,
                const typename Sums::Real* start, const typename Sums::Element* x,
                typename Sums::Real* y) {
  using Real = typename Sums::Real;
  constexpr int kLanes = Simd<Real>::kCount;
  const int64_t size = rows * tokens_of<Sums>();
  const int64_t x_size = w.cols_per_block * Sums::kVectors * Simd<typename Sums::Element>::kCount;
  Real* total = y + size;
  const uint16_t* cols = w.cols;
  for (int64_t b = 0; b < w.col_blocks; b++, x += x_size) {
    if (b > 0 && b % kSumBlocks == 0) move_sums(b == kSumBlocks, size, y, total);
    for (int64_t r = w.run_offsets[b]; r < w.run_offsets[b + 1]; r++) {
      const Run& run = w.runs[r];
      auto* f = b == 0 ? spmm_run<Sums, true> : spmm_run<Sums, false>;
      f(run, w.row, in_place ? w.start : nullptr, values, cols, start, x, y);
      if (!in_place) values += int64_t{run.count} * run.segments;
      cols += int64_t{run.count} * run.segments;
    }
  }
  if (w.col_blocks > kSumBlocks)
    for (int64_t i = 0; i < size; i += kLanes) store(y + i, add(load(total + i), load(y + i)));
}

}  // namespace sk::SK_ISA
