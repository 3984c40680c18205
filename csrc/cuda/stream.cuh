// The packed weight that both SpMM kernels read, and how a lane decodes it.
//
// W [N, K] is cut into slices of 32 rows (rows sorted by nnz; lane r of a warp owns row r of the
// slice) and parts of columns, each a whole number of windows of 128. One part of one slice is a
// *stream* per lane: its non-zeros in column order, in granules of 8 entries. Granule g of a part
// holds 32 x 8 values (lane-major, 16 B a lane) and, in a second array, 32 x 8 column deltas:
//
//   4 bits: entry i < 4 in the low nibble of byte i, entry i >= 4 in the high nibble of byte i - 4.
//           Bits 0-2 count pairs of columns since the last entry, bit 3 says which one of the pair.
//   8 bits: entry i in byte i, the columns since the last entry.
//
// An entry whose value is 0 is a step without a product: it bridges a longer gap, or lets a lane
// wait for the others. So no pattern is an exception, and a stored zero costs nothing else. All
// lanes of a warp take the same number of granules. They may run ahead of one another, but window w
// is complete in all lanes after the first S(w) granules, and no entry of window w + 2 comes before
// them: a ring of two windows is enough for a kernel that writes the windows out.
// Made by sparsekern/kernels/packed.py.
#pragma once

namespace sk {

constexpr int kWarp = 32;
constexpr int kGranule = 8;          // entries of a lane
constexpr int kWindow = 128;         // columns
constexpr int kLines = kWindow / 2;  // pairs of columns
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
  static __device__ unsigned short round(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  }
};

template <>
struct Convert<f16> {
  static __device__ float low(unsigned pair) { return of(static_cast<unsigned short>(pair)); }
  static __device__ float high(unsigned pair) {
    return of(static_cast<unsigned short>(pair >> 16));
  }
  static __device__ unsigned short round(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  }

 private:
  static __device__ float of(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
};

// The deltas of one granule of a lane.
template <int kBits>
struct Deltas;
template <>
struct Deltas<4> {
  using Word = unsigned;
};
template <>
struct Deltas<8> {
  using Word = uint2;
};

// W is read once: past L1.
__device__ inline uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ inline uint2 load_once(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(p));
  return v;
}
__device__ inline unsigned load_once(const unsigned* p) {
  unsigned v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

template <int kBits>
struct Granule {
  uint4 values;
  typename Deltas<kBits>::Word deltas;
};

template <int kBits>
__device__ inline Granule<kBits> load_granule(const uint4* values,
                                              const typename Deltas<kBits>::Word* deltas, int g,
                                              int lane) {
  const long long i = static_cast<long long>(g) * kWarp + lane;
  return {load_once(values + i), load_once(deltas + i)};
}

__device__ inline unsigned word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Part `part` of a row's `windows` windows, cut into `parts`: where it begins.
__device__ inline int part_window(int part, int parts, int windows) {
  return static_cast<int>(static_cast<long long>(part) * windows / parts);
}

}  // namespace sk
