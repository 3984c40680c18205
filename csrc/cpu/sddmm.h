// SDDMM on panels: dvalues[p] (+)= sum_m dy[row(p)][m] * x[col(p)][m] at the non-zeros of W.
//
// A row of dy sits in registers while its non-zeros pass, four at a time: four dot products over
// the panel's tokens, then one reduction that yields four neighbouring results in walking order.
#pragma once

#include "dots.h"
#include "kernels.h"
#include "simd.h"

namespace sk::SK_ISA {

// One register of dy times one of a row of x, added to c.
struct MultiplyAdd {
  template <class Register, class V, class Element>
  static SK_INLINE V dot(Register d, const Element* x, V c) {
    return sk::SK_ISA::dot(d, load(x), c);
  }
};
#ifdef SK_DOTS
struct InOneInstruction {
  static SK_INLINE Vec dot(Pairs d, const Pair* x, Vec c) { return dot_bf16(d, x, c); }
};
#endif

template <int kVecs, bool kAdd, class Dot, class Element, class Real>
void sddmm_run(const Run& run, const uint16_t* row, const uint16_t* c, const Element* dy,
               const Element* x, Real* out) {
  using V = typename Simd<Real>::V;
  constexpr int kLanes = Simd<Element>::kCount;
  constexpr int64_t kWidth = kVecs * kLanes;
  const int32_t count = run.count;
  row += run.first;
  for (int32_t q = 0; q < run.segments; q++, c += count, out += count) {
    const Element* dy_row = dy + row[q] * kWidth;
    typename Simd<Element>::V d[kVecs];
    SK_FOR(j, kVecs) d[j] = load(dy_row + j * kLanes);

    auto x_row = [&](uint16_t col) { return in_register(x + col * kWidth); };
    auto dot = [&](int32_t p) {
      const Element* in = x_row(c[p]);
      V a{};
      SK_FOR(j, kVecs) a = Dot::dot(d[j], in + j * kLanes, a);
      return a;
    };
    int32_t p = 0;
    for (; p + 4 <= count; p += 4) {
      const FourColumns four = load_columns(c + p);
      const Element *x0 = x_row(four[0]), *x1 = x_row(four[1]), *x2 = x_row(four[2]),
                    *x3 = x_row(four[3]);
      V a0{}, a1{}, a2{}, a3{};
      SK_FOR(j, kVecs) {
        a0 = Dot::dot(d[j], x0 + j * kLanes, a0);
        a1 = Dot::dot(d[j], x1 + j * kLanes, a1);
        a2 = Dot::dot(d[j], x2 + j * kLanes, a2);
        a3 = Dot::dot(d[j], x3 + j * kLanes, a3);
      }
      sum4<kAdd>(out + p, a0, a1, a2, a3);
    }
    if (p < count) {
      Real rest[4];
      const int32_t left = count - p;
      const V second = left > 1 ? dot(p + 1) : V{}, third = left > 2 ? dot(p + 2) : V{};
      sum4<false>(rest, dot(p), second, third, V{});
      for (int32_t i = 0; i < left; i++) out[p + i] = kAdd ? out[p + i] + rest[i] : rest[i];
    }
  }
}

template <int kVecs, class Dot, class Element, class Real>
void sddmm_block(const Walk& w, const Element* dy, const Element* x, bool accumulate,
                 Real* walked) {
  auto* f = accumulate ? sddmm_run<kVecs, true, Dot, Element, Real>
                       : sddmm_run<kVecs, false, Dot, Element, Real>;
  const int64_t size = w.cols_per_block * kVecs * Simd<Element>::kCount;
  const uint16_t* cols = w.cols;
  for (int64_t b = 0; b < w.col_blocks; b++, x += size)
    for (int64_t r = w.run_offsets[b]; r < w.run_offsets[b + 1]; r++) {
      const Run& run = w.runs[r];
      f(run, w.row, cols, dy, x, walked);
      walked += int64_t{run.count} * run.segments;
      cols += int64_t{run.count} * run.segments;
    }
}

}  // namespace sk::SK_ISA
