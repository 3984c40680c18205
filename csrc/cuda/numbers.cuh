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

// The values of W as a layout has them, 16 bits or 8. What 8 bits say is exact in 16, and is
// multiplied with x as that; a float for each row of W, the scale, multiplies the sum.
struct int8 {};
struct e4m3 {};

// Bytes 0 and 1 of a word, or 2 and 3, as two floats of 16 bits.
template <class V>
__device__ unsigned to_bf16(unsigned word, int half);
template <class V>
__device__ unsigned to_f16(unsigned word, int half);

template <>
__device__ inline unsigned to_bf16<int8>(unsigned word, int half) {
  const unsigned sums = __byte_perm(word, 0x43, half ? 0x4342 : 0x4140);
  // 128 + the low seven bits, less 128 or, of a number below 0, 256.
  return multiply_add_bf16(sums & 0xff80ff80u, 0xbf80bf80u, sums & 0xff7fff7fu);
}

template <>
__device__ inline unsigned to_f16<int8>(unsigned word, int half) {
  // 1024 + 128 + the number, less 1152.
  const unsigned sums = __byte_perm(word ^ 0x80808080u, 0x64, half ? 0x4342 : 0x4140);
  return add_f16(sums, 0xe480e480u);
}

template <>
__device__ inline unsigned to_bf16<e4m3>(unsigned word, int half) {
  // The exponent is too small by 120, with a leading one and without alike.
  const unsigned high = __byte_perm(word, 0, half ? 0x3424 : 0x1404);
  const unsigned bits = (high & 0x80008000u) | (high >> 4 & 0x07f007f0u);
  return multiply_add_bf16(bits, 0x7b807b80u, 0x80008000u);
}

template <>
__device__ inline unsigned to_f16<e4m3>(unsigned word, int half) {
  return e4m3_to_f16(half ? word >> 16 : word);
}

template <class V>
struct Stored {    // in 8 bits
  using X = bf16;  // the type of x and y
  static constexpr int kBytes = 1;

  // Value i of 16 bytes.
  static __device__ float value(const uint4& words, int i) {
    const unsigned two = to_f16<V>(word(words, i / 4), i % 4 / 2);
    return i % 2 ? Convert<f16>::high(two) : Convert<f16>::low(two);
  }
  // Values 2 i and 2 i + 1 of some, as 16-bit floats.
  static __device__ unsigned pair(const unsigned* words, int i) {
    return to_bf16<V>(words[i / 2], i % 2);
  }
};

template <class V>
struct StoredIn16 {
  using X = V;
  static constexpr int kBytes = 2;

  static __device__ float value(const uint4& words, int i) {
    const unsigned two = word(words, i / 2);
    return i % 2 ? Convert<V>::high(two) : Convert<V>::low(two);
  }
  static __device__ unsigned pair(const unsigned* words, int i) { return words[i]; }
};
template <>
struct Stored<bf16> : StoredIn16<bf16> {};
template <>
struct Stored<f16> : StoredIn16<f16> {};

template <class V>
constexpr bool kIsScaled = Stored<V>::kBytes == 1;

// Bits of value i of some in memory, as a 16-bit float.
template <class V>
__device__ inline unsigned short stored_bits(const void* values, int i) {
  if constexpr (kIsScaled<V>) {
    const unsigned byte = static_cast<const unsigned char*>(values)[i];
    return static_cast<unsigned short>(to_bf16<V>(byte, 0));
  } else {
    return static_cast<const unsigned short*>(values)[i];
  }
}

// The scale of a row, of layouts that have one.
template <class V>
__device__ inline float scale_of(const float* scales, int row) {
  if constexpr (kIsScaled<V>) {
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
