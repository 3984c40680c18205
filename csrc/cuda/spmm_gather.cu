// y[M, N] = x[M, K] @ W[N, K]^T + bias[N] for M <= 8 tokens, W packed as stream.cuh says.
//
// A warp takes a part of a slice of 32 rows, lane r the row r. A block of eight warps takes
// `block_parts` neighbouring parts of 8 / block_parts slices. x of these parts lies in shared
// memory, [column][token]; for each entry a lane gathers x at its column and multiplies: about 8
// instructions an entry for one token. Products and sums in float32, in column order.
// Bytes: those of W, once; x once for each block. Faster than spmm_cover.cu where tokens are few
// and W is very sparse, and W takes the fewest bytes.
//
// Blocks that share a slice leave their sums in `partial`, and the last one to arrive adds them up
// in a fixed order, so that results do not depend on who was last.
#include "launch.cuh"
#include "stream.cuh"

namespace sk {

constexpr int kGatherWarps = 8;
constexpr int kGatherTokens = 8;  // the most
constexpr int kGatherDepth = 4;   // granules

// x at one column, kTokens of 16 bits, as floats times `value` added to acc.
template <class T, int kTokens>
__device__ inline void multiply(float (&acc)[kTokens], float value, const char* at) {
  using C = Convert<T>;
  if constexpr (kTokens == 1) {
    acc[0] = fmaf(value, C::low(*reinterpret_cast<const unsigned short*>(at)), acc[0]);
  } else if constexpr (kTokens == 2) {
    const unsigned pair = *reinterpret_cast<const unsigned*>(at);
    acc[0] = fmaf(value, C::low(pair), acc[0]);
    acc[1] = fmaf(value, C::high(pair), acc[1]);
  } else if constexpr (kTokens == 4) {
    const uint2 four = *reinterpret_cast<const uint2*>(at);
    acc[0] = fmaf(value, C::low(four.x), acc[0]);
    acc[1] = fmaf(value, C::high(four.x), acc[1]);
    acc[2] = fmaf(value, C::low(four.y), acc[2]);
    acc[3] = fmaf(value, C::high(four.y), acc[3]);
  } else {
#pragma unroll
    for (int j = 0; j < kTokens; j += 8) {
      const uint4 eight = *reinterpret_cast<const uint4*>(at + 2 * j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        acc[j + 2 * i] = fmaf(value, C::low(word(eight, i)), acc[j + 2 * i]);
        acc[j + 2 * i + 1] = fmaf(value, C::high(word(eight, i)), acc[j + 2 * i + 1]);
      }
    }
  }
}

// One granule. `at`: x at the column of the last entry (its pair of columns, for 4 bits); moves on.
template <class T, int kTokens>
__device__ inline void multiply_granule(float (&acc)[kTokens], const Granule<4>& g,
                                        const char*& at) {
  // Bytes of prefix sums, in units of 2 * kTokens bytes / 2: at most 2 * (2 * 7 * 8) + 2 = 226.
  const unsigned odd = g.deltas >> 4;
  const unsigned first = (g.deltas & 0x07070707u) * 0x04040404u;
  const unsigned second = (odd & 0x07070707u) * 0x04040404u + __byte_perm(first, 0, 0x3333);
  const unsigned steps[2] = {first | ((g.deltas >> 2) & 0x02020202u),
                             second | ((odd >> 2) & 0x02020202u)};
#pragma unroll
  for (int i = 0; i < kGranule; ++i) {
    const unsigned pair = word(g.values, i / 2);
    const float value = i % 2 ? Convert<T>::high(pair) : Convert<T>::low(pair);
    const unsigned step = __byte_perm(steps[i / 4], 0, 0x4440 + i % 4);
    if (value != 0.0f) multiply<T, kTokens>(acc, value, at + step * kTokens);
  }
  at += (second >> 24) * kTokens;
}

template <class T, int kTokens>
__device__ inline void multiply_granule(float (&acc)[kTokens], const Granule<8>& g,
                                        const char*& at) {
#pragma unroll
  for (int i = 0; i < kGranule; ++i) {
    const unsigned pair = word(g.values, i / 2);
    const float value = i % 2 ? Convert<T>::high(pair) : Convert<T>::low(pair);
    at += __byte_perm(i < 4 ? g.deltas.x : g.deltas.y, 0, 0x4440 + i % 4) * (2 * kTokens);
    if (value != 0.0f) multiply<T, kTokens>(acc, value, at);
  }
}

// x [tokens, K], columns [begin, end), to shared memory as [column][kTokens]; zeros where there is
// no token or no column. A thread turns round tiles of 4 columns.
template <int kTokens>
__device__ inline void stage(unsigned short* to, const unsigned short* x, int tokens, int k,
                             int begin, int end) {
  constexpr int kTile = kTokens < 8 ? kTokens : 8;  // tokens
  const bool aligned = k % 4 == 0 && reinterpret_cast<unsigned long long>(x) % 8 == 0;
  for (int col = begin + threadIdx.x * 4; col < end; col += kGatherWarps * kWarp * 4) {
#pragma unroll
    for (int first = 0; first < kTokens; first += kTile) {
      unsigned short tile[4 * kTile];  // [column][token]
#pragma unroll
      for (int t = 0; t < kTile; ++t) {
        const unsigned short* from = x + static_cast<long long>(first + t) * k + col;
        uint2 four = {0, 0};
        if (aligned && first + t < tokens && col < k) four = *reinterpret_cast<const uint2*>(from);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          tile[c * kTile + t] =
              static_cast<unsigned short>((c < 2 ? four.x : four.y) >> (c % 2 * 16));
          if (!aligned && first + t < tokens && col + c < k) tile[c * kTile + t] = from[c];
        }
      }
      unsigned short* out = to + (col - begin) * kTokens + first;
      unsigned pairs[2 * kTile];
#pragma unroll
      for (int i = 0; i < 2 * kTile; ++i) {
        pairs[i] = tile[2 * i] | static_cast<unsigned>(tile[2 * i + 1]) << 16;
      }
      if constexpr (kTile == 8) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          *reinterpret_cast<uint4*>(out + c * kTokens) = {pairs[4 * c], pairs[4 * c + 1],
                                                          pairs[4 * c + 2], pairs[4 * c + 3]};
        }
      } else {
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          reinterpret_cast<uint2*>(out)[i] = {pairs[2 * i], pairs[2 * i + 1]};
        }
      }
    }
  }
}

template <class T, int kBits, int kTokens>
__device__ void spmm_gather(const uint4* values, const typename Deltas<kBits>::Word* deltas,
                            const int* offsets, const int* row_order, const unsigned short* x,
                            const unsigned short* bias, unsigned short* y, float* partial,
                            int* arrived, int all_granules, int tokens, int n, int k, int slices,
                            int parts, int block_parts) {
  extern __shared__ __align__(16) char smem[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int splits = (parts + block_parts - 1) / block_parts;
  const int split = blockIdx.x % splits;
  const int slice = blockIdx.x / splits * (kGatherWarps / block_parts) + warp / block_parts;
  const int part = split * block_parts + warp % block_parts;
  const int panels = (k + kPanel - 1) / kPanel;
  const int col_begin = part_panel(split * block_parts, parts, panels) * kPanel;
  const int col_end = part_panel(min(parts, (split + 1) * block_parts), parts, panels) * kPanel;

  using Stream = Stream<kBits, kGatherDepth>;
  const bool has_work = slice < slices && part < parts;
  let_next_kernel_start();
  if (has_work) {
    const int* from = offsets + slice * parts + part;
    Stream::prefetch(values, deltas, all_granules, __ldcg(from), __ldcg(from + 1));
  }
  wait_for_last_kernel();
  const int row = slice < slices ? row_order[slice * kWarp + lane] : -1;
  int begin = 0, end = 0;
  if (has_work) {
    begin = offsets[slice * parts + part];
    end = offsets[slice * parts + part + 1];
  }
  Stream stream(shared_address(smem) + warp * Stream::kWarpBytes, values, deltas, begin, end);
  char* x_shared = smem + kGatherWarps * Stream::kWarpBytes;
  stage<kTokens>(reinterpret_cast<unsigned short*>(x_shared), x, tokens, k, col_begin, col_end);
  __syncthreads();

  float acc[kTokens] = {};
  const int first_col = part_panel(min(part, parts), parts, panels) * kPanel;
  const char* at = x_shared + (first_col - col_begin) * 2 * kTokens;
  for (int g = begin; g < end; ++g) {
    multiply_granule<T, kTokens>(acc, stream.front(), at);
    stream.advance();
  }

  // The warps of a slice add up, each for some of the tokens.
  __syncthreads();  // all streams have been read
  auto sums = reinterpret_cast<float (*)[kTokens][kWarp]>(smem);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) sums[warp][t][lane] = acc[t];
  __syncthreads();
  if (slice >= slices) return;
  const int first_warp = warp / block_parts * block_parts;
  const long long slice_sums = static_cast<long long>(slice) * splits * tokens * kWarp;
  const float add = bias && row >= 0 ? Convert<T>::low(bias[row]) : 0.0f;
  for (int t = warp % block_parts; t < tokens; t += block_parts) {
    float sum = 0.0f;
    for (int w = 0; w < block_parts; ++w) sum += sums[first_warp + w][t][lane];
    if (splits > 1) {
      float* all = partial + slice_sums + t * kWarp + lane;
      all[split * tokens * kWarp] = sum;
      __threadfence();
      __syncwarp();
      int before = 0;
      if (lane == 0) before = atomicAdd(arrived + slice * kGatherTokens + t, 1);
      if (__shfl_sync(kAllLanes, before, 0) != splits - 1) continue;
      __threadfence();
      sum = 0.0f;
#pragma unroll 8
      for (int s = 0; s < splits; ++s) sum += __ldcg(all + s * tokens * kWarp);
      if (lane == 0) arrived[slice * kGatherTokens + t] = 0;  // for the next launch
    }
    if (row >= 0) y[static_cast<long long>(t) * n + row] = Convert<T>::round(sum + add);
  }
}

}  // namespace sk

#define SK_GATHER(name, type, bits, tokens, ctas)                                                  \
  extern "C" __global__ void __launch_bounds__(sk::kGatherWarps* sk::kWarp, ctas)                  \
      name(const uint4* values, const void* deltas, const int* offsets, const int* row_order,      \
           const unsigned short* x, const unsigned short* bias, unsigned short* y, float* partial, \
           int* arrived, int m, int n, int k, int slices, int parts, int block_parts,              \
           int all_granules) {                                                                     \
    sk::spmm_gather<sk::type, bits, tokens>(                                                       \
        values, static_cast<const sk::Deltas<bits>::Word*>(deltas), offsets, row_order, x, bias,   \
        y, partial, arrived, all_granules, m, n, k, slices, parts, block_parts);                   \
  }                                                                                                \
  SK_EARLY_KERNEL(name)

#define SK_GATHER_TOKENS(type, bits)                                \
  SK_GATHER(sk_spmm_gather_##type##_d##bits##_t1, type, bits, 1, 4) \
  SK_GATHER(sk_spmm_gather_##type##_d##bits##_t2, type, bits, 2, 4) \
  SK_GATHER(sk_spmm_gather_##type##_d##bits##_t4, type, bits, 4, 4) \
  SK_GATHER(sk_spmm_gather_##type##_d##bits##_t8, type, bits, 8, 4)

SK_GATHER_TOKENS(bf16, 4)
SK_GATHER_TOKENS(bf16, 8)
SK_GATHER_TOKENS(f16, 4)
SK_GATHER_TOKENS(f16, 8)
