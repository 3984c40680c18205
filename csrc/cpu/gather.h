// Values between CSR order and walking order. For W itself a segment is contiguous in both; W^T
// takes them one by one. Both jump about: what comes next is fetched ahead.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace sk::SK_ISA {

template <class T, class Real>
void gather(const Walk& w, const T* values, Real* walked) {
  if (w.source) {
    for (int64_t p = 0; p < w.nnz; p++) {
      __builtin_prefetch(values + w.source[p + Schedule::kAhead]);
      walked[p] = to_real(values[w.source[p]]);
    }
    return;
  }
  for (int64_t r = w.run_offsets[0]; r < w.run_offsets[w.col_blocks]; r++) {
    const Run& run = w.runs[r];
    for (int64_t q = run.first; q < run.first + run.segments; q++, walked += run.count) {
      const T* from = values + w.start[q];
      __builtin_prefetch(values + w.start[q + Schedule::kAhead]);
      for (int32_t p = 0; p < run.count; p++) walked[p] = to_real(from[p]);
    }
  }
}

SK_INLINE void put(float x, float* to) { *to = x; }
SK_INLINE void put(float x, bf16* to) { *to = from_float<bf16>(x); }
SK_INLINE void put(double x, double* to) { *to = x; }
SK_INLINE void put(double x, float* to) { *to = static_cast<float>(x); }
SK_INLINE void put(double x, bf16* to) { *to = from_float<bf16>(static_cast<float>(x)); }

template <class T, class Real>
void scatter(const Walk& w, const Real* walked, T* values) {
  for (int64_t r = w.run_offsets[0]; r < w.run_offsets[w.col_blocks]; r++) {
    const Run& run = w.runs[r];
    for (int64_t q = run.first; q < run.first + run.segments; q++, walked += run.count) {
      T* to = values + w.start[q];
      __builtin_prefetch(values + w.start[q + Schedule::kAhead], 1);
      for (int32_t p = 0; p < run.count; p++) put(walked[p], to + p);
    }
  }
}

}  // namespace sk::SK_ISA
