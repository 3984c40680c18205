// What mends a product of a W that was written out: the tokens that an infinity or NaN has spoilt.
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

// Which of the kMendWarps tokens of this block have an infinity or NaN in their result: where W was
// written out, one such x times a zero of W spoils all of a token's results, the first one too. To
// `spoilt`, in shared memory.
template <class T>
__device__ void find_spoilt(const typename Float<T>::Element* y, unsigned tokens, int width,
                            int* spoilt) {
  const unsigned token = blockIdx.x * kMendWarps + threadIdx.x;
  if (threadIdx.x < kMendWarps) {
    spoilt[threadIdx.x] = 0;
    if (token < tokens) {
      const auto first = Float<T>::load(y[static_cast<long long>(token) * width]);
      spoilt[threadIdx.x] = !(first - first == 0);
    }
  }
  __syncthreads();
}

}  // namespace sk
