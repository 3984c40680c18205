// Kernels with a fault each, for tests of the emulator, and one without.
#include "launch.cuh"
#include "ptx.cuh"

namespace sk {

// y[i] = x[n - 1 - i] for i < n = blockDim.x, by way of shared memory.
template <bool kWaits, bool kMeets>
__device__ void reverse(const unsigned* x, unsigned* y) {
  extern __shared__ __align__(16) char smem[];
  const unsigned at = shared_address(smem), i = threadIdx.x;
  copy_async<4>(at + i * 4, x + i);
  commit_copies();
  if (kWaits) wait_copies<0>();
  if (kMeets) __syncthreads();
  y[i] = load_shared_u32(at + (blockDim.x - 1 - i) * 4);
}

}  // namespace sk

#define SK_REVERSE(name, waits, meets)                              \
  extern "C" __global__ void name(const unsigned* x, unsigned* y) { \
    sk::reverse<waits, meets>(x, y);                                \
  }                                                                 \
  SK_KERNEL(name)

SK_REVERSE(sk_faults_none, true, true)
SK_REVERSE(sk_faults_no_wait, false, true)
SK_REVERSE(sk_faults_no_barrier, true, false)

// All threads but one come to a barrier; `kind` says what the last one does.
extern "C" __global__ void sk_faults_barrier(int kind) {
  if (threadIdx.x == 33) {
    if (kind == 0) return;  // no fault: it does not count
    if (kind == 1) __syncwarp();
    if (kind == 2) __shfl_sync(0xffffffffu, 1, 0);
  }
  __syncthreads();
}
SK_KERNEL(sk_faults_barrier)

extern "C" __global__ void sk_faults_warp(int kind) {
  unsigned out[4];
  if (kind == 0 && threadIdx.x % 32 == 5) return;
  if (kind == 1 && threadIdx.x % 32 == 5) __syncwarp();
  if (kind == 2 && threadIdx.x % 32 == 0) return;
  if (kind == 2) __shfl_sync(0xffffffffu, 1, 0);
  sk::load_matrices_transposed(out, 0);
}
SK_KERNEL(sk_faults_warp)

extern "C" __global__ void sk_faults_mma(int positions) {
  float c[4] = {};
  const unsigned a[4] = {}, b[4] = {};
  sk::mma_sparse<sk::bf16, 0>(c, a, b, static_cast<unsigned>(positions));
}
SK_KERNEL(sk_faults_mma)

extern "C" __global__ void sk_faults_address(int at) {
  sk::load_shared_v4(static_cast<unsigned>(at));
}
SK_KERNEL(sk_faults_address)

namespace sk {
template <class T>
__device__ void write(T value, int at) {
  extern __shared__ __align__(16) char smem[];
  smem[at] = value;
}
}  // namespace sk
extern "C" __global__ void sk_faults_plain_address(int at) { sk::write('x', at); }
SK_KERNEL(sk_faults_plain_address)

// A thread waits for a phase to which nobody arrives; 1: it has been arrived at once too often.
extern "C" __global__ void sk_faults_phase(int kind) {
  if (threadIdx.x) return;
  sk::init_barrier(0);
  if (kind) {
    sk::copy_bulk(16, reinterpret_cast<const void*>(16), 16, 0);
    sk::arrive_at(0);
  }
  sk::wait_barrier(0, 0);
}
SK_KERNEL(sk_faults_phase)
