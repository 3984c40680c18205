// Between values in CSR order and rows of a dense W, by the bitmap of the pattern: a register of
// values is placed at the bits of a register's columns, or taken from there. Elements are moved,
// not read.
#pragma once

#include "../common/machine.h"
#include "kernels.h"
#include "lanes.h"

namespace sk::SK_ISA {

#if defined(__AVX512F__)

// Some columns in a register: of elements of kBytes. kHas16: AVX512-VBMI2 moves those of 16 bits,
// in assembly, since the functions around it are compiled for processors without it too.
template <int kBytes, bool kHas16>
struct Columns;

template <bool kHas16>
struct Columns<4, kHas16> {
  using T = uint32_t;
  static constexpr int kCount = 16;
  static SK_INLINE __m512i load(uint64_t lanes, const T* p) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes), p);
  }
  static SK_INLINE void store(uint64_t lanes, T* p, __m512i v) {
    _mm512_mask_storeu_epi32(p, static_cast<__mmask16>(lanes), v);
  }
  static SK_INLINE __m512i expand(uint64_t lanes, __m512i v) {
    return _mm512_castps_si512(expand_in_register(at(lanes), _mm512_castsi512_ps(v)));
  }
  static SK_INLINE __m512i compress(uint64_t lanes, __m512i v) {
    return _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), v);
  }
};

template <bool kHas16>
struct Columns<8, kHas16> {
  using T = uint64_t;
  static constexpr int kCount = 8;
  static SK_INLINE __m512i load(uint64_t lanes, const T* p) {
    return _mm512_maskz_loadu_epi64(static_cast<__mmask8>(lanes), p);
  }
  static SK_INLINE void store(uint64_t lanes, T* p, __m512i v) {
    _mm512_mask_storeu_epi64(p, static_cast<__mmask8>(lanes), v);
  }
  static SK_INLINE __m512i expand(uint64_t lanes, __m512i v) {
    return _mm512_maskz_expand_epi64(static_cast<__mmask8>(lanes), v);
  }
  static SK_INLINE __m512i compress(uint64_t lanes, __m512i v) {
    return _mm512_maskz_compress_epi64(static_cast<__mmask8>(lanes), v);
  }
};

template <bool kHas16>
struct Columns<2, kHas16> {
  using T = uint16_t;
  static constexpr int kCount = 32;
  static SK_INLINE __m512i load(uint64_t lanes, const T* p) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(lanes), p);
  }
  static SK_INLINE void store(uint64_t lanes, T* p, __m512i v) {
    _mm512_mask_storeu_epi16(p, static_cast<__mmask32>(lanes), v);
  }
  static SK_INLINE __m512i expand(uint64_t lanes, __m512i v) {
    __m512i placed;
    if constexpr (kHas16) {
      asm("vpxor %x0, %x0, %x0\n\tvpexpandw %1, %0%{%2%}%{z%}"
          : "=&x"(placed)
          : "v"(v), "Yk"(static_cast<__mmask32>(lanes)));
      return placed;
    }
    // The upper 16 columns have the values behind those of the lower ones.
    alignas(64) T all[2 * kCount] = {};
    _mm512_store_si512(all, v);
    auto half = [&](uint32_t bits, const T* from) {
      const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      return _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(at(bits), _mm512_cvtepu16_epi32(h)));
    };
    return _mm512_inserti64x4(
        _mm512_castsi256_si512(half(lanes & 0xffff, all)),
        half(static_cast<uint32_t>(lanes) >> 16, all + count_bits(lanes & 0xffff)), 1);
  }
  static SK_INLINE __m512i compress(uint64_t lanes, __m512i v) {
    __m512i taken;
    if constexpr (kHas16) {
      asm("vpcompressw %1, %0%{%2%}%{z%}"
          : "=v"(taken)
          : "v"(v), "Yk"(static_cast<__mmask32>(lanes)));
      return taken;
    }
    alignas(64) T all[2 * kCount] = {};
    auto half = [&](uint32_t bits, __m256i h, T* to) {
      const __m512i few = _mm512_maskz_compress_epi32(at(bits), _mm512_cvtepu16_epi32(h));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(few));
    };
    half(lanes & 0xffff, _mm512_castsi512_si256(v), all);
    half(static_cast<uint32_t>(lanes) >> 16, _mm512_extracti64x4_epi64(v, 1),
         all + count_bits(lanes & 0xffff));
    return _mm512_load_si512(all);
  }
};

SK_INLINE uint64_t first_bits(int64_t count) { return (uint64_t{1} << count) - 1; }

template <class C>
struct Mover {
  using T = typename C::T;
  static constexpr int kParts = 64 / C::kCount;
  static constexpr uint64_t kAll = ~uint64_t{0} >> (64 - C::kCount);

  // The columns of part p of a word that are columns of W.
  template <bool kWhole>
  static SK_INLINE uint64_t in_w(int p, int64_t live) {
    const int64_t left = live - p * C::kCount;
    return kWhole || left >= C::kCount ? kAll : left > 0 ? first_bits(left) : 0;
  }
  // kWhole: 64 columns of W, and 64 values or more from v on.
  template <bool kWhole>
  static SK_INLINE const T* expand(uint64_t bits, int64_t live, const T* v, T* to) {
    SK_FOR(p, kParts) {
      const uint64_t here = bits >> p * C::kCount & kAll;
      const int count = count_bits(here);
      const __m512i values = kWhole ? _mm512_loadu_si512(v) : C::load(first_bits(count), v);
      const __m512i placed = C::expand(here, values);
      T* out = to + p * C::kCount;
      kWhole ? _mm512_storeu_si512(out, placed) : C::store(in_w<false>(p, live), out, placed);
      v += count;
    }
    return v;
  }
  template <bool kWhole>
  static SK_INLINE T* collect(uint64_t bits, int64_t live, const T* from, T* v) {
    SK_FOR(p, kParts) {
      const uint64_t here = bits >> p * C::kCount & kAll;
      const T* in = from + p * C::kCount;
      const __m512i all = kWhole ? _mm512_loadu_si512(in) : C::load(in_w<false>(p, live), in);
      const int count = count_bits(here);
      C::store(first_bits(count), v, C::compress(here, all));
      v += count;
    }
    return v;
  }
};

template <int kBytes, bool kHas16 = false>
using MoverOf = Mover<Columns<kBytes, kHas16>>;

#else

template <class Element>
struct OneByOne {
  using T = Element;
  template <bool kWhole>
  static const T* expand(uint64_t bits, int64_t live, const T* v, T* to) {
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
using MoverOf = OneByOne<std::conditional_t<kBytes == 2, uint16_t,
                                            std::conditional_t<kBytes == 4, uint32_t, uint64_t>>>;

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
