// Some lanes of a vector: loads, expansions and multiply-adds that leave out the others. A place
// where W has no entry must never multiply x, which may be infinite there: its lane is masked, not
// zero.
//
//   Lanes                some lanes of a Vec
//   first(count)         the first count <= kLanes of them
//   at(bits)             those whose bit is set
//   expand(bits, v)      consecutive elements from v on, placed in those lanes
//   load_all(v)          v[0..kLanes), as floats
//   load(v, count)       v[0..count), as floats, and no access beyond; zeros in the other lanes
//   gather(x, cols)      x[cols[i]] in lane i, by one instruction where there is one
//   pick(x, cols)        the same by a load each; x[-3..-1] is memory, too
//   fma(l, a, b, c)      c, plus a * b in the lanes l
//
// expand<true> reads only as many elements as there are bits; without, it may read kLanes of them
// if kOverread, which is faster.
#pragma once

#include "simd.h"

namespace sk::SK_ISA {

SK_INLINE int count_bits(uint64_t bits) { return __builtin_popcountll(bits); }

#if defined(__AVX512F__)

using Lanes = __mmask16;
constexpr bool kOverread = true;
SK_INLINE Lanes first(int64_t count) { return static_cast<Lanes>((1u << count) - 1); }
SK_INLINE Lanes at(uint32_t bits) { return static_cast<Lanes>(bits); }
SK_INLINE Vec load(const float* v, int64_t count) { return _mm512_maskz_loadu_ps(first(count), v); }
SK_INLINE Vec load(const bf16* v, int64_t count) {
  const __m256i h = _mm256_maskz_loadu_epi16(first(count), v);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
SK_INLINE Vec load_all(const float* v) { return _mm512_loadu_ps(v); }
SK_INLINE Vec load_all(const bf16* v) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
// Zen 5 lets an expansion wait for what its destination held before, though it keeps nothing of it.
SK_INLINE Vec expand_in_register(Lanes lanes, Vec row) {
  Vec a;
  asm("vxorps %x0, %x0, %x0\n\tvexpandps %1, %0%{%2%}%{z%}" : "=&x"(a) : "v"(row), "Yk"(lanes));
  return a;
}
template <bool kExact, class T>
SK_INLINE Vec expand(uint32_t bits, const T* v) {
  return _mm512_maskz_expand_ps(at(bits), kExact ? load(v, count_bits(bits)) : load_all(v));
}
SK_INLINE Vec gather(const float* x, const uint16_t* cols) {
  const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(cols));
  return _mm512_i32gather_ps(_mm512_cvtepu16_epi32(c), x, 4);
}
// Lane l of a quarter comes from a whole quarter that lies l elements earlier, since to blend from
// memory takes no shuffle.
SK_INLINE __m128 pick4(const float* x, const uint16_t* cols) {
  uint64_t c;
  memcpy(&c, cols, sizeof c);
  __m128 r = _mm_load_ss(x + static_cast<uint16_t>(c));
  r = _mm_blend_ps(r, _mm_loadu_ps(x + static_cast<uint16_t>(c >> 16) - 1), 2);
  r = _mm_blend_ps(r, _mm_loadu_ps(x + static_cast<uint16_t>(c >> 32) - 2), 4);
  return _mm_blend_ps(r, _mm_loadu_ps(x + (c >> 48) - 3), 8);
}
SK_INLINE Vec join(__m128 a, __m128 b, __m128 c, __m128 d) {
  const __m256 lo = _mm256_insertf128_ps(_mm256_castps128_ps256(a), b, 1);
  const __m256 hi = _mm256_insertf128_ps(_mm256_castps128_ps256(c), d, 1);
  return _mm512_insertf32x8(_mm512_castps256_ps512(lo), hi, 1);
}
SK_INLINE Vec pick(const float* x, const uint16_t* cols) {
  return join(pick4(x, cols), pick4(x, cols + 4), pick4(x, cols + 8), pick4(x, cols + 12));
}
SK_INLINE Vec fma(Lanes l, Vec a, Vec b, Vec c) { return _mm512_mask3_fmadd_ps(a, b, c, l); }

#elif defined(__AVX2__)

using Lanes = __m256;
constexpr bool kOverread = true;

// For each byte: where each lane finds its value among the consecutive ones; 0x80 for no bit.
struct Places {
  uint64_t of[256];
  constexpr Places() : of() {
    for (int bits = 0; bits < 256; bits++) {
      uint64_t next = 0;
      for (int lane = 0; lane < 8; lane++)
        of[bits] |= (bits >> lane & 1 ? next++ : uint64_t{0x80}) << 8 * lane;
    }
  }
};
constexpr Places kPlaces;
SK_INLINE __m256i places(uint32_t bits) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kPlaces.of[bits])));
}

SK_INLINE Lanes first(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane));
}
SK_INLINE Lanes at(uint32_t bits) {
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(places(bits), _mm256_set1_epi32(-1)));
}
SK_INLINE Vec load(const float* v, int64_t count) {
  return _mm256_maskload_ps(v, _mm256_castps_si256(first(count)));
}
SK_INLINE Vec load(const bf16* v, int64_t count) {
  bf16 few[kLanes] = {};
  if (count < kLanes) {
    for (int64_t i = 0; i < count; i++) few[i] = v[i];
    v = few;
  }
  return load_row(v);
}
template <class T>
SK_INLINE Vec load_all(const T* v) {
  return load_row(v);
}
template <bool kExact, class T>
SK_INLINE Vec expand(uint32_t bits, const T* v) {
  const Vec row = kExact ? load(v, count_bits(bits)) : load_all(v);
  return _mm256_permutevar8x32_ps(row, places(bits));
}
SK_INLINE Vec gather(const float* x, const uint16_t* cols) {
  const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(cols));
  return _mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(c), 4);
}
SK_INLINE Vec pick(const float* x, const uint16_t* cols) { return gather(x, cols); }
SK_INLINE Vec fma(Lanes l, Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(_mm256_and_ps(a, l), _mm256_and_ps(b, l), c);
}

#else  // a lane at a time

using Lanes = uint32_t;
constexpr bool kOverread = false;
SK_INLINE Lanes first(int64_t count) { return (1u << count) - 1; }
SK_INLINE Lanes at(uint32_t bits) { return bits; }
SK_INLINE Vec from_lanes(const float* lanes) {
  alignas(16) float aligned[kLanes];
  memcpy(aligned, lanes, sizeof aligned);
  return load(aligned);
}
template <class T>
SK_INLINE Vec load(const T* v, int64_t count) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; i++) lanes[i] = to_float(v[i]);
  return from_lanes(lanes);
}
template <class T>
SK_INLINE Vec load_all(const T* v) {
  return load_row(v);
}
template <bool kExact, class T>
SK_INLINE Vec expand(uint32_t bits, const T* v) {
  float lanes[kLanes] = {};
  for (int i = 0; i < kLanes; i++)
    if (bits >> i & 1) lanes[i] = to_float(*v++);
  return from_lanes(lanes);
}
SK_INLINE Vec gather(const float* x, const uint16_t* cols) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; i++) lanes[i] = x[cols[i]];
  return from_lanes(lanes);
}
SK_INLINE Vec pick(const float* x, const uint16_t* cols) { return gather(x, cols); }
SK_INLINE Vec fma(Lanes l, Vec a, Vec b, Vec c) {
  alignas(16) float al[kLanes], bl[kLanes], cl[kLanes];
  store(al, a);
  store(bl, b);
  store(cl, c);
  for (int i = 0; i < kLanes; i++)
    if (l >> i & 1) cl[i] += al[i] * bl[i];
  return load(cl);
}

#endif

}  // namespace sk::SK_ISA
