// One vector type per instruction set. Included only by *_isa.cpp, which are compiled once per ISA
// with SK_ISA naming the namespace, so that no inline function is shared between ISAs.
//
//   Vec                       kLanes floats in one register; Doubles: half as many doubles
//   zero, load, store         aligned to the register
//   splat(p)                  the element at p (float or bf16) in every lane
//   fma(a, b, c)              a * b + c
//   sum4<kAdd>(p, a, b, c, d) p[0..3] (+)= sum(a), sum(b), sum(c), sum(d)
//   Row, load_row, store_row  kBlock consecutive elements of a matrix, as floats
//   transpose(Row[kBlock])    a kBlock x kBlock block, in place
//   Pairs, load(Pair*)        kLanes pairs of bf16 in one register; low(p), high(p): as floats
//   pair_row(a, b)            kBlock pairs of one element of a and one of b, as bits of a Row
//   dot(a, b, c)              c + low(a) * low(b) + high(a) * high(b)
//   add_row(sums, w, p)       sums[:] += w * the elements at p: floats, doubles or pairs
//   FourColumns, load_columns four neighbouring column indices, by one load
//   least(a, b)               std::min, which would be shared between ISAs
//   prefetch_values(p), prefetch_indices(p)   of the streams of W that few_tokens.h reads
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(SK_NEON)
#include <arm_neon.h>
#endif

#define SK_FOR(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < n; i++)  // unrolled
#define SK_INLINE inline __attribute__((always_inline))

namespace sk::SK_ISA {

// The same pointer, in a register of its own. An operand at [base + index + constant] is split off
// its multiply-add when it issues, one at [base + constant] is not: 3 to 10 % of the inner loops.
template <class Real>
SK_INLINE const Real* in_register(const Real* p) {
#if defined(__GNUC__)
  asm("" : "+r"(p));
#endif
  return p;
}

SK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Prefetches what the hardware does not see coming: the next page of values out of DRAM.
template <class T>
SK_INLINE void prefetch_values(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 4096);
}
SK_INLINE void prefetch_indices(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + 2048);
}

struct bf16 {
  uint16_t bits;
};

// The same feature of two tokens, which lie kLanes tokens apart.
struct Pair {
  bf16 low, high;
};

struct FourColumns {
  uint64_t bits;
  SK_INLINE uint16_t operator[](int i) const { return static_cast<uint16_t>(bits >> 16 * i); }
};
SK_INLINE FourColumns load_columns(const uint16_t* c) {
  FourColumns four;
  memcpy(&four.bits, c, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "load_columns: the first column is in the lowest bits of a load"
#endif
  return four;
}

SK_INLINE float to_float(float x) { return x; }
SK_INLINE float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// The number that an element is computed in.
template <class T>
SK_INLINE float to_real(T x) {
  return to_float(x);
}
SK_INLINE double to_real(double x) { return x; }

template <class T>
T from_float(float x);
template <>
SK_INLINE float from_float<float>(float x) {
  return x;
}
// Round to nearest even; a NaN stays a NaN (its payload must not round up to infinity).
template <>
SK_INLINE bf16 from_float<bf16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

#if defined(__AVX512F__) || defined(__AVX2__)

using Row = __m256;
constexpr int kBlock = 8;

SK_INLINE Row load_row(const float* p) { return _mm256_loadu_ps(p); }
SK_INLINE Row load_row(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
SK_INLINE void store_row(float* p, Row r) { _mm256_storeu_ps(p, r); }
SK_INLINE void store_row(bf16* p, Row r) {
  const __m256i u = _mm256_castps_si256(r);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(r, r, _CMP_UNORD_Q);
  const __m256i b = _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet), nan));
  const __m256i h = _mm256_srli_epi32(b, 16);
  const __m128i lo = _mm256_castsi256_si128(h), hi = _mm256_extracti128_si256(h, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(lo, hi));
}
SK_INLINE void transpose(Row (&r)[8]) {
  Row t[8];
  SK_FOR(i, 4) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  SK_FOR(h, 2) {
    r[4 * h] = _mm256_shuffle_ps(t[4 * h], t[4 * h + 2], 0x44);
    r[4 * h + 1] = _mm256_shuffle_ps(t[4 * h], t[4 * h + 2], 0xee);
    r[4 * h + 2] = _mm256_shuffle_ps(t[4 * h + 1], t[4 * h + 3], 0x44);
    r[4 * h + 3] = _mm256_shuffle_ps(t[4 * h + 1], t[4 * h + 3], 0xee);
  }
  SK_FOR(i, 4) {
    const Row lo = r[i], hi = r[i + 4];
    r[i] = _mm256_permute2f128_ps(lo, hi, 0x20);
    r[i + 4] = _mm256_permute2f128_ps(lo, hi, 0x31);
  }
}
SK_INLINE Row pair_row(const bf16* low, const bf16* high) {
  auto widened = [](const bf16* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  };
  return _mm256_castsi256_ps(_mm256_or_si256(widened(low), _mm256_slli_epi32(widened(high), 16)));
}

#if defined(__AVX512F__)

using Vec = __m512;
using Pairs = __m512i;
constexpr int kLanes = 16;

SK_INLINE Vec zero() { return _mm512_setzero_ps(); }
SK_INLINE Vec load(const float* p) { return _mm512_load_ps(p); }
SK_INLINE void store(float* p, Vec v) { _mm512_store_ps(p, v); }
SK_INLINE Vec splat(const float* p) { return _mm512_set1_ps(*p); }
SK_INLINE Vec splat(const bf16* p) { return _mm512_set1_ps(to_float(*p)); }
SK_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
SK_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
SK_INLINE Pairs load(const Pair* p) { return _mm512_load_si512(p); }
SK_INLINE Vec low(Pairs p) { return _mm512_castsi512_ps(_mm512_slli_epi32(p, 16)); }
SK_INLINE Vec high(Pairs p) {
  return _mm512_castsi512_ps(_mm512_and_si512(p, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
template <bool kAdd>
SK_INLINE void sum4(float* p, Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
  // Each quarter holds (a, b, c, d), to be summed over the quarters.
  const Vec quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  const __m256 halves =
      _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  _mm_storeu_ps(p, kAdd ? _mm_add_ps(_mm_loadu_ps(p), sum) : sum);
}

#else  // AVX2

using Vec = __m256;
using Pairs = __m256i;
constexpr int kLanes = 8;

SK_INLINE Vec zero() { return _mm256_setzero_ps(); }
SK_INLINE Vec load(const float* p) { return _mm256_load_ps(p); }
SK_INLINE void store(float* p, Vec v) { _mm256_store_ps(p, v); }
SK_INLINE Vec splat(const float* p) { return _mm256_broadcast_ss(p); }
SK_INLINE Vec splat(const bf16* p) { return _mm256_set1_ps(to_float(*p)); }
SK_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
SK_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
SK_INLINE Pairs load(const Pair* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}
SK_INLINE Vec low(Pairs p) { return _mm256_castsi256_ps(_mm256_slli_epi32(p, 16)); }
SK_INLINE Vec high(Pairs p) {
  return _mm256_castsi256_ps(_mm256_and_si256(p, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
template <bool kAdd>
SK_INLINE void sum4(float* p, Vec a, Vec b, Vec c, Vec d) {
  const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
  _mm_storeu_ps(p, kAdd ? _mm_add_ps(_mm_loadu_ps(p), sum) : sum);
}

#endif

#elif defined(SK_NEON)

using Vec = float32x4_t;
using Pairs = uint32x4_t;
using Row = float32x4_t;
constexpr int kLanes = 4;
constexpr int kBlock = 4;

SK_INLINE Vec zero() { return vdupq_n_f32(0); }
SK_INLINE Vec load(const float* p) { return vld1q_f32(p); }
SK_INLINE void store(float* p, Vec v) { vst1q_f32(p, v); }
SK_INLINE Vec splat(const float* p) { return vld1q_dup_f32(p); }
SK_INLINE Vec splat(const bf16* p) { return vdupq_n_f32(to_float(*p)); }
SK_INLINE Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
SK_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
SK_INLINE Pairs load(const Pair* p) { return vld1q_u32(reinterpret_cast<const uint32_t*>(p)); }
SK_INLINE Vec low(Pairs p) { return vreinterpretq_f32_u32(vshlq_n_u32(p, 16)); }
SK_INLINE Vec high(Pairs p) { return vreinterpretq_f32_u32(vandq_u32(p, vdupq_n_u32(0xffff0000))); }
SK_INLINE Row pair_row(const bf16* low, const bf16* high) {
  const uint16x4_t a = vld1_u16(reinterpret_cast<const uint16_t*>(low));
  const uint16x4_t b = vld1_u16(reinterpret_cast<const uint16_t*>(high));
  return vreinterpretq_f32_u32(vorrq_u32(vmovl_u16(a), vshll_n_u16(b, 16)));
}
template <bool kAdd>
SK_INLINE void sum4(float* p, Vec a, Vec b, Vec c, Vec d) {
  const Vec sum = vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
  vst1q_f32(p, kAdd ? vaddq_f32(vld1q_f32(p), sum) : sum);
}
SK_INLINE Row load_row(const float* p) { return vld1q_f32(p); }
SK_INLINE Row load_row(const bf16* p) {
  const uint16x4_t h = vld1_u16(reinterpret_cast<const uint16_t*>(p));
  return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
}
SK_INLINE void store_row(float* p, Row r) { vst1q_f32(p, r); }
SK_INLINE void store_row(bf16* p, Row r) {
  const uint32x4_t u = vreinterpretq_u32_f32(r);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
  const uint32x4_t b = vbslq_u32(vceqq_f32(r, r), up, quiet);
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(b, 16));
}
SK_INLINE void transpose(Row (&r)[4]) {
  // Each pair of neighbouring floats moves as one double.
  float64x2_t t[4];
  SK_FOR(i, 2) {
    t[2 * i] = vreinterpretq_f64_f32(vtrn1q_f32(r[2 * i], r[2 * i + 1]));
    t[2 * i + 1] = vreinterpretq_f64_f32(vtrn2q_f32(r[2 * i], r[2 * i + 1]));
  }
  SK_FOR(i, 2) {
    r[i] = vreinterpretq_f32_f64(vtrn1q_f64(t[i], t[i + 2]));
    r[i + 2] = vreinterpretq_f32_f64(vtrn2q_f64(t[i], t[i + 2]));
  }
}

#else  // portable

constexpr int kLanes = 4;
constexpr int kBlock = 4;
struct Vec {
  float v[kLanes];
};
using Row = Vec;

SK_INLINE Vec zero() { return {}; }
SK_INLINE Vec load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
SK_INLINE void store(float* p, Vec a) { memcpy(p, a.v, sizeof a.v); }
template <class T>
SK_INLINE Vec splat(const T* p) {
  const float x = to_float(*p);
  return {{x, x, x, x}};
}
SK_INLINE Vec add(Vec a, Vec b) {
  for (int i = 0; i < kLanes; i++) a.v[i] += b.v[i];
  return a;
}
SK_INLINE Vec fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < kLanes; i++) c.v[i] += a.v[i] * b.v[i];
  return c;
}
struct Pairs {
  Pair p[kLanes];
};
SK_INLINE Pairs load(const Pair* p) {
  Pairs all;
  memcpy(all.p, p, sizeof all.p);
  return all;
}
SK_INLINE Vec low(const Pairs& a) {
  Vec f;
  for (int i = 0; i < kLanes; i++) f.v[i] = to_float(a.p[i].low);
  return f;
}
SK_INLINE Vec high(const Pairs& a) {
  Vec f;
  for (int i = 0; i < kLanes; i++) f.v[i] = to_float(a.p[i].high);
  return f;
}
SK_INLINE Row pair_row(const bf16* low, const bf16* high) {
  Row r;
  for (int i = 0; i < kBlock; i++) {
    const Pair pair = {low[i], high[i]};
    memcpy(&r.v[i], &pair, 4);
  }
  return r;
}
SK_INLINE float sum(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
template <bool kAdd>
SK_INLINE void sum4(float* p, Vec a, Vec b, Vec c, Vec d) {
  const Vec s = {{sum(a), sum(b), sum(c), sum(d)}};
  store(p, kAdd ? add(load(p), s) : s);
}
template <class T>
SK_INLINE Row load_row(const T* p) {
  return {{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
template <class T>
SK_INLINE void store_row(T* p, Row r) {
  for (int i = 0; i < kBlock; i++) p[i] = from_float<T>(r.v[i]);
}
SK_INLINE void transpose(Row (&r)[kBlock]) {
  for (int i = 0; i < kBlock; i++)
    for (int j = 0; j < i; j++) {
      const float t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
}

#endif

// The compiler's own vectors: float64 serves precision, not speed.
using Doubles __attribute__((vector_size(kLanes * 4), may_alias)) = double;

SK_INLINE Doubles load(const double* p) { return *reinterpret_cast<const Doubles*>(p); }
SK_INLINE void store(double* p, Doubles v) { *reinterpret_cast<Doubles*>(p) = v; }
SK_INLINE Doubles splat(const double* p) { return Doubles{} + *p; }
SK_INLINE Doubles add(Doubles a, Doubles b) { return a + b; }
SK_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return a * b + c; }
SK_INLINE double sum(Doubles a) {
  double s = a[0];
  for (int i = 1; i < kLanes / 2; i++) s += a[i];
  return s;
}
template <bool kAdd>
SK_INLINE void sum4(double* p, Doubles a, Doubles b, Doubles c, Doubles d) {
  const double sums[] = {sum(a), sum(b), sum(c), sum(d)};
  SK_FOR(i, 4) p[i] = kAdd ? p[i] + sums[i] : sums[i];
}

SK_INLINE Vec dot(Vec a, Vec b, Vec c) { return fma(a, b, c); }
SK_INLINE Doubles dot(Doubles a, Doubles b, Doubles c) { return fma(a, b, c); }
SK_INLINE Vec dot(const Pairs& a, const Pairs& b, Vec c) {
  return fma(low(a), low(b), fma(high(a), high(b), c));
}

// The register of an element of panels, how many elements it holds, and the tokens in one of them.
template <class Element>
struct Simd {
  using V = Vec;
  static constexpr int kCount = kLanes;
  static constexpr int kTokens = 1;
};
template <>
struct Simd<Pair> {
  using V = Pairs;
  static constexpr int kCount = kLanes;
  static constexpr int kTokens = 2;
};
template <>
struct Simd<double> {
  using V = Doubles;
  static constexpr int kCount = kLanes / 2;
  static constexpr int kTokens = 1;
};

// sums[:] += w * a row of the panel.
template <int kSums, class V, class Real>
SK_INLINE void add_row(V (&sums)[kSums], V w, const Real* in) {
  SK_FOR(j, kSums) sums[j] = fma(w, load(in + j * Simd<Real>::kCount), sums[j]);
}
template <int kSums>
SK_INLINE void add_row(Vec (&sums)[kSums], Vec w, const Pair* in) {
  SK_FOR(j, kSums / 2) {
    const Pairs pairs = load(in + j * kLanes);
    sums[2 * j] = fma(w, low(pairs), sums[2 * j]);
    sums[2 * j + 1] = fma(w, high(pairs), sums[2 * j + 1]);
  }
}

}  // namespace sk::SK_ISA
