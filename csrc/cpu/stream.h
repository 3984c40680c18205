// SpMM for few tokens: y[m][n] = sum over the non-zeros of row n of W[n, k] * x[m][k].
//
// W is read once, as a stream: values in CSR order where they are, indices compressed
// (pattern/compressed.h). What differs is how a non-zero meets its x:
//
//   bitmap   The values of kLanes columns are expanded to their places in a register, which then
//            meets kLanes columns of each token. One expansion serves all tokens; missing places
//            cost as much as stored ones.
//   gather   One token: kLanes non-zeros meet kLanes elements of x, gathered by their columns.
//   columns  More tokens: a non-zero is a splat times a row of x, feature-major. The row is the
//            tokens; indices are fetched four at a time to leave the load ports to data.
//
// A long row is summed in parts of at most kSumWords words or kSumNnz non-zeros, each from 0, so
// that rounding errors stay small.
//
// A place where W has no entry never multiplies x, which may be infinite there: lanes without an
// entry are masked, not zero.
#pragma once

#include "kernels.h"
#include "panel.h"
#include "simd.h"

namespace sk::SK_ISA {

constexpr int64_t kSumWords = 32, kSumNnz = 512;

// Prefetches what the hardware does not see coming: the next page of values out of DRAM.
template <class T>
SK_INLINE void prefetch_values(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 1024);
}
SK_INLINE void prefetch_indices(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + 512);
}

SK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
SK_INLINE int count_bits(uint64_t bits) { return __builtin_popcountll(bits); }

// Primitives:
//   Lanes                some lanes of a Vec
//   first(count)         the first count <= kLanes of them
//   at(bits)             those whose bit is set
//   expand(bits, v)      consecutive elements from v on, placed in those lanes
//   load_all(v)          v[0..kLanes), as floats
//   load(v, count)       v[0..count), as floats, and no access beyond; zeros in the other lanes
//   gather(x, cols)      x[cols[i]] in lane i
//   fma(l, a, b, c)      c, plus a * b in the lanes l
// expand<true> reads only as many elements as there are bits; without, it may read kLanes of them
// if kOverread, which is faster.

#if defined(__AVX512F__)

using Lanes = __mmask16;
constexpr bool kOverread = true;
SK_INLINE Lanes first(int64_t count) { return static_cast<Lanes>((1u << count) - 1); }
SK_INLINE Lanes at(uint32_t bits) { return static_cast<Lanes>(bits); }
SK_INLINE Vec load(const float* v, int64_t count) { return _mm512_maskz_loadu_ps(first(count), v); }
SK_INLINE Vec load(const bf16* v, int64_t count) {
  const __m256i h = _mm256_maskz_loadu_epi16(first(count), v);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
SK_INLINE Vec load_all(const float* v) { return _mm512_loadu_ps(v); }
SK_INLINE Vec load_all(const bf16* v) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
template <bool kExact, class T>
SK_INLINE Vec expand(uint32_t bits, const T* v) {
  return _mm512_maskz_expand_ps(at(bits), kExact ? load(v, count_bits(bits)) : load_all(v));
}
SK_INLINE Vec gather(const float* x, const uint16_t* cols) {
  const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(cols));
  return _mm512_i32gather_ps(_mm512_cvtepu16_epi32(c), x, 4);
}
SK_INLINE Vec fma(Lanes l, Vec a, Vec b, Vec c) { return _mm512_mask3_fmadd_ps(a, b, c, l); }

#elif defined(__AVX2__)

using Lanes = __m256;
constexpr bool kOverread = true;

// For each byte: where each lane finds its value among the consecutive ones; 0x80 for no bit.
struct Places {
  uint64_t of[256];
  constexpr Places() : of() {
    for (int bits = 0; bits < 256; bits++) {
      uint64_t next = 0;
      for (int lane = 0; lane < 8; lane++)
        of[bits] |= (bits >> lane & 1 ? next++ : uint64_t{0x80}) << 8 * lane;
    }
  }
};
constexpr Places kPlaces;
SK_INLINE __m256i places(uint32_t bits) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kPlaces.of[bits])));
}

SK_INLINE Lanes first(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane));
}
SK_INLINE Lanes at(uint32_t bits) {
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(places(bits), _mm256_set1_epi32(-1)));
}
SK_INLINE Vec load(const float* v, int64_t count) {
  return _mm256_maskload_ps(v, _mm256_castps_si256(first(count)));
}
SK_INLINE Vec load(const bf16* v, int64_t count) {
  bf16 few[kLanes] = {};
  if (count < kLanes) {
    for (int64_t i = 0; i < count; i++) few[i] = v[i];
    v = few;
  }
  return load_row(v);
}
template <class T>
SK_INLINE Vec load_all(const T* v) {
  return load_row(v);
}
template <bool kExact, class T>
SK_INLINE Vec expand(uint32_t bits, const T* v) {
  const Vec row = kExact ? load(v, count_bits(bits)) : load_all(v);
  return _mm256_permutevar8x32_ps(row, places(bits));
}
SK_INLINE Vec gather(const float* x, const uint16_t* cols) {
  const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(cols));
  return _mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(c), 4);
}
SK_INLINE Vec fma(Lanes l, Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(_mm256_and_ps(a, l), _mm256_and_ps(b, l), c);
}

#else  // a lane at a time

using Lanes = uint32_t;
constexpr bool kOverread = false;
SK_INLINE Lanes first(int64_t count) { return (1u << count) - 1; }
SK_INLINE Lanes at(uint32_t bits) { return bits; }
SK_INLINE Vec from_lanes(const float* lanes) {
  alignas(16) float aligned[kLanes];
  memcpy(aligned, lanes, sizeof aligned);
  return load(aligned);
}
template <class T>
SK_INLINE Vec load(const T* v, int64_t count) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; i++) lanes[i] = to_float(v[i]);
  return from_lanes(lanes);
}
template <class T>
SK_INLINE Vec load_all(const T* v) {
  return load_row(v);
}
template <bool kExact, class T>
SK_INLINE Vec expand(uint32_t bits, const T* v) {
  float lanes[kLanes] = {};
  for (int i = 0; i < kLanes; i++)
    if (bits >> i & 1) lanes[i] = to_float(*v++);
  return from_lanes(lanes);
}
SK_INLINE Vec gather(const float* x, const uint16_t* cols) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; i++) lanes[i] = x[cols[i]];
  return from_lanes(lanes);
}
SK_INLINE Vec fma(Lanes l, Vec a, Vec b, Vec c) {
  alignas(16) float al[kLanes], bl[kLanes], cl[kLanes];
  store(al, a);
  store(bl, b);
  store(cl, c);
  for (int i = 0; i < kLanes; i++)
    if (l >> i & 1) cl[i] += al[i] * bl[i];
  return load(cl);
}

#endif

// x as the leaf loops want it. rows: [kTokens][64 * words], zeros beyond the last column, so that a
// whole word of columns can be loaded everywhere. kTokens may be more than there are.
template <class T>
void stream_pack_rows(const T* x, int64_t stride, int64_t tokens, int64_t features, int64_t words,
                      int rows, float* packed) {
  for (int64_t m = 0; m < rows; m++, packed += 64 * words) {
    const int64_t live = m < tokens ? features : 0;
    int64_t c = 0;
    for (; c + kBlock <= live; c += kBlock) store_row(packed + c, load_row(x + m * stride + c));
    for (; c < live; c++) packed[c] = to_float(x[m * stride + c]);
    for (; c < 64 * words; c++) packed[c] = 0;
  }
}

// panel: [features][width], zeros beyond the last token.
template <class T>
void stream_pack_panel(const T* x, int64_t stride, int64_t tokens, int64_t features, int width,
                       float* panel) {
  const float kNone[kBlock] = {};
  const int64_t whole = features / kBlock * kBlock;
  for (int64_t c = 0; c < whole; c += kBlock)
    for (int m = 0; m < width; m += kBlock) {
      Row r[kBlock];
      SK_FOR(i, kBlock) {
        r[i] = m + i < tokens ? load_row(x + (m + i) * stride + c) : load_row(kNone);
      }
      transpose(r);
      SK_FOR(i, kBlock) store_row(panel + (c + i) * width + m, r[i]);
    }
  for (int64_t c = whole; c < features; c++)
    for (int m = 0; m < width; m++)
      panel[c * width + m] = m < tokens ? to_float(x[m * stride + c]) : 0;
}

// Sums over the lanes of kRows x kTokens accumulators, and the start of each row, written to y.
template <int kRows, int kTokens, class T>
SK_INLINE void write_sums(const Vec (&acc)[kRows * kTokens], const Stream& w, int64_t row,
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
__attribute__((aligned(64))) void bitmap_row(const Stream& w, const T* v, const uint64_t* bits,
                                             const float* x, Vec* sums) {
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
void stream_bitmap(const Stream& w, const T* values, const float* x, int64_t tokens, T* y,
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
void stream_gather(const Stream& w, const T* values, const float* x, T* y) {
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

// A row of kWidth floats in as few registers as hold it. On AVX-512 half a register is a type of
// its own.
template <int kWidth>
struct Tokens {
  static constexpr int kVecs = kWidth / kLanes;
  Vec v[kVecs];
  SK_INLINE void clear() {
    SK_FOR(j, kVecs) v[j] = zero();
  }
  SK_INLINE void fma(Vec a, const float* x) {
    SK_FOR(j, kVecs) v[j] = SK_ISA::fma(a, load(x + j * kLanes), v[j]);
  }
  template <class T>
  SK_INLINE static Vec splat(const T* p) {
    return SK_ISA::splat(p);
  }
  SK_INLINE void add(const Tokens& other) {
    SK_FOR(j, kVecs) v[j] = SK_ISA::add(v[j], other.v[j]);
  }
  SK_INLINE void add_to_all(const float* p) {
    SK_FOR(j, kVecs) v[j] = SK_ISA::add(v[j], SK_ISA::splat(p));
  }
  SK_INLINE void write(float* y) const {
    SK_FOR(j, kVecs) store(y + j * kLanes, v[j]);
  }
};

#if defined(__AVX512F__)
template <>
struct Tokens<8> {
  __m256 v;
  SK_INLINE void clear() { v = _mm256_setzero_ps(); }
  SK_INLINE void fma(__m256 a, const float* x) { v = _mm256_fmadd_ps(a, _mm256_load_ps(x), v); }
  SK_INLINE static __m256 splat(const float* p) { return _mm256_broadcast_ss(p); }
  SK_INLINE static __m256 splat(const bf16* p) { return _mm256_set1_ps(to_float(*p)); }
  SK_INLINE void add(const Tokens& other) { v = _mm256_add_ps(v, other.v); }
  SK_INLINE void add_to_all(const float* p) { v = _mm256_add_ps(v, splat(p)); }
  SK_INLINE void write(float* y) const { _mm256_store_ps(y, v); }
};
#endif

// p[i] in every lane, for i known when compiled. Two bf16 come with one load: in a splat of both,
// each lane's upper half is one of them already.
template <int kWidth>
SK_INLINE auto splat_of(const float* p, int i) {
  return Tokens<kWidth>::splat(p + i);
}
template <int kWidth>
SK_INLINE auto splat_of(const bf16* p, int i) {
#if defined(__AVX2__)
  int32_t pair;
  memcpy(&pair, p + i / 2 * 2, sizeof pair);
#if defined(__AVX512F__)
  if constexpr (kWidth == 16) {
    const __m512i both = _mm512_set1_epi32(pair);
    return _mm512_castsi512_ps(i % 2 ? _mm512_and_si512(both, _mm512_set1_epi32(0xffff0000))
                                     : _mm512_slli_epi32(both, 16));
  } else
#endif
  {
    const __m256i both = _mm256_set1_epi32(pair);
    return _mm256_castsi256_ps(i % 2 ? _mm256_and_si256(both, _mm256_set1_epi32(0xffff0000))
                                     : _mm256_slli_epi32(both, 16));
  }
#else
  return Tokens<kWidth>::splat(p + i);
#endif
}

// The sum of some non-zeros of a row, dealt out to four sets to hide the latency of a multiply-add.
// Four columns come with one load.
template <int kWidth, class T>
SK_INLINE Tokens<kWidth> stream_row(int64_t count, const T* v, const uint16_t* cols,
                                    const float* x) {
  Tokens<kWidth> acc[4];
  SK_FOR(s, 4) acc[s].clear();
  auto four = [&](int64_t p) {
    uint64_t c;
    memcpy(&c, cols + p, sizeof c);
    SK_FOR(s, 4) {
      const uint64_t col = static_cast<uint16_t>(c >> 16 * s);
      acc[s].fma(splat_of<kWidth>(v + p, s), x + col * kWidth);
    }
  };
  int64_t p = 0;
  for (; p + 16 <= count; p += 16) {
    prefetch_values(v + p);
    prefetch_indices(cols + p);
    SK_FOR(q, 4) four(p + 4 * q);
  }
  for (; p + 4 <= count; p += 4) four(p);
  for (; p < count; p++) acc[0].fma(Tokens<kWidth>::splat(v + p), x + uint64_t{cols[p]} * kWidth);
  acc[0].add(acc[1]);
  acc[2].add(acc[3]);
  acc[0].add(acc[2]);
  return acc[0];
}

template <int kWidth, class T>
void stream_columns(const Stream& w, const T* values, const float* x, int64_t tokens, T* y,
                    int64_t stride) {
  alignas(64) float tile[kBlock * kWidth];  // [row][token]
  for (int64_t i = 0; i < w.rows; i += kBlock) {
    const int64_t rows = least(kBlock, w.rows - i);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t first = w.row_offsets[i + r], end = w.row_offsets[i + r + 1];
      auto part = [&](int64_t p) {
        return stream_row<kWidth>(least(kSumNnz, end - p), values + p, w.cols + p, x);
      };
      Tokens<kWidth> sum = part(first);
      for (int64_t p = first + kSumNnz; p < end; p += kSumNnz) sum.add(part(p));
      sum.add_to_all(w.start + i + r);
      sum.write(tile + r * kWidth);
    }
    if (rows < kBlock) {
      for (int64_t m = 0; m < tokens; m++)
        for (int64_t r = 0; r < rows; r++)
          y[m * stride + i + r] = from_float<T>(tile[r * kWidth + m]);
      return;
    }
    for (int64_t m = 0; m < tokens; m += kBlock) {
      Row r[kBlock];
      SK_FOR(j, kBlock) r[j] = load_row(tile + j * kWidth + m);
      transpose(r);
      SK_FOR(j, kBlock)
        if (m + j < tokens) store_row(y + (m + j) * stride + i, r[j]);
    }
  }
}

}  // namespace sk::SK_ISA
