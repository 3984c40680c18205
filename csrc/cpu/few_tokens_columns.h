// SpMM for few tokens whose lanes are tokens: `spmm_columns`. few_tokens.h says when.
#pragma once

#include "kernels.h"
#include "lanes.h"
#include "simd.h"

namespace sk::SK_ISA {

constexpr int64_t kSumNnz = 512;  // non-zeros of a row, summed from 0

// panel[c][m] = x[m][c], [features][width], zeros beyond the last token.
template <class T>
void pack_panel(const T* x, int64_t stride, int64_t tokens, int64_t features, int width,
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
      if (width >= kBlock) {
        SK_FOR(i, kBlock) store_row(panel + (c + i) * width + m, r[i]);
      } else {
        alignas(64) float rows[kBlock][kBlock];
        SK_FOR(i, kBlock) store_row(rows[i], r[i]);
        SK_FOR(i, kBlock) memcpy(panel + (c + i) * width, rows[i], width * sizeof(float));
      }
    }
  for (int64_t c = whole; c < features; c++)
    for (int m = 0; m < width; m++)
      panel[c * width + m] = m < tokens ? to_float(x[m * stride + c]) : 0;
}

// A row of kWidth floats in as few registers as hold it.
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
  SK_INLINE void add(const Tokens& other) {
    SK_FOR(j, kVecs) v[j] = SK_ISA::add(v[j], other.v[j]);
  }
  SK_INLINE void write(const float* start, float* y) const {
    SK_FOR(j, kVecs) store(y + j * kLanes, SK_ISA::add(v[j], SK_ISA::splat(start)));
  }
};

// p[i] in every lane, of four numbers of which all are asked for: they come with one load, two bf16
// as one number, since in a splat of both each lane's upper half is one of them already.
template <int i>
SK_INLINE Vec splat_of(const float* p) {
#if defined(__AVX512F__)
  return _mm512_permute_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(p)), i * 0x55);
#else
  return splat(p + i);
#endif
}
template <int i>
SK_INLINE Vec splat_of(const bf16* p) {
#if defined(__AVX2__)
  int32_t pair;
  memcpy(&pair, p + i / 2 * 2, sizeof pair);
#if defined(__AVX512F__)
  const __m512i both = _mm512_set1_epi32(pair);
  return _mm512_castsi512_ps(i % 2 ? _mm512_and_si512(both, _mm512_set1_epi32(0xffff0000))
                                   : _mm512_slli_epi32(both, 16));
#else
  const __m256i both = _mm256_set1_epi32(pair);
  return _mm256_castsi256_ps(i % 2 ? _mm256_and_si256(both, _mm256_set1_epi32(0xffff0000))
                                   : _mm256_slli_epi32(both, 16));
#endif
#else
  return splat(p + i);
#endif
}

// The sum of some non-zeros of a row, dealt out to four sets to hide the latency of a multiply-add.
// Four columns come with one load.
template <int kWidth, class T>
SK_INLINE Tokens<kWidth> sum_splats(int64_t count, const T* v, const uint16_t* cols,
                                    const float* x) {
  Tokens<kWidth> acc[4];
  SK_FOR(s, 4) acc[s].clear();
  auto four = [&](int64_t p) {
    uint64_t c;
    memcpy(&c, cols + p, sizeof c);
    auto at = [&](int s) { return x + int64_t{static_cast<uint16_t>(c >> 16 * s)} * kWidth; };
    acc[0].fma(splat_of<0>(v + p), at(0));
    acc[1].fma(splat_of<1>(v + p), at(1));
    acc[2].fma(splat_of<2>(v + p), at(2));
    acc[3].fma(splat_of<3>(v + p), at(3));
  };
  int64_t p = 0;
  for (; p + 16 <= count; p += 16) {
    prefetch_values(v + p);
    prefetch_indices(cols + p);
    SK_FOR(q, 4) four(p + 4 * q);
  }
  for (; p + 4 <= count; p += 4) four(p);
  for (; p < count; p++) acc[0].fma(splat(v + p), x + uint64_t{cols[p]} * kWidth);
  acc[0].add(acc[1]);
  acc[2].add(acc[3]);
  acc[0].add(acc[2]);
  return acc[0];
}

#if defined(__AVX512F__)

// Fewer tokens than lanes: rows of x for several non-zeros stand side by side in a register, and so
// do their sums until the row is written.
template <int kWidth>
struct SideBySide {
  static constexpr int kCount = kLanes / kWidth;  // non-zeros
  Vec v;
  SK_INLINE void add(const SideBySide& other) { v = SK_ISA::add(v, other.v); }
  SK_INLINE void write(const float* start, float* y) const {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    if constexpr (kWidth == 8)
      return _mm256_store_ps(y, _mm256_add_ps(eight, _mm256_broadcast_ss(start)));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    if constexpr (kWidth == 2) four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    four = _mm_add_ps(four, _mm_set1_ps(*start));
    kWidth == 4 ? _mm_store_ps(y, four) : _mm_storel_pi(reinterpret_cast<__m64*>(y), four);
  }
};
template <>
struct Tokens<2> : SideBySide<2> {};
template <>
struct Tokens<4> : SideBySide<4> {};
template <>
struct Tokens<8> : SideBySide<8> {};

// The rows of x of SideBySide::kCount columns.
template <int kWidth>
SK_INLINE Vec x_rows(const float* x, const uint16_t* cols) {
  auto at = [&](uint64_t c, int i) {
    return x + int64_t{static_cast<uint16_t>(c >> 16 * i)} * kWidth;
  };
  auto eight = [](const float* a) { return _mm512_castps256_ps512(_mm256_load_ps(a)); };
  auto pair = [](const float* a, const float* b) {
    const __m128 low = _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(a)));
    return _mm_loadh_pi(low, reinterpret_cast<const __m64*>(b));
  };
  uint64_t c = 0, d = 0;
  memcpy(&c, cols, kWidth == 8 ? 4 : 8);
  if constexpr (kWidth == 8)
    return _mm512_insertf32x8(eight(at(c, 0)), _mm256_load_ps(at(c, 1)), 1);
  if constexpr (kWidth == 4)
    return join(_mm_load_ps(at(c, 0)), _mm_load_ps(at(c, 1)), _mm_load_ps(at(c, 2)),
                _mm_load_ps(at(c, 3)));
  memcpy(&d, cols + 4, 8);
  return join(pair(at(c, 0), at(c, 1)), pair(at(c, 2), at(c, 3)), pair(at(d, 0), at(d, 1)),
              pair(at(d, 2), at(d, 3)));
}

template <int kWidth, class T>
SK_INLINE Tokens<kWidth> sum_side_by_side(int64_t count, const T* v, const uint16_t* cols,
                                          const float* x) {
  constexpr int kCount = kLanes / kWidth, kSets = kWidth < 4 ? 2 : 4;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i place = _mm512_srli_epi32(lane, kWidth == 8 ? 3 : kWidth / 2);
  Vec acc[kSets];
  SK_FOR(s, kSets) acc[s] = zero();
  // The values of the t-th kCount of kLanes non-zeros, each for all its tokens.
  auto values = [&](Vec all, int t) {
    return _mm512_permutexvar_ps(_mm512_add_epi32(place, _mm512_set1_epi32(t * kCount)), all);
  };
  int64_t p = 0;
  for (; p + kLanes <= count; p += kLanes) {
    prefetch_values(v + p);
    prefetch_indices(cols + p);
    const Vec all = load_all(v + p);
    SK_FOR(t, kWidth)
      acc[t % kSets] =
          fma(values(all, t), x_rows<kWidth>(x, cols + p + t * kCount), acc[t % kSets]);
  }
  const int64_t left = count - p;
  const Vec all = load(v + p, left);
  SK_FOR(t, kWidth)
    if (t * kCount < left) {
      const Lanes here = first(least(kCount, left - t * kCount) * kWidth);
      acc[t % kSets] =
          fma(here, values(all, t), x_rows<kWidth>(x, cols + p + t * kCount), acc[t % kSets]);
    }
  SK_FOR(s, kSets / 2) acc[s] = add(acc[s], acc[s + kSets / 2]);
  Tokens<kWidth> sum;
  sum.v = kSets == 4 ? add(acc[0], acc[1]) : acc[0];
  return sum;
}
#endif

template <int kWidth, class T>
SK_INLINE Tokens<kWidth> sum_part(int64_t count, const T* v, const uint16_t* cols, const float* x) {
#if defined(__AVX512F__)
  if constexpr (kWidth < kLanes)
    return sum_side_by_side<kWidth>(count, v, cols, x);
  else
#endif
    return sum_splats<kWidth>(count, v, cols, x);
}

template <int kWidth, class T>
void spmm_columns(const CompressedRows& w, const T* values, const float* x, int64_t tokens, T* y,
                  int64_t stride) {
  alignas(64) float tile[kBlock * kWidth];  // [row][token]
  for (int64_t i = 0; i < w.rows; i += kBlock) {
    const int64_t rows = least(kBlock, w.rows - i);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t first = w.row_offsets[i + r], end = w.row_offsets[i + r + 1];
      auto part = [&](int64_t p) {
        return sum_part<kWidth>(least(kSumNnz, end - p), values + p, w.cols + p, x);
      };
      Tokens<kWidth> sum = part(first);
      for (int64_t p = first + kSumNnz; p < end; p += kSumNnz) sum.add(part(p));
      sum.write(w.start + i + r, tile + r * kWidth);
    }
    if (rows < kBlock || kWidth < kBlock) {
      for (int64_t m = 0; m < tokens; m++)
        for (int64_t r = 0; r < rows; r++)
          y[m * stride + i + r] = from_float<T>(tile[r * kWidth + m]);
      continue;
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
