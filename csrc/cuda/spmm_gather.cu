// y[M, N] = x[M, K] @ W[N, K]^T + bias[N] for M <= 16 tokens, W packed as stream.cuh says.
//
// A warp takes a part of a slice of 32 rows, lane r the row r. x of this part lies in shared
// memory, [column][token]; for each entry a lane gathers x at its column and multiplies: about 8
// instructions an entry for one token. Products and sums in float32, in column order.
// Bytes: those of W, once; x once for each 8 slices. Faster than spmm_tensor.cu where tokens are
// few or W is very sparse.
//
// Warps that share a slice leave their sums in `partial`, and the last one to arrive adds them up
// in a fixed order, so that results do not depend on who was last.
#include "launch.cuh"
#include "stream.cuh"

namespace sk {

constexpr int kGatherWarps = 8;
#ifndef AHEAD_G
#define AHEAD_G 4
#endif
constexpr int kGatherAhead = AHEAD_G;  // granules on their way from memory

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

// x [tokens, K], columns [begin, begin + count), to shared memory as [column][kTokens]; zeros where
// there is no token or no column.
template <int kTokens>
__device__ inline void stage(unsigned short* to, const unsigned short* x, int tokens, int k,
                             int begin, int count) {
  for (int i = threadIdx.x; i < count; i += kGatherWarps * kWarp) {
    const int col = begin + i;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const bool there = t < tokens && col < k;
      to[i * kTokens + t] = there ? x[static_cast<long long>(t) * k + col] : 0;
    }
  }
}

template <class T, int kBits, int kTokens>
__device__ void spmm_gather(const uint4* values, const typename Deltas<kBits>::Word* deltas,
                            const int* offsets, const int* row_order, const unsigned short* x,
                            const unsigned short* bias, unsigned short* y, float* partial,
                            int* arrived, int tokens, int n, int k, int slices, int parts) {
  extern __shared__ __align__(16) char smem[];
  const int lane = threadIdx.x % kWarp;
  const int slice = blockIdx.x / parts * kGatherWarps + threadIdx.x / kWarp;
  const int part = blockIdx.x % parts;
  const int windows = (k + kWindow - 1) / kWindow;
  const int col_begin = part_window(part, parts, windows) * kWindow;
  const int col_end = part_window(part + 1, parts, windows) * kWindow;

  // The first granules come while x is staged.
  int g = 0, end = 0;
  if (slice < slices) {
    g = offsets[slice * parts + part];
    end = offsets[slice * parts + part + 1];
  }
  Granule<kBits> ahead[kGatherAhead];
#pragma unroll
  for (int i = 0; i < kGatherAhead; ++i) {
    if (g + i < end) ahead[i] = load_granule<kBits>(values, deltas, g + i, lane);
  }
  stage<kTokens>(reinterpret_cast<unsigned short*>(smem), x, tokens, k, col_begin,
                 col_end - col_begin);
  __syncthreads();
  if (slice >= slices) return;

  float acc[kTokens] = {};
  const char* at = smem;
  while (g < end) {
#pragma unroll
    for (int i = 0; i < kGatherAhead; ++i) {  // ahead[i] stays in its registers
      if (g + i < end) {
        multiply_granule<T, kTokens>(acc, ahead[i], at);
        if (g + i + kGatherAhead < end) {
          ahead[i] = load_granule<kBits>(values, deltas, g + i + kGatherAhead, lane);
        }
      }
    }
    g += kGatherAhead;
  }

  if (parts > 1) {
    float* all = partial + static_cast<long long>(slice) * parts * kTokens * kWarp + lane;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t < tokens) all[(part * kTokens + t) * kWarp] = acc[t];
    }
    __threadfence();
    __syncwarp();
    int before = 0;
    if (lane == 0) before = atomicAdd(arrived + slice, 1);
    if (__shfl_sync(kAllLanes, before, 0) != parts - 1) return;
    __threadfence();
#pragma unroll
    for (int t = 0; t < kTokens; ++t) acc[t] = 0.0f;
    for (int p = 0; p < parts; ++p) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t < tokens) acc[t] += __ldcg(all + (p * kTokens + t) * kWarp);
      }
    }
    if (lane == 0) arrived[slice] = 0;  // for the next launch
  }

  const int row = row_order[slice * kWarp + lane];
  if (row < 0) return;
  const float add = bias ? Convert<T>::low(bias[row]) : 0.0f;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t < tokens) y[static_cast<long long>(t) * n + row] = Convert<T>::round(acc[t] + add);
  }
}

}  // namespace sk

#define SK_GATHER(name, type, bits, tokens, ctas)                                                  \
  extern "C" __global__ void __launch_bounds__(sk::kGatherWarps* sk::kWarp, ctas)                  \
      name(const uint4* values, const void* deltas, const int* offsets, const int* row_order,      \
           const unsigned short* x, const unsigned short* bias, unsigned short* y, float* partial, \
           int* arrived, int m, int n, int k, int slices, int parts) {                             \
    sk::spmm_gather<sk::type, bits, tokens>(                                                       \
        values, static_cast<const sk::Deltas<bits>::Word*>(deltas), offsets, row_order, x, bias,   \
        y, partial, arrived, m, n, k, slices, parts);                                              \
  }                                                                                                \
  SK_KERNEL(name)

#define SK_GATHER_TOKENS(type, bits)                                \
  SK_GATHER(sk_spmm_gather_##type##_d##bits##_t1, type, bits, 1, 4) \
  SK_GATHER(sk_spmm_gather_##type##_d##bits##_t2, type, bits, 2, 4) \
  SK_GATHER(sk_spmm_gather_##type##_d##bits##_t4, type, bits, 4, 4) \
  SK_GATHER(sk_spmm_gather_##type##_d##bits##_t8, type, bits, 8, 4) \
  SK_GATHER(sk_spmm_gather_##type##_d##bits##_t16, type, bits, 16, 3)

SK_GATHER_TOKENS(bf16, 4)
SK_GATHER_TOKENS(bf16, 8)
SK_GATHER_TOKENS(f16, 4)
SK_GATHER_TOKENS(f16, 8)
