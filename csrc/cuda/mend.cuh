// What mends a product that multiplied places of W which are not stored by 0: the tokens that an
// infinity or NaN in x has spoilt.
#pragma once

#include "numbers.cuh"

namespace sk {

constexpr unsigned kMendThreads = 256, kMendWarps = kMendThreads / kWarp;

// The floats of W, and what they are summed in.
template <class T>
struct Float {
  using Element = unsigned short;
  using Sum = float;
  static __device__ float load(unsigned short value) { return Convert<T>::low(value); }
  static __device__ unsigned short round(float sum) { return Convert<T>::round(sum); }
};
template <>
struct Float<float> {
  using Element = float;
  using Sum = float;
  static __device__ float load(float value) { return value; }
  static __device__ float round(float sum) { return sum; }
};
template <>
struct Float<double> {
  using Element = double;
  using Sum = double;
  static __device__ double load(double value) { return value; }
  static __device__ double round(double sum) { return sum; }
};

// Which of the kMendWarps tokens of this block have an infinity or NaN among their first `checked`
// results: one in x makes it of each result that x is multiplied for, by a zero too. To `spoilt`,
// in shared memory.
template <class T>
__device__ void find_spoilt(const typename Float<T>::Element* y, unsigned tokens, int width,
                            unsigned checked, int* spoilt) {
  const unsigned warp = threadIdx.x / kWarp, token = blockIdx.x * kMendWarps + warp;
  const auto* results = y + static_cast<long long>(token) * width;
  bool is_spoilt = false;
  for (unsigned i = threadIdx.x % kWarp; token < tokens && i < checked; i += kWarp) {
    is_spoilt |= !is_finite(Float<T>::load(results[i]));
  }
  is_spoilt = __ballot_sync(kAllLanes, is_spoilt);
  if (threadIdx.x % kWarp == 0) spoilt[warp] = is_spoilt;
  __syncthreads();
}

// y [M, N] = x W^T + bias anew, of the tokens that find_spoilt() finds. A warp sums a row of W:
// sum_part(row, x of the token, lane) is the part of a lane, over stored places alone.
template <class T, class SumPart>
__device__ void mend_tokens(const typename Float<T>::Element* x,
                            const typename Float<T>::Element* bias, typename Float<T>::Element* y,
                            int m, int n, int k, int checked, const SumPart& sum_part) {
  using F = Float<T>;
  extern __shared__ __align__(16) char smem[];
  int* spoilt = reinterpret_cast<int*>(smem);
  find_spoilt<T>(y, m, n, checked, spoilt);
  const unsigned lane = threadIdx.x % kWarp;
  for (unsigned t = 0; t < kMendWarps; ++t) {
    if (!spoilt[t]) continue;
    const long long token = static_cast<long long>(blockIdx.x) * kMendWarps + t;
    for (unsigned row = threadIdx.x / kWarp; row < static_cast<unsigned>(n); row += kMendWarps) {
      typename F::Sum sum = sum_part(row, x + token * k, lane);
      for (int other = kWarp / 2; other; other /= 2) {
        sum += __shfl_sync(kAllLanes, sum, static_cast<int>(lane) ^ other);
      }
      if (lane == 0) y[token * n + row] = F::round(bias ? sum + F::load(bias[row]) : sum);
    }
  }
}

}  // namespace sk
