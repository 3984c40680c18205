// W [N, K] dense, from packed W, for products of many tokens. `w` is +0 before, and so it stays
// where nothing is stored; a stored zero is -0.
#include "cover.cuh"
#include "gather.cuh"
#include "launch.cuh"
#include "mend.cuh"
#include "pairs.cuh"

namespace sk {

constexpr int kExpandWarps = 8;

// A gather: a warp writes a piece, lane r of row r.
template <int kBits>
__device__ void expand(const unsigned short* values, const unsigned char* deltas, const int* bounds,
                       const int* slice_of, const int* starts, const int* row_order,
                       unsigned short* w, int k, int pieces) {
  const int lane = threadIdx.x % kWarp;
  const int piece = blockIdx.x * kExpandWarps + threadIdx.x / kWarp;
  if (piece >= pieces) return;
  const int row = row_order[slice_of[piece] * kWarp + lane];
  if (row < 0) return;
  unsigned short* out = w + static_cast<long long>(row) * k;
  int column = starts[piece * kWarp + lane];
  for (int g = bounds[piece]; g < bounds[piece + 1]; ++g) {
    const long long at = static_cast<long long>(g) * kWarp + lane;
#pragma unroll
    for (int i = 0; i < kGranule; ++i) {
      int odd = 0;
      if constexpr (kBits == 4) {
        const int code = deltas[at * 4 + i % 4] >> (i / 4 * 4);
        column += (code & 7) * 2;
        odd = code >> 3 & 1;
      } else {
        column += deltas[at * 8 + i];
      }
      const unsigned short value = values[at * kGranule + i];
      if (is_stored(value)) out[column + odd] = value;
    }
  }
}

// A cover: a warp writes a tile, a lane a row of it.
__device__ inline void expand_cover(const unsigned char* records, const int* steps,
                                    const int* row_order, unsigned short* w, int k, int slices,
                                    int windows) {
  const int lane = threadIdx.x % kWarp;
  const int tile = blockIdx.x * kExpandWarps + threadIdx.x / kWarp;
  if (tile >= slices * windows) return;
  const int row = row_order[tile / windows * kWarp + lane];
  for (int step = steps[tile]; step < steps[tile + 1]; ++step) {
    const unsigned char* record = records + static_cast<long long>(step) * Record::kBytes;
    for (int group = 0; group < kWarp / 4; ++group) {
      const CoverPlace at = cover_place(record, lane, group);
      const int col = tile % windows * kCoverColumns + record[Record::kColumnsAt + at.slot];
      if (is_stored(at.value)) w[static_cast<long long>(row) * k + col] = at.value;
    }
  }
}

// Pairs: a warp writes a step, a lane its words.
__device__ inline void expand_pairs(const unsigned* words, const int* steps, unsigned short* w,
                                    int k, int slices, int row_steps) {
  const int lane = threadIdx.x % kWarp;
  const int step = blockIdx.x * kExpandWarps + threadIdx.x / kWarp;
  if (step >= slices * row_steps) return;
  visit_pairs(words + steps[step], lane, [&](int row, int column, unsigned short value) {
    const long long of_w = step / row_steps * kWarp + row;
    w[of_w * k + step % row_steps * kStepColumns + column] = value;
  });
}

// y [M, N] = x w^T + bias anew, of the tokens that find_spoilt() finds, where w is stored alone.
template <class T>
__device__ void mend_expanded(const unsigned short* w, const unsigned short* x,
                              const unsigned short* bias, unsigned short* y, int m, int n, int k) {
  const auto sum_part = [&](unsigned row, const unsigned short* from, unsigned lane) {
    const unsigned short* values = w + static_cast<long long>(row) * k;
    float sum = 0;
    for (unsigned col = lane; col < static_cast<unsigned>(k); col += kWarp) {
      if (!is_stored(values[col])) continue;
      sum = fmaf(Convert<T>::low(values[col]), Convert<T>::low(from[col]), sum);
    }
    return sum;
  };
  mend_tokens<T>(x, bias, y, m, n, k, 1, sum_part);
}

}  // namespace sk

#define SK_EXPAND_MEND(name, type)                                                       \
  extern "C" __global__ void __launch_bounds__(sk::kMendThreads)                         \
      name(const unsigned short* w, const unsigned short* x, const unsigned short* bias, \
           unsigned short* y, int m, int n, int k) {                                     \
    sk::mend_expanded<sk::type>(w, x, bias, y, m, n, k);                                 \
  }                                                                                      \
  SK_KERNEL(name)

SK_EXPAND_MEND(sk_expand_mend_bf16, bf16)
SK_EXPAND_MEND(sk_expand_mend_f16, f16)

extern "C" __global__ void sk_expand_pairs(const unsigned* words, const int* steps,
                                           unsigned short* w, int k, int slices, int row_steps) {
  sk::expand_pairs(words, steps, w, k, slices, row_steps);
}
SK_KERNEL(sk_expand_pairs)

#define SK_EXPAND(name, bits)                                                                   \
  extern "C" __global__ void name(const unsigned short* values, const unsigned char* deltas,    \
                                  const int* bounds, const int* slice_of, const int* starts,    \
                                  const int* row_order, unsigned short* w, int k, int pieces) { \
    sk::expand<bits>(values, deltas, bounds, slice_of, starts, row_order, w, k, pieces);        \
  }                                                                                             \
  SK_KERNEL(name)

SK_EXPAND(sk_expand_d4, 4)
SK_EXPAND(sk_expand_d8, 8)

extern "C" __global__ void sk_expand_cover(const unsigned char* records, const int* steps,
                                           const int* row_order, unsigned short* w, int k,
                                           int slices, int windows) {
  sk::expand_cover(records, steps, row_order, w, k, slices, windows);
}
SK_KERNEL(sk_expand_cover)
