// Token-major activations [tokens][features] <-> panels [features][width].
//
// Both walk along a strip of kWide tokens and move kWide features at a time, so that every cache
// line, of the rows and of the panel, is read or written whole: rows often lie a power of two apart
// and share few sets of L1, where a half-used line would not wait for its other half.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace sk::SK_ISA {

constexpr int kWide = 2 * kBlock;

// Fetches what kBlock rows have kLinesAhead further on: so many rows are too many for the hardware
// to follow, and those of activations often come from memory.
constexpr int kLinesAhead = 4;

template <class T>
SK_INLINE void fetch_ahead(const T* row, int64_t stride) {
  SK_FOR(i, kBlock) __builtin_prefetch(row + i * stride + kLinesAhead * 64 / sizeof(T));
}

template <class T>
void pack(const T* x, int64_t stride, int64_t tokens, int64_t features, int64_t width,
          float* panel) {
  const int64_t whole_m = tokens / kBlock * kBlock, whole_c = features / kWide * kWide;
  for (int64_t m0 = 0; m0 < whole_m; m0 += kWide)
    for (int64_t c = 0; c < whole_c; c += kWide)
      for (int64_t m = m0; m < whole_m && m < m0 + kWide; m += kBlock) {
        fetch_ahead(x + m * stride + c, stride);
        for (int half = 0; half < kWide; half += kBlock) {
          Row r[kBlock];
          SK_FOR(i, kBlock) r[i] = load_row(x + (m + i) * stride + c + half);
          transpose(r);
          SK_FOR(i, kBlock) store_row(panel + (c + half + i) * width + m, r[i]);
        }
      }
  for (int64_t m = 0; m < tokens; m++)
    for (int64_t c = m < whole_m ? whole_c : 0; c < features; c++)
      panel[c * width + m] = to_float(x[m * stride + c]);
  for (int64_t c = 0; tokens < width && c < features; c++)
    for (int64_t m = tokens; m < width; m++) panel[c * width + m] = 0;
}

template <class T>
void unpack(const float* panel, int64_t width, int64_t tokens, int64_t features, T* y,
            int64_t stride) {
  const int64_t whole_m = tokens / kBlock * kBlock, whole_c = features / kWide * kWide;
  for (int64_t m0 = 0; m0 < whole_m; m0 += kWide)
    for (int64_t c = 0; c < whole_c; c += kWide)
      for (int64_t m = m0; m < whole_m && m < m0 + kWide; m += kBlock) {
        fetch_ahead(y + m * stride + c, stride);
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

// Pairs: as many tokens of the panel's row as fill a register are packed at a time, kPairWide
// features of each.
constexpr int kPairWide = 32;

inline void pack(const bf16* x, int64_t stride, int64_t tokens, int64_t features, int64_t width,
                 Pair* panel) {
  const int64_t whole_c = features / kPairWide * kPairWide;
  for (int64_t m0 = 0, at0 = 0; at0 < width; m0 += 2 * kLanes, at0 += kLanes) {
    // Of whole blocks of tokens that are all there, the first features.
    const int64_t there = tokens - m0 - kLanes;
    const int64_t whole_m = there > 0 ? least(there, kLanes) / kBlock * kBlock : 0;
    for (int64_t c = 0; c < whole_c; c += kPairWide)
      for (int64_t m = 0; m < whole_m; m += kBlock) {
        const bf16* rows = x + (m0 + m) * stride + c;
        fetch_ahead(rows, stride);
        fetch_ahead(rows + kLanes * stride, stride);
        for (int part = 0; part < kPairWide; part += kBlock) {
          Row r[kBlock];
          const bf16* from = rows + part;
          SK_FOR(i, kBlock) r[i] = pair_row(from + i * stride, from + (i + kLanes) * stride);
          transpose(r);
          Pair* to = panel + (c + part) * width + at0 + m;
          SK_FOR(i, kBlock) store_row(reinterpret_cast<float*>(to + i * width), r[i]);
        }
      }
    auto at = [&](int64_t m, int64_t c) { return m < tokens ? x[m * stride + c] : bf16{0}; };
    for (int64_t m = 0; m < kLanes; m++)
      for (int64_t c = m < whole_m ? whole_c : 0; c < features; c++)
        panel[c * width + at0 + m] = {at(m0 + m, c), at(m0 + m + kLanes, c)};
  }
}

// float64: strips of a cache line of tokens.
inline void pack(const double* x, int64_t stride, int64_t tokens, int64_t features, int64_t width,
                 double* panel) {
  for (int64_t m0 = 0; m0 < width; m0 += 8)
    for (int64_t c = 0; c < features; c++)
      for (int64_t m = m0; m < width && m < m0 + 8; m++)
        panel[c * width + m] = m < tokens ? x[m * stride + c] : 0;
}

inline void unpack(const double* panel, int64_t width, int64_t tokens, int64_t features, double* y,
                   int64_t stride) {
  for (int64_t m0 = 0; m0 < tokens; m0 += 8)
    for (int64_t c = 0; c < features; c++)
      for (int64_t m = m0; m < tokens && m < m0 + 8; m++) y[m * stride + c] = panel[c * width + m];
}

}  // namespace sk::SK_ISA
