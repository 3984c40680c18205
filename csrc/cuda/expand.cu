// W [N, K] dense, from packed W, for products of many tokens. `w` is zero before.
#include "cover.cuh"
#include "launch.cuh"
#include "pairs.cuh"
#include "stream.cuh"

namespace sk {

constexpr int kExpandWarps = 8;

// Delta streams: a warp writes a piece, lane r of row r.
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
      if (value & 0x7fff) out[column + odd] = value;  // both zeros are steps
    }
  }
}

// A cover: a warp writes a tile, a lane its values.
__device__ inline void expand_cover(const unsigned char* records, const int* steps,
                                    const int* row_order, unsigned short* w, int k, int slices,
                                    int windows) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int tile = blockIdx.x * kExpandWarps + threadIdx.x / kWarp;
  if (tile >= slices * windows) return;
  for (int step = steps[tile]; step < steps[tile + 1]; ++step) {
    const unsigned char* record = records + static_cast<long long>(step) * Record::kBytes;
    const auto values = reinterpret_cast<const unsigned short*>(record);
    for (int i = 0; i < 8; ++i) {  // registers a0 .. a3 of rows 0-15, then of rows 16-31
      const int half = i % 2, group = i / 2 % 2 * 4 + t, bit = t * 4 + half * 2;
      const int row = row_order[tile / windows * kWarp + i / 4 * 16 + half * 8 + g];
      const unsigned char* positions =
          record + Record::kPositionsAt + (g * 4 + i / 4 * 2 + i / 2 % 2) * 2;
      const int slot = group * 4 + (positions[bit / 8] >> bit % 8 & 3);
      const int col = tile % windows * kCoverColumns + record[Record::kColumnsAt + slot];
      const unsigned short value = values[lane * 8 + i];
      if (value & 0x7fff) w[static_cast<long long>(row) * k + col] = value;
    }
  }
}

// Pairs: a warp writes a step, a lane its words.
__device__ inline void expand_pairs(const unsigned* words, const int* steps, unsigned short* w,
                                    int k, int slices, int row_steps) {
  const int lane = threadIdx.x % kWarp;
  const int step = blockIdx.x * kExpandWarps + threadIdx.x / kWarp;
  if (step >= slices * row_steps) return;
  const unsigned* head = words + steps[step];
  const unsigned mask = head[lane];
  const int start = lane ? reinterpret_cast<const unsigned short*>(head + kWarp)[lane] : 0;
  const unsigned* values = head + kHeadWords + start / 4;
  for (int slot = 0; slot < kSlots; ++slot) {
    if (!(mask >> (slot % 4 * 8 + slot / 4 + 2) % 32 & 1)) continue;
    const unsigned pair = *values++;
    const int row = step / row_steps * kWarp + slot / 4 % 2 * 16 + slot % 2 * 8 + lane / 4;
    const int col =
        step % row_steps * kStepColumns + slot / 8 * 16 + slot % 4 / 2 * 8 + lane % 4 * 2;
    unsigned short* out = w + static_cast<long long>(row) * k + col;
    if (pair & 0x7fffu) out[0] = static_cast<unsigned short>(pair);
    if (pair & 0x7fff0000u) out[1] = static_cast<unsigned short>(pair >> 16);
  }
}

}  // namespace sk

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
