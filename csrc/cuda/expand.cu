// W [N, K] dense, from W packed as stream.cuh says, for products of more tokens than spmm_tensor.cu
// takes. `w` is zero before; a warp writes a part of a slice, lane r the row r.
#include "launch.cuh"
#include "stream.cuh"

namespace sk {

constexpr int kExpandWarps = 8;

template <int kBits>
__device__ void expand(const unsigned short* values, const unsigned char* deltas,
                       const int* offsets, const int* row_order, unsigned short* w, int k,
                       int slices, int parts) {
  const int lane = threadIdx.x % kWarp;
  const int stream = blockIdx.x * kExpandWarps + threadIdx.x / kWarp;
  if (stream >= slices * parts) return;
  const int row = row_order[stream / parts * kWarp + lane];
  if (row < 0) return;
  const int panels = (k + kPanel - 1) / kPanel;
  unsigned short* out = w + static_cast<long long>(row) * k;
  int column = part_panel(stream % parts, parts, panels) * kPanel;
  for (int g = offsets[stream]; g < offsets[stream + 1]; ++g) {
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

}  // namespace sk

#define SK_EXPAND(name, bits)                                                                  \
  extern "C" __global__ void name(const unsigned short* values, const unsigned char* deltas,   \
                                  const int* offsets, const int* row_order, unsigned short* w, \
                                  int k, int slices, int parts) {                              \
    sk::expand<bits>(values, deltas, offsets, row_order, w, k, slices, parts);                 \
  }                                                                                            \
  SK_KERNEL(name)

SK_EXPAND(sk_expand_d4, 4)
SK_EXPAND(sk_expand_d8, 8)
