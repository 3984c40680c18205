// SpMM for few tokens whose lanes are columns of W: `spmm_bitmap`, and `spmm_gather` and
// `spmm_window` for one token. few_tokens.h says when.
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

#if defined(__AVX512F__)

SK_INLINE Lanes lanes_at(const uint16_t* bits) {
  Lanes lanes;
  asm("kmovw %1, %0" : "=k"(lanes) : "m"(*bits));
  return lanes;
}

// Sums over some words of a row, lane by lane: [kTokens]. Returns where the values go on.
//
// An expansion takes its operand from a register, masks come straight from memory, and x is masked
// where it is loaded, so that the multiply-add is a plain one: with a memory operand, masks through
// general registers and a masked multiply-add, a word took 25 cycles on Zen 5 instead of 10.
template <int kTokens, bool kExact, class T>
SK_INLINE const T* bitmap_words(const uint64_t* bits, int64_t count, const T* v, const float* x,
                                int64_t row_words, Vec* sums) {
  constexpr int kSets = kTokens == 1 ? 4 : kTokens == 2 ? 2 : 1;
  Vec acc[kSets][kTokens];
  SK_FOR(s, kSets)
    SK_FOR(m, kTokens) acc[s][m] = zero();
  for (int64_t q = 0; q < count; q++) {
    const uint64_t b = bits[q];
    prefetch_values(v);
    prefetch_values(v + 64 / sizeof(T));
    prefetch_indices(bits + q);
    const int64_t before[] = {0, count_bits(b & 0xffff), count_bits(b & 0xffffffff),
                              count_bits(b & 0xffffffffffff), count_bits(b)};
    Lanes lanes[4];
    Vec row[4];
    SK_FOR(p, 4) {
      lanes[p] = lanes_at(reinterpret_cast<const uint16_t*>(bits + q) + p);
      row[p] = kExact ? load(v + before[p], before[p + 1] - before[p]) : load_all(v + before[p]);
    }
    SK_FOR(p, 4) {
      const Vec a = expand_in_register(lanes[p], row[p]);
      SK_FOR(m, kTokens) {
        Vec& sum = acc[p % kSets][m];
        const float* at = x + (m * row_words + q) * 64 + p * kLanes;
        sum = fma(a, _mm512_maskz_load_ps(lanes[p], at), sum);
      }
    }
    v += before[4];
  }
  SK_FOR(m, kTokens) {
    sums[m] = acc[0][m];
    if constexpr (kSets == 2) sums[m] = add(acc[0][m], acc[1][m]);
    if constexpr (kSets == 4) sums[m] = add(add(acc[0][m], acc[1][m]), add(acc[2][m], acc[3][m]));
  }
  return v;
}

#else

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

#endif

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

// sums[r], over lanes, of rows i + r: four at a time share the sum over lanes. Rows past the end
// repeat the last one.
template <class T, class F>
SK_INLINE void for_rows(const CompressedRows& w, T* y, const F& sum_row) {
  for (int64_t i = 0; i < w.rows; i += 4) {
    Vec acc[4];
    SK_FOR(r, 4) acc[r] = sum_row(least(i + r, w.rows - 1));
    write_sums<4, 1>(acc, w, i, 1, y, 0);
  }
}

// kPick: x is picked, else gathered (lanes.h); either has the same bits.
template <bool kPick, class T>
void spmm_gather(const CompressedRows& w, const T* values, const float* x, T* y) {
  auto x_at = [&](int64_t p) { return kPick ? pick(x, w.cols + p) : gather(x, w.cols + p); };
  for_rows(w, y, [&](int64_t row) {
    const int64_t end = w.row_offsets[row + 1];
    Vec a = zero();
    int64_t p = w.row_offsets[row];
    for (; p + kLanes <= end; p += kLanes) {
      prefetch_values(values + p);
      prefetch_indices(w.cols + p);
      a = fma(load_all(values + p), x_at(p), a);
    }
    return p < end ? fma(first(end - p), load(values + p, end - p), x_at(p), a) : a;
  });
}

#if defined(__AVX512F__)

// x at the columns of a window: halves and quarters are told apart by bits 7 and 6.
template <int kColumns>
SK_INLINE Vec look_up(const float* x, const uint8_t* cols) {
  const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(cols));
  const __m512i places = _mm512_cvtepu8_epi32(c);
  auto in_32 = [&](const float* p) {
    return _mm512_permutex2var_ps(load(p), places, load(p + kLanes));
  };
  const Lanes odd = _mm_movepi8_mask(c);
  const Vec lower = _mm512_mask_blend_ps(odd, in_32(x), in_32(x + 32));
  if constexpr (kColumns == 64) return lower;
  const Vec upper = _mm512_mask_blend_ps(odd, in_32(x + 64), in_32(x + 96));
  return _mm512_mask_blend_ps(_mm_movepi8_mask(_mm_add_epi8(c, c)), lower, upper);
}

template <int kColumns, class T>
SK_INLINE Vec add_chunk(const Chunk& c, const T* v, const float* x, Vec sum) {
  const Vec a = load(v, count_bits(c.mask));
  return fma(at(c.mask), a, look_up<kColumns>(x + c.base * kChunk, c.cols), sum);
}

#else

SK_INLINE uint16_t column_of(const Chunk& c, int i) {
  const int b = c.cols[i];
  return static_cast<uint16_t>(c.base * kChunk + (b & 0x1f) + (b >> 7) * 32 + (b & 0x40));
}

template <int kColumns, class T>
SK_INLINE Vec add_chunk(const Chunk& c, const T* v, const float* x, Vec sum) {
  const int64_t count = count_bits(c.mask);
  uint16_t cols[kChunk];
  for (int i = 0; i < kChunk; i++) cols[i] = column_of(c, i);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t here = least(count - i, kLanes);
    sum = fma(first(here), load(v + i, here), gather(x, cols + i), sum);
  }
  return sum;
}

#endif

// Chunks of a row go to two sets of sums in turn.
template <int kColumns, class T>
void spmm_window(const CompressedRows& w, const T* values, const float* x, T* y) {
  for_rows(w, y, [&](int64_t row) {
    const T* v = values + w.row_offsets[row];
    const Chunk *c = w.chunks + w.chunk_offsets[row], *end = w.chunks + w.chunk_offsets[row + 1];
    Vec even = zero(), odd = zero();
    for (; c + 2 <= end; c += 2) {
      prefetch_values(v);
      prefetch_values(v + 64 / sizeof(T));
      prefetch_indices(c);
      even = add_chunk<kColumns>(c[0], v, x, even);
      v += count_bits(c[0].mask);
      odd = add_chunk<kColumns>(c[1], v, x, odd);
      v += count_bits(c[1].mask);
    }
    if (c < end) even = add_chunk<kColumns>(*c, v, x, even);
    return add(even, odd);
  });
}

}  // namespace sk::SK_ISA
