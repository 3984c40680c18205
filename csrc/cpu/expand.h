// Between values in CSR order and rows of a dense W, by the bitmap of the pattern: a register of
// values is placed at the bits of a register's columns, or taken from there. Elements are moved,
// not read.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace sk::SK_ISA {

#if defined(__AVX512F__)

// Some columns in a register, of elements of kBytes: those of 16 bits in the lower halves of lanes.
template <int kBytes>
struct Columns;

template <>
struct Columns<2> {
  using T = uint16_t;
  static constexpr int kCount = 16;
  static SK_INLINE __m512i load(const T* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static SK_INLINE __m512i load(uint64_t lanes, const T* p) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(at(lanes), p));
  }
  static SK_INLINE void store(T* p, __m512i v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }
  static SK_INLINE void store(uint64_t lanes, T* p, __m512i v) {
    _mm256_mask_storeu_epi16(p, at(lanes), _mm512_cvtepi32_epi16(v));
  }
};

template <>
struct Columns<4> {
  using T = uint32_t;
  static constexpr int kCount = 16;
  static SK_INLINE __m512i load(const T* p) { return _mm512_loadu_si512(p); }
  static SK_INLINE __m512i load(uint64_t lanes, const T* p) {
    return _mm512_maskz_loadu_epi32(at(lanes), p);
  }
  static SK_INLINE void store(T* p, __m512i v) { _mm512_storeu_si512(p, v); }
  static SK_INLINE void store(uint64_t lanes, T* p, __m512i v) {
    _mm512_mask_storeu_epi32(p, at(lanes), v);
  }
};

template <>
struct Columns<8> {
  using T = uint64_t;
  static constexpr int kCount = 8;
  static SK_INLINE __m512i load(const T* p) { return _mm512_loadu_si512(p); }
  static SK_INLINE __m512i load(uint64_t lanes, const T* p) {
    return _mm512_maskz_loadu_epi64(static_cast<__mmask8>(lanes), p);
  }
  static SK_INLINE void store(T* p, __m512i v) { _mm512_storeu_si512(p, v); }
  static SK_INLINE void store(uint64_t lanes, T* p, __m512i v) {
    _mm512_mask_storeu_epi64(p, static_cast<__mmask8>(lanes), v);
  }
};

// Values from the lowest lane on, to the lanes of a mask; and back.
template <class C>
SK_INLINE __m512i place(uint64_t lanes, __m512i v) {
  if constexpr (C::kCount == 8) return _mm512_maskz_expand_epi64(static_cast<__mmask8>(lanes), v);
  return _mm512_castps_si512(expand_in_register(at(lanes), _mm512_castsi512_ps(v)));
}
template <class C>
SK_INLINE __m512i take(uint64_t lanes, __m512i v) {
  if constexpr (C::kCount == 8) return _mm512_maskz_compress_epi64(static_cast<__mmask8>(lanes), v);
  return _mm512_maskz_compress_epi32(at(lanes), v);
}

SK_INLINE uint64_t first_bits(int64_t count) { return (uint64_t{1} << count) - 1; }

template <class C>
struct Mover {
  using T = typename C::T;
  static constexpr int kParts = 64 / C::kCount;
  static constexpr uint64_t kAll = ~uint64_t{0} >> (64 - C::kCount);

  // The columns of part p of a word that are columns of W.
  static SK_INLINE uint64_t in_w(int p, int64_t live) {
    const int64_t left = live - p * C::kCount;
    return left >= C::kCount ? kAll : left > 0 ? first_bits(left) : 0;
  }
  // kWhole: 64 columns of W, and 64 values or more from v on.
  template <bool kWhole>
  static SK_INLINE const T* expand(uint64_t bits, int64_t live, const T* v, T* to) {
    SK_FOR(p, kParts) {
      const uint64_t here = bits >> p * C::kCount & kAll;
      const int count = count_bits(here);
      const __m512i row = place<C>(here, kWhole ? C::load(v) : C::load(first_bits(count), v));
      T* out = to + p * C::kCount;
      kWhole ? C::store(out, row) : C::store(in_w(p, live), out, row);
      v += count;
    }
    return v;
  }
  template <bool kWhole>
  static SK_INLINE T* collect(uint64_t bits, int64_t live, const T* from, T* v) {
    SK_FOR(p, kParts) {
      const uint64_t here = bits >> p * C::kCount & kAll;
      const T* in = from + p * C::kCount;
      const __m512i row = kWhole ? C::load(in) : C::load(in_w(p, live), in);
      const int count = count_bits(here);
      C::store(first_bits(count), v, take<C>(here, row));
      v += count;
    }
    return v;
  }
};

template <int kBytes>
using MoverOf = Mover<Columns<kBytes>>;

#else

template <class Element>
struct OneByOne {
  using T = Element;
  template <bool kWhole>
  static const T* expand(uint64_t bits, int64_t live, const T* v, T* to) {
    if (live < 64) bits &= (uint64_t{1} << live) - 1;
    for (int64_t c = 0; c < live; c++) to[c] = 0;
    for (; bits; bits &= bits - 1) to[__builtin_ctzll(bits)] = *v++;
    return v;
  }
  template <bool kWhole>
  static T* collect(uint64_t bits, int64_t, const T* from, T* v) {
    for (; bits; bits &= bits - 1) *v++ = from[__builtin_ctzll(bits)];
    return v;
  }
};
template <int kBytes>
using MoverOf = OneByOne<
    std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>>;

#endif

// A whole word reads 64 values, though it has fewer: the last ones of W are read one word less.
template <class M>
void expand_rows(const CompressedRows& w, int64_t first_col, int64_t cols,
                 const typename M::T* values, typename M::T* dense) {
  const auto* end_of_values = values + w.nnz;
  for (int64_t i = 0; i < w.rows; i++, dense += cols) {
    const uint64_t* bits = w.bits + i * w.words;
    const auto* v = values + w.row_offsets[i];
    for (const uint64_t* end = bits + first_col / 64; bits < end; bits++) v += count_bits(*bits);
    int64_t c = 0;
    for (; c + 64 <= cols && end_of_values - v >= 64; c += 64)
      v = M::template expand<true>(*bits++, 64, v, dense + c);
    for (; c < cols; c += 64)
      v = M::template expand<false>(*bits++, least(64, cols - c), v, dense + c);
  }
}

template <class M>
void collect_rows(const CompressedRows& w, int64_t cols, const typename M::T* dense,
                  typename M::T* values) {
  for (int64_t i = 0; i < w.rows; i++, dense += cols) {
    const uint64_t* bits = w.bits + i * w.words;
    auto* v = values + w.row_offsets[i];
    int64_t c = 0;
    for (; c + 64 <= cols; c += 64) v = M::template collect<true>(*bits++, 64, dense + c, v);
    if (c < cols) M::template collect<false>(*bits, cols - c, dense + c, v);
  }
}

}  // namespace sk::SK_ISA
