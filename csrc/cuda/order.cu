// What 2:4 sparse products of a W in an order of its columns (csrc/packing/order.h) read beside it:
// x in this order, and the operand of the values.
//
//   out [M, width] = x [M, columns]                    4 bytes an element
//   operand [N, width / 2] = values at `targets`       slots, values, 2 bytes a value or 6, the
//   tail
//
// The indices are made from a checked copy that nobody else can write to, so no access is checked.
#include "launch.cuh"
#include "numbers.cuh"

namespace sk {

constexpr unsigned kOrderThreads = 256;
constexpr unsigned kPermuteTokens = 2;  // of a block

// out [m, width] = x [m, k] at columns [width], 16 bits each, below k. Two tokens lie element by
// element in shared memory, so that one read there serves both. m is even, k and width are
// multiples of 16; all begins on a multiple of 16 bytes.
__device__ inline void permute(const uint4* x, const uint4* columns, uint4* out, unsigned k,
                               unsigned width) {
  extern __shared__ __align__(16) char smem[];
  auto pairs = reinterpret_cast<unsigned*>(smem);  // [k]
  const unsigned parts = k / 8, out_parts = width / 8;
  const uint4* first = x + static_cast<long long>(blockIdx.x) * kPermuteTokens * parts;
  for (unsigned i = threadIdx.x; i < parts; i += kOrderThreads) {
    const uint4 a = first[i], b = first[parts + i];
    const unsigned low[4] = {a.x, a.y, a.z, a.w}, high[4] = {b.x, b.y, b.z, b.w};
    unsigned both[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      both[2 * j] = (low[j] & 0xffffu) | high[j] << 16;
      both[2 * j + 1] = low[j] >> 16 | (high[j] & 0xffff0000u);
    }
    auto to = reinterpret_cast<uint4*>(pairs + i * 8);
    to[0] = {both[0], both[1], both[2], both[3]};
    to[1] = {both[4], both[5], both[6], both[7]};
  }
  __syncthreads();
  uint4* to = out + static_cast<long long>(blockIdx.x) * kPermuteTokens * out_parts;
  for (unsigned i = threadIdx.x; i < out_parts; i += kOrderThreads) {
    const uint4 eight = columns[i];
    const unsigned two[4] = {eight.x, eight.y, eight.z, eight.w};
    unsigned low[4], high[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const unsigned a = pairs[two[j] & 0xffffu], b = pairs[two[j] >> 16];
      low[j] = (a & 0xffffu) | b << 16;
      high[j] = a >> 16 | (b & 0xffff0000u);
    }
    to[i] = {low[0], low[1], low[2], low[3]};
    to[out_parts + i] = {high[0], high[1], high[2], high[3]};
  }
}

constexpr unsigned kFillTurns = 4;  // values of a thread at a time

// operand [slots] = 0, but for values at their targets, then the tail of `parts` times 16 bytes.
// Block b writes slots from b * block_slots on: `starts` says which of the values are there, and
// `targets` where. Value i is values[sources[i]], or values[i] without sources.
__device__ inline void fill(const unsigned short* values, const int* sources,
                            const unsigned short* targets, const int* starts, const uint4* tail,
                            uint4* operand, unsigned slots, unsigned block_slots, unsigned parts) {
  extern __shared__ __align__(16) char smem[];
  const unsigned blocks = (slots + block_slots - 1) / block_slots;
  if (blockIdx.x >= blocks) {
    const unsigned part = (blockIdx.x - blocks) * kOrderThreads + threadIdx.x;
    if (part < parts) operand[slots / 8 + part] = tail[part];
    return;
  }
  auto here = reinterpret_cast<unsigned short*>(smem);
  auto eights = reinterpret_cast<uint4*>(smem);
  const unsigned first = blockIdx.x * block_slots;
  const unsigned count = min(block_slots, slots - first) / 8;
  for (unsigned i = threadIdx.x; i < count; i += kOrderThreads) eights[i] = {0, 0, 0, 0};
  __syncthreads();
  const unsigned end = starts[blockIdx.x + 1];
  for (unsigned i = starts[blockIdx.x] + threadIdx.x; i < end; i += kOrderThreads * kFillTurns) {
    unsigned short value[kFillTurns], target[kFillTurns];
#pragma unroll
    for (unsigned t = 0; t < kFillTurns; ++t) {
      const unsigned at = i + t * kOrderThreads;
      if (at >= end) continue;
      value[t] = values[sources ? sources[at] : at];
      target[t] = targets[at];
    }
#pragma unroll
    for (unsigned t = 0; t < kFillTurns; ++t) {
      if (i + t * kOrderThreads < end) here[target[t]] = value[t];
    }
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < count; i += kOrderThreads) operand[first / 8 + i] = eights[i];
}

}  // namespace sk

extern "C" __global__ void __launch_bounds__(sk::kOrderThreads)
    sk_order_permute(const uint4* x, const uint4* columns, uint4* out, int k, int width) {
  sk::permute(x, columns, out, k, width);
}
SK_KERNEL(sk_order_permute)

extern "C" __global__ void __launch_bounds__(sk::kOrderThreads)
    sk_order_fill(const unsigned short* values, const int* sources, const unsigned short* targets,
                  const int* starts, const uint4* tail, uint4* operand, int slots, int block_slots,
                  int parts) {
  sk::fill(values, sources, targets, starts, tail, operand, slots, block_slots, parts);
}
SK_KERNEL(sk_order_fill)
