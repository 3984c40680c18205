// Products that take the non-zeros one by one: `spmm_scalar` for rows of few non-zeros or of 32-bit
// columns, and `spmm_t_scalar`, the transpose for few tokens. few_tokens.h says when.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace sk::SK_ISA {

constexpr int64_t kScalarNnz = 512;  // non-zeros of a row, summed from 0

// One token. Four sets of sums, and a new one after kScalarNnz non-zeros.
template <class T, class Col>
void spmm_scalar(const CompressedRows& w, const Col* cols, const T* values, const float* x, T* y) {
  for (int64_t i = 0; i < w.rows; i++) {
    const int64_t end = w.row_offsets[i + 1];
    float total = w.start[i];
    for (int64_t p = w.row_offsets[i]; p < end;) {
      const int64_t stop = least(p + kScalarNnz, end);
      float s[4] = {};
      for (; p + 4 <= stop; p += 4)
        SK_FOR(j, 4) s[j] += to_float(values[p + j]) * x[cols[p + j]];
      for (; p < stop; p++) s[0] += to_float(values[p]) * x[cols[p]];
      total += (s[0] + s[1]) + (s[2] + s[3]);
    }
    y[i] = from_float<T>(total);
  }
}

// kWidth doubles, wherever they lie.
template <int kWidth>
struct RowT {
  typedef double V __attribute__((vector_size(8 * kWidth), aligned(8), may_alias));
};
template <>
struct RowT<1> {
  typedef double V;
};

// y[col][m] += value * dy[row][m]. In doubles: a column's sum is as long as it has non-zeros, and
// is never begun anew.
template <int kWidth, class T, class Col>
void spmm_t_scalar(const CompressedRows& w, const Col* cols, const T* values, const double* dy,
                   double* y) {
  using V = typename RowT<kWidth>::V;
  for (int64_t i = 0; i < w.rows; i++) {
    const V d = *reinterpret_cast<const V*>(dy + i * kWidth);
    const int64_t end = w.row_offsets[i + 1];
    for (int64_t p = w.row_offsets[i]; p < end; p++) {
      const double v = to_real(values[p]);
      *reinterpret_cast<V*>(y + int64_t{cols[p]} * kWidth) += v * d;
    }
  }
}

}  // namespace sk::SK_ISA
