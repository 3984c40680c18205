// x [M, K] bf16 in E4M3, with a scale that is a power of two: x8 = x * 2^exponent.
//
// Where the exponent is not given, two kernels find it. The first reads x and writes the largest of
// each block; the second takes the largest of those, so that nothing is beyond 448, reads x anew
// (up to about 40 MB it is still in L2), writes half of its bytes, and 2^-exponent. No atomics, and
// nothing that outlives a call.
//
// E4M3 has no infinities. An infinity, a NaN and what is beyond 448 become NaN, and so do the
// results of their token.
#include "launch.cuh"
#include "numbers.cuh"

namespace sk {

constexpr int kE4m3Threads = 256, kE4m3Warps = kE4m3Threads / kWarp;
constexpr float kMostE4m3 = 448, kRoundsToMost = 464;
constexpr float kLeastLargest = 0x1p-50f;  // below, products of scales would leave fp32's range
constexpr unsigned kBf16Infinity = 0x7f80;

__device__ inline unsigned largest_of(unsigned pair, unsigned largest) {
  const unsigned low = pair & 0x7fff, high = pair >> 16 & 0x7fff;
  if (low < kBf16Infinity) largest = max(largest, low);
  if (high < kBf16Infinity) largest = max(largest, high);
  return largest;
}

// Of all threads of the block, in each.
__device__ inline unsigned largest_of_block(unsigned largest) {
  extern __shared__ __align__(16) char smem[];
  unsigned* of_warps = reinterpret_cast<unsigned*>(smem);
  const int lane = threadIdx.x % kWarp;
  for (int other = kWarp / 2; other; other /= 2) {
    largest = max(largest, __shfl_sync(kAllLanes, largest, lane ^ other));
  }
  if (lane == 0) of_warps[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (int warp = 0; warp < kE4m3Warps; ++warp) largest = max(largest, of_warps[warp]);
  return largest;
}

__device__ inline float scaled(float value, float scale) {
  const float product = value * scale;
  return fabsf(product) <= kRoundsToMost ? product : __uint_as_float(0x7fffffff);
}

__device__ inline unsigned four_in_e4m3(unsigned first, unsigned second, float scale) {
  using C = Convert<bf16>;
  const unsigned low = round_to_e4m3(scaled(C::low(first), scale), scaled(C::high(first), scale));
  const unsigned high =
      round_to_e4m3(scaled(C::low(second), scale), scaled(C::high(second), scale));
  return low | high << 16;
}

}  // namespace sk

// largest [blocks], as the bits of a float; `eights` of 16 bytes in x.
extern "C" __global__ void __launch_bounds__(sk::kE4m3Threads)
    sk_e4m3_largest(const uint4* x, unsigned* largest, int eights) {
  sk::wait_for_last_kernel();
  sk::let_next_kernel_start();
  unsigned found = 0;
  const unsigned count = eights, step = gridDim.x * sk::kE4m3Threads;
#pragma unroll 4
  for (unsigned i = blockIdx.x * sk::kE4m3Threads + threadIdx.x; i < count; i += step) {
    const uint4 eight = x[i];
    for (int j = 0; j < 4; ++j) found = sk::largest_of(sk::word(eight, j), found);
  }
  found = sk::largest_of_block(found);
  if (threadIdx.x == 0) largest[blockIdx.x] = found << 16;
}
SK_EARLY_KERNEL(sk_e4m3_largest)

// x8 [sixteens_out] of 16 values, of which x has the first `sixteens`; the others are 0. With
// `parts` of largest the exponent is found, and inverse [1], bf16, is 2^-exponent.
extern "C" __global__ void __launch_bounds__(sk::kE4m3Threads)
    sk_e4m3_cast(const uint4* x, const unsigned* largest, uint4* x8, unsigned short* inverse,
                 int parts, int exponent, int sixteens, int sixteens_out) {
  sk::wait_for_last_kernel();
  sk::let_next_kernel_start();
  const unsigned first = blockIdx.x * sk::kE4m3Threads + threadIdx.x;
  float scale = __uint_as_float(static_cast<unsigned>(exponent + 127) << 23);
  if (parts) {
    unsigned found = 0;
    for (int i = threadIdx.x; i < parts; i += sk::kE4m3Threads) found = max(found, largest[i]);
    const float most = fmaxf(__uint_as_float(sk::largest_of_block(found)), sk::kLeastLargest);
    scale = __uint_as_float(__float_as_uint(sk::kMostE4m3 / most) & 0x7f800000u);
    if (first == 0) *inverse = static_cast<unsigned short>(__float_as_uint(1 / scale) >> 16);
  }
  const unsigned step = gridDim.x * sk::kE4m3Threads, given = sixteens;
#pragma unroll 2
  for (unsigned i = first; i < static_cast<unsigned>(sixteens_out); i += step) {
    uint4 out = {0, 0, 0, 0};
    if (i < given) {
      const uint4 a = x[2ull * i], b = x[2ull * i + 1];
      out = {sk::four_in_e4m3(a.x, a.y, scale), sk::four_in_e4m3(a.z, a.w, scale),
             sk::four_in_e4m3(b.x, b.y, scale), sk::four_in_e4m3(b.z, b.w, scale)};
    }
    x8[i] = out;
  }
}
SK_EARLY_KERNEL(sk_e4m3_cast)

// y [M, N] bf16 = y * inverse [1] + bias [N], each or one of them; `eights` of y, `of_row` of N.
extern "C" __global__ void __launch_bounds__(sk::kE4m3Threads)
    sk_e4m3_finish(uint4* y, const unsigned short* inverse, const uint4* bias, int eights,
                   int of_row) {
  sk::wait_for_last_kernel();
  sk::let_next_kernel_start();
  using C = sk::Convert<sk::bf16>;
  const float factor = inverse ? C::low(*inverse) : 1;
  const unsigned step = gridDim.x * sk::kE4m3Threads, count = eights;
#pragma unroll 2
  for (unsigned i = blockIdx.x * sk::kE4m3Threads + threadIdx.x; i < count; i += step) {
    uint4 added = {0, 0, 0, 0};
    if (bias) added = bias[i % of_row];
    const uint4 old = y[i];
    unsigned sums[4];
    for (int j = 0; j < 4; ++j) {
      const unsigned pair = sk::word(old, j), more = sk::word(added, j);
      const unsigned low = C::round(C::low(pair) * factor + C::low(more));
      sums[j] = low | static_cast<unsigned>(C::round(C::high(pair) * factor + C::high(more))) << 16;
    }
    y[i] = {sums[0], sums[1], sums[2], sums[3]};
  }
}
SK_EARLY_KERNEL(sk_e4m3_finish)
