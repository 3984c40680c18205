// SpMM for few tokens whose lanes are columns of W: `spmm_bitmap`, and `spmm_gather` for one token.
// few_tokens.h says when.
#pragma once

#include "kernels.h"
#include "lanes.h"
#include "simd.h"

namespace sk::SK_ISA {

constexpr int64_t kSumWords = 32;  // of a row, summed from 0

// x as it is, [rows][64 * words], zeros beyond the last column, so that a whole word of columns can
// be loaded everywhere, and beyond the last token.
template <class T>
void pack_rows(const T* x, int64_t stride, int64_t tokens, int64_t features, int64_t words,
               int rows, float* packed) {
  for (int64_t m = 0; m < rows; m++, packed += 64 * words) {
    const int64_t live = m < tokens ? features : 0;
    int64_t c = 0;
    for (; c + kBlock <= live; c += kBlock) store_row(packed + c, load_row(x + m * stride + c));
    for (; c < live; c++) packed[c] = to_float(x[m * stride + c]);
    for (; c < 64 * words; c++) packed[c] = 0;
  }
}

// Sums over the lanes of kRows x kTokens accumulators, and the start of each row, written to y.
template <int kRows, int kTokens, class T>
SK_INLINE void write_sums(const Vec (&acc)[kRows * kTokens], const CompressedRows& w, int64_t row,
                          int64_t tokens, T* y, int64_t stride) {
  alignas(16) float sums[kRows * kTokens];
  SK_FOR(j, kRows * kTokens / 4)
    sum4<false>(sums + 4 * j, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
  for (int64_t m = 0; m < tokens; m++)
    for (int64_t r = 0; r < least(kRows, w.rows - row); r++)
      y[m * stride + row + r] = from_float<T>(w.start[row + r] + sums[r * kTokens + m]);
}

// Sums over some words of a row, lane by lane: [kTokens]. Returns where the values go on.
template <int kTokens, bool kExact, class T>
SK_INLINE const T* bitmap_words(const uint64_t* bits, int64_t count, const T* v, const float* x,
                                int64_t row_words, Vec* sums) {
  constexpr int kSets = kTokens == 1 ? 2 : 1;
  constexpr int kParts = 64 / kLanes;
  constexpr uint64_t kPart = (uint64_t{1} << kLanes) - 1;
  Vec acc[kSets][kTokens];
  SK_FOR(s, kSets)
    SK_FOR(m, kTokens) acc[s][m] = zero();
  for (int64_t q = 0; q < count; q++) {
    const uint64_t b = bits[q];
    prefetch_values(v);
    prefetch_values(v + 64 / sizeof(T));
    prefetch_indices(bits + q);
    for (int p = 0; p < kParts; p++) {
      const uint32_t part = b >> p * kLanes & kPart;
      const Lanes lanes = at(part);
      const Vec a = expand<kExact>(part, v);
      v += count_bits(part);
      SK_FOR(m, kTokens) {
        Vec& sum = acc[p % kSets][m];
        sum = fma(lanes, a, load(x + (m * row_words + q) * 64 + p * kLanes), sum);
      }
    }
  }
  SK_FOR(m, kTokens) sums[m] = kSets == 1 ? acc[0][m] : add(acc[0][m], acc[kSets - 1][m]);
  return v;
}

// One row, so that W is one stream; interleaved rows would be several short ones, each of which
// ends where the prefetcher has just got going. One token has sets enough for a row of any length.
// Aligned to a cache line of code: where the loop lies makes 10 % of its speed.
template <int kTokens, bool kExact, class T>
__attribute__((aligned(64))) void bitmap_row(const CompressedRows& w, const T* v,
                                             const uint64_t* bits, const float* x, Vec* sums) {
  const int64_t most = kTokens == 1 ? w.words : least(w.words, kSumWords);
  v = bitmap_words<kTokens, kExact>(bits, most, v, x, w.words, sums);
  for (int64_t q = most; kTokens > 1 && q < w.words; q += kSumWords) {
    Vec part[kTokens];
    v = bitmap_words<kTokens, kExact>(bits + q, least(w.words - q, kSumWords), v, x + 64 * q,
                                      w.words, part);
    SK_FOR(m, kTokens) sums[m] = add(sums[m], part[m]);
  }
}

// Rows past the end repeat the last one.
template <int kTokens, class T>
void spmm_bitmap(const CompressedRows& w, const T* values, const float* x, int64_t tokens, T* y,
                 int64_t stride) {
  constexpr int kRows = kTokens < 4 ? 4 / kTokens : 1;
  for (int64_t i = 0; i < w.rows; i += kRows) {
    Vec sums[kRows * kTokens];
    for (int r = 0; r < kRows; r++) {
      const int64_t row = least(i + r, w.rows - 1);
      const bool at_end = kOverread && w.row_offsets[row + 1] > w.nnz - kLanes;
      auto* f = at_end ? bitmap_row<kTokens, true, T> : bitmap_row<kTokens, false, T>;
      f(w, values + w.row_offsets[row], w.bits + row * w.words, x, sums + r * kTokens);
    }
    write_sums<kRows, kTokens>(sums, w, i, tokens, y, stride);
  }
}

// Four rows at a time share the sum over lanes.
template <class T>
void spmm_gather(const CompressedRows& w, const T* values, const float* x, T* y) {
  for (int64_t i = 0; i < w.rows; i += 4) {
    Vec acc[4];
    SK_FOR(r, 4) {
      const int64_t row = least(i + r, w.rows - 1);
      const int64_t end = w.row_offsets[row + 1];
      Vec a = zero();
      int64_t p = w.row_offsets[row];
      for (; p + kLanes <= end; p += kLanes) {
        prefetch_values(values + p);
        prefetch_indices(w.cols + p);
        a = fma(load_all(values + p), gather(x, w.cols + p), a);
      }
      if (p < end) a = fma(first(end - p), load(values + p, end - p), gather(x, w.cols + p), a);
      acc[r] = a;
    }
    write_sums<4, 1>(acc, w, i, 1, y, 0);
  }
}

}  // namespace sk::SK_ISA
