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

// Whether a place of W that a layout has is stored. Where nothing is stored layouts have +0; a
// stored zero is -0 there (sparsekern/kernels/cuda/layout.py), which makes no other sum: sums begin
// at +0.
__device__ inline bool is_stored(unsigned short value) { return value != 0; }
__device__ inline bool is_stored(float value) { return __float_as_uint(value) != 0; }

template <class Real>
__device__ inline bool is_finite(Real value) {
  return value - value == 0;
}

__device__ inline unsigned word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
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
