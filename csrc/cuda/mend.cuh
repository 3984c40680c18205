// What mends a product that multiplied places of W which are not stored by 0: the tokens that an
// infinity or NaN in x has spoilt.
#pragma once

#include "numbers.cuh"

namespace sk {

constexpr unsigned kMendThreads = 256, kMendWarps = kMendThreads / kWarp;
constexpr unsigned kMostMendTokens = 256;  // of a block

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

// The tokens of this block: [first, first + count). So many that few blocks look at all of them.
struct Tokens {
  long long first;
  unsigned count;
};
__device__ inline Tokens tokens_of_block(unsigned m) {
  const unsigned each = (m + gridDim.x - 1) / gridDim.x, first = min(blockIdx.x * each, m);
  return {first, min(each, m - first)};
}

// Which tokens of this block have an infinity or NaN among their first `checked` results: one in x
// makes it of each result that x is multiplied for, by a zero too. To `spoilt` [kMostMendTokens],
// in shared memory; false where there are none.
template <class T>
__device__ bool find_spoilt(const typename Float<T>::Element* y, const Tokens& tokens, int width,
                            unsigned checked, int* spoilt) {
  int* is_any = spoilt + kMostMendTokens;
  for (unsigned t = threadIdx.x; t <= kMostMendTokens; t += kMendThreads) spoilt[t] = 0;
  __syncthreads();
  const unsigned lanes = checked == 1 ? 1 : checked <= kWarp / 2 ? kWarp / 2 : kWarp;  // of a token
  for (unsigned t = threadIdx.x / lanes; t < tokens.count; t += kMendThreads / lanes) {
    const auto* results = y + (tokens.first + t) * width;
    bool is_spoilt = false;
    for (unsigned i = threadIdx.x % lanes; i < checked; i += lanes) {
      is_spoilt |= !is_finite(Float<T>::load(results[i]));
    }
    if (is_spoilt) spoilt[t] = *is_any = 1;
  }
  __syncthreads();
  return *is_any;
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
  const Tokens tokens = tokens_of_block(m);
  if (!find_spoilt<T>(y, tokens, n, checked, spoilt)) return;
  const unsigned lane = threadIdx.x % kWarp;
  for (unsigned t = 0; t < tokens.count; ++t) {
    if (!spoilt[t]) continue;
    const long long token = tokens.first + t;
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
