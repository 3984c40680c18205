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
constexpr unsigned kFillPad = 8;    // slots behind each row in shared memory, for the banks

// operand [rows, row_slots] = 0, but for values at their targets, then the tail of `parts` times 16
// bytes. A block writes a tile of [tile_rows, tile_slots], of which the last ones in a row or
// column of tiles may be less: `starts` says which of the values are there, and `targets` where in
// shared memory. Value i is values[sources[i]], or values[i] without sources. Both numbers of slots
// are multiples of 8.
__device__ inline void fill(const unsigned short* values, const int* sources,
                            const unsigned short* targets, const int* starts, const uint4* tail,
                            uint4* operand, unsigned rows, unsigned row_slots, unsigned tile_rows,
                            unsigned tile_slots, unsigned parts) {
  extern __shared__ __align__(16) char smem[];
  const unsigned across = (row_slots + tile_slots - 1) / tile_slots;
  const unsigned tiles = (rows + tile_rows - 1) / tile_rows * across;
  if (blockIdx.x >= tiles) {
    const unsigned part = (blockIdx.x - tiles) * kOrderThreads + threadIdx.x;
    if (part < parts) operand[static_cast<long long>(rows) * (row_slots / 8) + part] = tail[part];
    return;
  }
  const unsigned stride = (tile_slots + kFillPad) / 8;  // in 16 bytes
  auto here = reinterpret_cast<unsigned short*>(smem);
  auto eights = reinterpret_cast<uint4*>(smem);
  for (unsigned i = threadIdx.x; i < tile_rows * stride; i += kOrderThreads) {
    eights[i] = {0, 0, 0, 0};
  }
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
  const unsigned first_row = blockIdx.x / across * tile_rows;
  const unsigned first_slot = blockIdx.x % across * tile_slots;
  const unsigned columns = min(tile_slots, row_slots - first_slot) / 8;
  const unsigned count = min(tile_rows, rows - first_row) * columns;
  for (unsigned i = threadIdx.x; i < count; i += kOrderThreads) {
    const unsigned row = i / columns, column = i - row * columns;
    operand[static_cast<long long>(first_row + row) * (row_slots / 8) + first_slot / 8 + column] =
        eights[row * stride + column];
  }
}

}  // namespace sk

extern "C" __global__ void __launch_bounds__(sk::kOrderThreads)
    sk_order_permute(const uint4* x, const uint4* columns, uint4* out, int k, int width) {
  sk::permute(x, columns, out, k, width);
}
SK_KERNEL(sk_order_permute)

extern "C" __global__ void __launch_bounds__(sk::kOrderThreads)
    sk_order_fill(const unsigned short* values, const int* sources, const unsigned short* targets,
                  const int* starts, const uint4* tail, uint4* operand, int rows, int row_slots,
                  int tile_rows, int tile_slots, int parts) {
  sk::fill(values, sources, targets, starts, tail, operand, rows, row_slots, tile_rows, tile_slots,
           parts);
}
SK_KERNEL(sk_order_fill)
