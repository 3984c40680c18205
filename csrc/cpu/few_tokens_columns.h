// SpMM for few tokens whose lanes are tokens: `spmm_columns`. few_tokens.h says when.
#pragma once

#include "kernels.h"
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
      SK_FOR(i, kBlock) store_row(panel + (c + i) * width + m, r[i]);
    }
  for (int64_t c = whole; c < features; c++)
    for (int m = 0; m < width; m++)
      panel[c * width + m] = m < tokens ? to_float(x[m * stride + c]) : 0;
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
SK_INLINE Tokens<kWidth> sum_part(int64_t count, const T* v, const uint16_t* cols, const float* x) {
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
