// The 16-bit floats that kernels read and write, and what every kernel here knows of a warp.
#pragma once

#include "ptx.cuh"

namespace sk {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct bf16 {
  unsigned short bits;
};
struct f16 {
  unsigned short bits;
};

template <class T>
struct Convert;

template <>
struct Convert<bf16> {
  static __device__ float low(unsigned pair) { return __uint_as_float(pair << 16); }
  static __device__ float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
  static __device__ unsigned short round(float value) { return round_to_bf16(value); }
};

template <>
struct Convert<f16> {
  static __device__ float low(unsigned pair) {
    return f16_to_float(static_cast<unsigned short>(pair));
  }
  static __device__ float high(unsigned pair) {
    return f16_to_float(static_cast<unsigned short>(pair >> 16));
  }
  static __device__ unsigned short round(float value) { return round_to_f16(value); }
};

__device__ inline unsigned word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// The values of W as a layout has them, 16 bits or 8. What 8 bits say is exact in bfloat16 and is
// multiplied with x as that; a float for each row of W, the scale, multiplies the sum.
struct int8 {};
struct e4m3 {};

template <class V>
struct Stored {
  using X = V;  // the type of x and y
  static constexpr int kBytes = 2;
  static constexpr bool kIsScaled = false;

  // Values 0 and 1 of a word, as two 16-bit floats.
  static __device__ unsigned pair(unsigned word) { return word; }
  // Value i of 16 bytes.
  static __device__ float value(const uint4& words, int i) {
    const unsigned pair = word(words, i / 2);
    return i % 2 ? Convert<V>::high(pair) : Convert<V>::low(pair);
  }
};

template <class V>
struct Scaled {
  using X = bf16;
  static constexpr int kBytes = 1;
  static constexpr bool kIsScaled = true;
};

// Two's complement. A number from 128 to 255 has its low bits in the mantissa of a bfloat16.
template <>
struct Stored<int8> : Scaled<int8> {
  static __device__ unsigned pair(unsigned word) {
    const unsigned sums = __byte_perm(word, 0x43, 0x4140);
    // 128 + the low seven bits, less 128 or, of a number below 0, 256.
    return multiply_add_bf16(sums & 0xff80ff80u, 0xbf80bf80u, sums & 0xff7fff7fu);
  }
  static __device__ float value(const uint4& words, int i) {
    // 2^23 + 128 + the value.
    const unsigned sum = __byte_perm(word(words, i / 4) ^ 0x80808080u, 0x4b000000u, 0x7540 | i % 4);
    return __uint_as_float(sum) - 8388736.0f;
  }
};

template <>
struct Stored<e4m3> : Scaled<e4m3> {
  // The exponent is too small by 120, of the largest and of what has no leading one alike.
  static __device__ unsigned pair(unsigned word) {
    const unsigned high = __byte_perm(word, 0, 0x1404);
    const unsigned bits = (high & 0x80008000u) | (high >> 4 & 0x07f007f0u);
    return multiply_add_bf16(bits, 0x7b807b80u, 0x80008000u);
  }
  static __device__ float value(const uint4& words, int i) {
    const unsigned halves = e4m3_to_f16(word(words, i / 4) >> i % 4 / 2 * 16);
    return i % 2 ? Convert<f16>::high(halves) : Convert<f16>::low(halves);
  }
};

// Bits of value i of some in memory, as a 16-bit float.
template <class V>
__device__ inline unsigned short stored_bits(const void* values, int i) {
  if constexpr (Stored<V>::kBytes == 2) {
    return static_cast<const unsigned short*>(values)[i];
  } else {
    return static_cast<unsigned short>(
        Stored<V>::pair(static_cast<const unsigned char*>(values)[i]));
  }
}

// The scale of a row, of layouts that have one.
template <class V>
__device__ inline float scale_of(const float* scales, int row) {
  if constexpr (Stored<V>::kIsScaled) {
    return scales[row];
  } else {
    return 1.0f;
  }
}

// Whether a place of W that a layout has is stored. Where nothing is stored layouts have +0; a
// stored zero is -0 there (sparsekern/kernels/cuda/layout.py), which makes no other sum: sums begin
// at +0. In 8 bits a zero is not stored.
__device__ inline bool is_stored(unsigned short value) { return value != 0; }
__device__ inline bool is_stored(float value) { return __float_as_uint(value) != 0; }

template <class Real>
__device__ inline bool is_finite(Real value) {
  return value - value == 0;
}

// [begin, end)
struct Range {
  int begin, end;
};

__device__ inline bool operator!=(const Range& a, const Range& b) {
  return a.begin != b.begin || a.end != b.end;
}

// The part of `guess` inside of `all`: what is read before wait_for_last_kernel() may be anything.
__device__ inline Range within(const Range& all, const Range& guess) {
  const int begin = max(all.begin, min(guess.begin, all.end));
  return {begin, max(begin, min(guess.end, all.end))};
}

}  // namespace sk
