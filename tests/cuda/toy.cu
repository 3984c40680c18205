// A kernel for tests of the two routes: y[i] = x[i] + a * i for i < n, by way of dynamic shared
// memory.
#include "launch.cuh"

template <class T>
__device__ void ramp(const T* x, T* y, int a, int n) {
  extern __shared__ char memory[];
  T* held = reinterpret_cast<T*>(memory);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    held[threadIdx.x] = x[i];
    y[i] = held[threadIdx.x] + T(a) * T(i);
  }
}

#define SK_TOY(name, type)                                                         \
  extern "C" __global__ void sk_toy_##name(const type* x, type* y, int a, int n) { \
    ramp(x, y, a, n);                                                              \
  }                                                                                \
  SK_KERNEL(sk_toy_##name)

SK_TOY(f32, float)
SK_TOY(i32, int)
