// Dot products of pairs of bfloat16 by one instruction: AVX512-BF16. In assembly, since the
// functions around them are compiled for processors without it too; they run where
// has_bf16_dots() (machine.h). Subnormal numbers count as zeros.
//
//   dot_bf16(a, b, c)         c + low(a) * low(b) + high(a) * high(b)
//   splat_two(p), splat_one   two bf16, or one and a 0, in every pair of lanes
//   add_two(sums, w, a, b)    sums += a row of pairs times one value and another times the other
//   FlushedBf16               a bf16 of results, for unpack (panel.h)
#pragma once

#include "simd.h"

#if defined(__AVX512F__)
#define SK_DOTS

namespace sk::SK_ISA {

SK_INLINE Vec dot_bf16(Pairs a, const Pair* b, Vec c) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "m"(*reinterpret_cast<const Pairs*>(b)));
  return c;
}
SK_INLINE Vec dot_bf16(Pairs a, Pairs b, Vec c) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
// bfloat16 as one instruction rounds it: subnormal numbers become 0.
struct FlushedBf16 {
  bf16 x;
};
SK_INLINE void store_row(FlushedBf16* p, Row r) {
  __m128i b;
  asm("vcvtneps2bf16 %1, %0" : "=v"(b) : "v"(r));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), b);
}
template <>
SK_INLINE FlushedBf16 from_float<FlushedBf16>(float x) {
  const bool is_subnormal = __builtin_fabsf(x) < __FLT_MIN__;
  return {from_float<bf16>(is_subnormal ? x * 0 : x)};
}
// Two values, or one and a 0, in every lane.
SK_INLINE Pairs splat_two(const bf16* p) {
  int32_t both;
  memcpy(&both, p, 4);
  return _mm512_set1_epi32(both);
}
SK_INLINE Pairs splat_one(const bf16* p) { return _mm512_set1_epi32(p->bits); }
// sums += the products of a row a with one value and of a row b with another, of w; once they are
// brought in_order the tokens in low halves are first.
SK_INLINE void add_two(Vec (&sums)[2], Pairs w, Pairs a, Pairs b) {
  asm("" : "+v"(b));  // or both would load it
  sums[0] = dot_bf16(_mm512_unpacklo_epi16(a, b), w, sums[0]);
  sums[1] = dot_bf16(_mm512_unpackhi_epi16(a, b), w, sums[1]);
}
SK_INLINE void in_order(Vec (&sums)[2]) {
  const Vec first = _mm512_shuffle_ps(sums[0], sums[1], 0x88);
  sums[1] = _mm512_shuffle_ps(sums[0], sums[1], 0xdd);
  sums[0] = first;
}

}  // namespace sk::SK_ISA

#endif
