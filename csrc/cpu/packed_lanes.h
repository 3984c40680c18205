// SpMM of W in lanes (lanes_layout.h) for up to kLanesTokens tokens: x of a block is looked up in
// registers.
#pragma once

#include "kernels.h"
#include "lanes.h"
#include "simd.h"

namespace sk::SK_ISA {

// Sums of the lanes of a group over its steps, for each token.
#if defined(__AVX512F__)

template <int kTokens>
struct LanesBlock {
  Vec x[kTokens][4];

  SK_INLINE void load_x(const float* from, int64_t stride) {
    SK_FOR(m, kTokens)
      SK_FOR(j, 4) x[m][j] = load(from + m * stride + j * kLanes);
  }
  template <class T>
  SK_INLINE void add_step(const T* v, const uint8_t* cols, Vec (&sums)[kTokens]) const {
    const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(cols));
    const __m512i places = _mm512_cvtepu8_epi32(c);
    const Lanes upper = _mm_movepi8_mask(c);
    const Vec a = load_all(v);
    SK_FOR(m, kTokens) {
      const Vec low = _mm512_permutex2var_ps(x[m][0], places, x[m][1]);
      const Vec high = _mm512_permutex2var_ps(x[m][2], places, x[m][3]);
      sums[m] = fma(a, _mm512_mask_blend_ps(upper, low, high), sums[m]);
    }
  }
  template <class T>
  SK_INLINE void add_group(int64_t steps, const T* v, const uint8_t* cols, int64_t stride,
                           float* y) const {
    Vec even[kTokens], odd[kTokens];
    SK_FOR(m, kTokens) even[m] = odd[m] = zero();
    for (; steps >= 2; steps -= 2, v += 2 * kLanesGroup, cols += 2 * kLanesGroup) {
      prefetch_values(v);
      prefetch_values(v + kLanesGroup);
      prefetch_indices(cols);
      add_step(v, cols, even);
      add_step(v + kLanesGroup, cols + kLanesGroup, odd);
    }
    if (steps) add_step(v, cols, even);
    SK_FOR(m, kTokens) store(y + m * stride, add(load(y + m * stride), add(even[m], odd[m])));
  }
};

#else

template <int kTokens>
struct LanesBlock {
  const float* x;
  int64_t x_stride;

  void load_x(const float* from, int64_t stride) { x = from, x_stride = stride; }
  template <class T>
  void add_group(int64_t steps, const T* v, const uint8_t* cols, int64_t stride, float* y) const {
    float sums[kTokens][kLanesGroup] = {};
    for (int64_t i = 0; i < steps; i++, v += kLanesGroup, cols += kLanesGroup)
      for (int lane = 0; lane < kLanesGroup; lane++) {
        const int col = (cols[lane] & 0x1f) | (cols[lane] & 0x80) >> 2;
        for (int m = 0; m < kTokens; m++)
          sums[m][lane] += to_float(v[lane]) * x[m * x_stride + col];
      }
    for (int m = 0; m < kTokens; m++)
      for (int lane = 0; lane < kLanesGroup; lane++) y[m * stride + lane] += sums[m][lane];
  }
};

#endif

// x: [kTokens][blocks][64], with 0 behind a block's columns. As many of the kTokens as there are
// are written.
template <int kTokens, class T>
void spmm_lanes(const LanesPart& w, const T* values, const float* x, int64_t tokens, T* y,
                int64_t stride) {
  constexpr int64_t kSize = kTokens * kLanesRows;
  alignas(64) float sums[kSize], totals[kSize];
  memset(sums, 0, sizeof sums);
  memset(totals, 0, sizeof totals);
  const LanesHead* head = w.heads;
  const uint8_t* cols = w.cols;
  for (int64_t b = 0; b < w.blocks; b++) {
    if (b > 0 && b % kSumBlocks == 0)
      for (int64_t i = 0; i < kSize; i++) totals[i] += sums[i], sums[i] = 0;
    LanesBlock<kTokens> block;
    block.load_x(x + b * 64, w.blocks * 64);
    for (int64_t g = 0; g < w.groups; g++, head++) {
      block.add_group(head->steps, values, cols, kLanesRows, sums + head->group * kLanesGroup);
      values += head->steps * kLanesGroup;
      cols += head->steps * kLanesGroup;
    }
  }
  for (int64_t m = 0; m < tokens; m++)
    for (int64_t i = 0; i < w.rows; i++)
      y[m * stride + i] =
          from_float<T>(w.start[i] + (totals[m * kLanesRows + i] + sums[m * kLanesRows + i]));
}

// x[m][b][c] = x[m][kLanesCols * b + c]; 0 beyond the columns and the tokens.
template <class T>
void pack_lanes(const T* x, int64_t stride, int64_t tokens, int64_t features, int64_t blocks,
                int64_t rows, float* packed) {
  for (int64_t m = 0; m < rows; m++)
    for (int64_t b = 0; b < blocks; b++, packed += 64) {
      const int64_t first = b * kLanesCols;
      const int64_t live = m < tokens ? least(kLanesCols, features - first) : 0;
      for (int64_t c = 0; c < live; c++) packed[c] = to_float(x[m * stride + first + c]);
      for (int64_t c = live; c < 64; c++) packed[c] = 0;
    }
}

}  // namespace sk::SK_ISA
