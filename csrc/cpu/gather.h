// Values between CSR order and walking order. For W itself a segment is contiguous in both; W^T
// takes them one by one. Both jump about: what comes next is fetched ahead, and what the same row
// has in the next column block.
#pragma once

#include "kernels.h"
#include "lanes.h"
#include "simd.h"

namespace sk::SK_ISA {

SK_INLINE void put(float x, float* to) { *to = x; }
SK_INLINE void put(bf16 x, float* to) { *to = to_real(x); }
SK_INLINE void put(bf16 x, bf16* to) { *to = x; }
SK_INLINE void put(float x, bf16* to) { *to = from_float<bf16>(x); }
SK_INLINE void put(double x, double* to) { *to = x; }
SK_INLINE void put(double x, float* to) { *to = static_cast<float>(x); }
SK_INLINE void put(double x, bf16* to) { *to = from_float<bf16>(static_cast<float>(x)); }

// to[0..count) = from[0..count), and no access beyond.
template <class From, class To>
SK_INLINE void copy(const From* from, int32_t count, To* to) {
  for (int32_t p = 0; p < count; p++) put(from[p], to + p);
}
#if defined(__AVX512F__)
template <class From>
SK_INLINE void copy(const From* from, int32_t count, float* to) {
  int32_t p = 0;
  for (; p + kLanes <= count; p += kLanes) _mm512_storeu_ps(to + p, load_all(from + p));
  for (; p < count; p++) put(from[p], to + p);
}
#endif

template <class T, class Walked>
void gather(const Walk& w, const T* values, Walked* walked) {
  constexpr int32_t kLine = 64 / sizeof(T);
  if (w.source) {
    for (int64_t p = 0; p < w.nnz; p++) {
      __builtin_prefetch(values + w.source[p + Schedule::kAhead]);
      put(values[w.source[p]], walked + p);
    }
    return;
  }
  for (int64_t r = w.run_offsets[0]; r < w.run_offsets[w.col_blocks]; r++) {
    const Run& run = w.runs[r];
    for (int64_t q = run.first; q < run.first + run.segments; q++, walked += run.count) {
      const T* from = values + w.start[q];
      __builtin_prefetch(values + w.start[q + Schedule::kAhead]);
      copy(from, run.count, walked);
      for (int32_t p = 0; p < run.count; p += kLine) __builtin_prefetch(from + run.count + p);
    }
  }
}

template <class T, class Real>
void scatter(const Walk& w, const Real* walked, T* values) {
  constexpr int32_t kLine = 64 / sizeof(T);
  for (int64_t r = w.run_offsets[0]; r < w.run_offsets[w.col_blocks]; r++) {
    const Run& run = w.runs[r];
    for (int64_t q = run.first; q < run.first + run.segments; q++, walked += run.count) {
      T* to = values + w.start[q];
      __builtin_prefetch(values + w.start[q + Schedule::kAhead], 1);
      copy(walked, run.count, to);
      for (int32_t p = 0; p < run.count; p += kLine) __builtin_prefetch(to + run.count + p, 1);
    }
  }
}

}  // namespace sk::SK_ISA
