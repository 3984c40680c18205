// Token-major activations [tokens][features] <-> panels [features][width].
#pragma once

#include "kernels.h"
#include "simd.h"

namespace sk::SK_ISA {

// Columns per chunk: a chunk of a panel (64 features x width) stays in L1 while tokens pass.
constexpr int64_t kChunk = 64;

template <class T>
void pack(const T* x, int64_t stride, int64_t tokens, int64_t features, int64_t width,
          float* panel) {
  const int64_t whole_m = tokens / kBlock * kBlock, whole_c = features / kBlock * kBlock;
  for (int64_t c0 = 0; c0 < features; c0 += kChunk) {
    const int64_t c1 = c0 + kChunk < features ? c0 + kChunk : features;
    const int64_t block_end = c1 < whole_c ? c1 : whole_c;
    for (int64_t m = 0; m < whole_m; m += kBlock) {
      for (int64_t c = c0; c < block_end; c += kBlock) {
        Row r[kBlock];
        SK_FOR(i, kBlock) r[i] = load_row(x + (m + i) * stride + c);
        transpose(r);
        SK_FOR(i, kBlock) store_row(panel + (c + i) * width + m, r[i]);
      }
      for (int64_t c = block_end; c < c1; c++)
        for (int i = 0; i < kBlock; i++)
          panel[c * width + m + i] = to_float(x[(m + i) * stride + c]);
    }
    if (whole_m == width) continue;
    for (int64_t c = c0; c < c1; c++) {
      for (int64_t m = whole_m; m < tokens; m++) panel[c * width + m] = to_float(x[m * stride + c]);
      for (int64_t m = tokens; m < width; m++) panel[c * width + m] = 0;
    }
  }
}

// Two blocks side by side, so that a whole cache line of y is written at once: y's rows often lie a
// power of two apart and share few sets of L1, where half-written lines would not wait for the
// rest.
template <class T>
void unpack(const float* panel, int64_t width, int64_t tokens, int64_t features, T* y,
            int64_t stride) {
  constexpr int kWide = 2 * kBlock;
  const int64_t whole_m = tokens / kBlock * kBlock, whole_c = features / kWide * kWide;
  for (int64_t c = 0; c < whole_c; c += kWide)
    for (int64_t m = 0; m < whole_m; m += kBlock) {
      Row lo[kBlock], hi[kBlock];
      const float* in = panel + c * width + m;
      SK_FOR(i, kBlock) {
        lo[i] = load_row(in + i * width);
        hi[i] = load_row(in + (i + kBlock) * width);
      }
      transpose(lo);
      transpose(hi);
      SK_FOR(i, kBlock) {
        store_row(y + (m + i) * stride + c, lo[i]);
        store_row(y + (m + i) * stride + c + kBlock, hi[i]);
      }
    }
  for (int64_t m = 0; m < tokens; m++)
    for (int64_t c = m < whole_m ? whole_c : 0; c < features; c++)
      y[m * stride + c] = from_float<T>(panel[c * width + m]);
}

}  // namespace sk::SK_ISA
