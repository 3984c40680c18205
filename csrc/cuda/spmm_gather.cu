// y[M, N] = x[M, K] @ W[N, K]^T + bias[N] for M <= 8 tokens, W packed as gather.cuh says.
//
// A warp takes a piece of a slice of 32 rows, lane r the row r, and a block 16 neighbouring
// pieces. x lies in shared memory, [column][token]; for each entry a lane gathers x at its column
// and multiplies: about 8 instructions an entry for one token. Products and sums in float32, in
// column order. Bytes: those of W, once; x once for each block. Faster than spmm_cover.cu where
// tokens are few, and W takes the fewest bytes.
//
// Blocks that share a slice leave their sums in `partial`, and the last one to arrive adds them up
// in a fixed order, so that results do not depend on who was last.
#include "gather.cuh"
#include "launch.cuh"

namespace sk {

constexpr int kGatherWarps = 16;
constexpr int kGatherDepth = 4;  // granules

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
template <class V, int kTokens>
__device__ inline void multiply_granule(float (&acc)[kTokens], const Granule<V, 4>& g,
                                        const char*& at) {
  using X = typename Stored<V>::X;
#pragma unroll
  for (int octet = 0; octet < kEntries<V>; octet += 8) {
    // Bytes of prefix sums, in units of 2 * kTokens bytes / 2: at most 2 * (2 * 7 * 8) + 2 = 226.
    const unsigned even = word(g.deltas, octet / 8), odd = even >> 4;
    const unsigned first = (even & 0x07070707u) * 0x04040404u;
    const unsigned second = (odd & 0x07070707u) * 0x04040404u + __byte_perm(first, 0, 0x3333);
    const unsigned steps[2] = {first | ((even >> 2) & 0x02020202u),
                               second | ((odd >> 2) & 0x02020202u)};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float value = Stored<V>::value(g.values, octet + i);
      const unsigned step = __byte_perm(steps[i / 4], 0, 0x4440 + i % 4);
      if (is_stored(value)) multiply<X, kTokens>(acc, value, at + step * kTokens);
    }
    at += (second >> 24) * kTokens;
  }
}

template <class V, int kTokens>
__device__ inline void multiply_granule(float (&acc)[kTokens], const Granule<V, 8>& g,
                                        const char*& at) {
#pragma unroll
  for (int i = 0; i < kEntries<V>; ++i) {
    const float value = Stored<V>::value(g.values, i);
    at += __byte_perm(word(g.deltas, i / 4), 0, 0x4440 + i % 4) * (2 * kTokens);
    if (is_stored(value)) multiply<typename Stored<V>::X, kTokens>(acc, value, at);
  }
}

// x [tokens, K] to shared memory as [column][kTokens]; zeros where there is no token or no column.
// A thread turns round tiles of 4 columns.
template <int kTokens>
__device__ inline void stage(unsigned short* to, const unsigned short* x, int tokens, int k) {
  constexpr int kTile = kTokens < 8 ? kTokens : 8;  // tokens
  const bool aligned = k % 4 == 0 && reinterpret_cast<unsigned long long>(x) % 8 == 0;
  for (int col = threadIdx.x * 4; col < k; col += kGatherWarps * kWarp * 4) {
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
      unsigned short* out = to + col * kTokens + first;
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

template <class V, int kBits, int kTokens>
__device__ void spmm_gather(const uint4* values, const Deltas<V, kBits>* deltas, const int* bounds,
                            const int* slice_of, const int* first_piece, const int* starts,
                            const int* row_order, const float* scales, const unsigned short* x,
                            const unsigned short* bias, unsigned short* y, float* partial,
                            int* arrived, int tokens, int n, int k, int pieces, int all_granules) {
  using X = typename Stored<V>::X;
  extern __shared__ __align__(16) char smem[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int block = static_cast<int>(blockIdx.x), first_here = block * kGatherWarps;
  const int piece = first_here + warp;
  using Granules = Granules<V, kBits, kGatherDepth>;
  let_next_kernel_start();
  // While the last kernel runs, which may be about to write the bounds, they are a guess.
  const Range all = {0, all_granules};
  Range guess = {0, 0}, range = {0, 0};
  if (piece < pieces) {
    guess = within(all, {__ldcg(bounds + piece), __ldcg(bounds + piece + 1)});
    Granules::prefetch(values, deltas, guess);
  }
  wait_for_last_kernel();
  Granules granules(shared_address(smem) + warp * Granules::kWarpBytes, values, deltas, guess);
  int slice = 0, start = 0;
  if (piece < pieces) {
    range = {__ldcg(bounds + piece), __ldcg(bounds + piece + 1)};
    slice = slice_of[piece];
    start = starts[piece * kWarp + lane];
  }
  char* x_shared = smem + kGatherWarps * Granules::kWarpBytes;
  stage<kTokens>(reinterpret_cast<unsigned short*>(x_shared), x, tokens, k);
  const int row = row_order[slice * kWarp + lane];
  const int first = first_piece[slice], last = first_piece[slice + 1] - 1;
  if (kStartsEarly && range != guess) granules.begin_again(values, deltas, range);
  __syncthreads();

  float acc[kTokens] = {};
  const char* at = x_shared + start * 2 * kTokens;
  for (int g = range.begin; g < range.end; ++g) {
    multiply_granule<V, kTokens>(acc, granules.front(), at);
    granules.advance();
  }

  // The warp that has the first piece of a slice here adds up those of this block.
  __syncthreads();  // all granules have been read
  auto sums = reinterpret_cast<float (*)[kTokens][kWarp]>(smem);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) sums[warp][t][lane] = acc[t];
  __syncthreads();
  if (piece >= pieces || piece != max(first, first_here)) return;
  const int here = min(last - first_here, kGatherWarps - 1) - warp + 1;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    for (int w = 1; w < here; ++w) acc[t] += sums[warp + w][t][lane];
  }

  const int first_block = first / kGatherWarps;
  const int shares = last / kGatherWarps - first_block + 1;
  if (shares > 1) {
    // Of a slice that began in another block, and of one that begins here: two places a block.
    constexpr int kPlace = kTokens * kWarp;
    const int share = block - first_block;
    float* mine = partial + (2 * block + (share == 0)) * kPlace + lane;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) mine[t * kWarp] = acc[t];
    __threadfence();
    __syncwarp();
    int before = 0;
    if (lane == 0) before = atomicAdd(arrived + slice, 1);
    if (__shfl_sync(kAllLanes, before, 0) != shares - 1) return;
    __threadfence();
#pragma unroll
    for (int t = 0; t < kTokens; ++t) acc[t] = 0.0f;
    for (int s = 0; s < shares; ++s) {
      const float* theirs = partial + (2 * (first_block + s) + (s == 0)) * kPlace + lane;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) acc[t] += __ldcg(theirs + t * kWarp);
    }
    if (lane == 0) arrived[slice] = 0;  // for the next launch
  }
  if (row < 0) return;
  const float add = bias ? Convert<X>::low(bias[row]) : 0.0f;
  const float scale = scale_of<V>(scales, row);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t >= tokens) continue;
    y[static_cast<long long>(t) * n + row] = Convert<X>::round(fmaf(acc[t], scale, add));
  }
}

}  // namespace sk

#define SK_GATHER(name, type, bits, tokens, ctas)                                                  \
  extern "C" __global__ void __launch_bounds__(sk::kGatherWarps* sk::kWarp, ctas)                  \
      name(const uint4* values, const void* deltas, const int* bounds, const int* slice_of,        \
           const int* first_piece, const int* starts, const int* row_order, const float* scales,   \
           const unsigned short* x, const unsigned short* bias, unsigned short* y, float* partial, \
           int* arrived, int m, int n, int k, int pieces, int all_granules) {                      \
    sk::spmm_gather<sk::type, bits, tokens>(                                                       \
        values, static_cast<const sk::Deltas<sk::type, bits>*>(deltas), bounds, slice_of,          \
        first_piece, starts, row_order, scales, x, bias, y, partial, arrived, m, n, k, pieces,     \
        all_granules);                                                                             \
  }                                                                                                \
  SK_EARLY_KERNEL(name)

#define SK_GATHER_TOKENS(type, bits)                                \
  SK_GATHER(sk_spmm_gather_##type##_d##bits##_t1, type, bits, 1, 2) \
  SK_GATHER(sk_spmm_gather_##type##_d##bits##_t2, type, bits, 2, 2) \
  SK_GATHER(sk_spmm_gather_##type##_d##bits##_t4, type, bits, 4, 2) \
  SK_GATHER(sk_spmm_gather_##type##_d##bits##_t8, type, bits, 8, 2)

#define SK_GATHER_BITS(type) \
  SK_GATHER_TOKENS(type, 4)  \
  SK_GATHER_TOKENS(type, 8)

SK_GATHER_BITS(bf16)
SK_GATHER_BITS(f16)
SK_GATHER_BITS(int8)
SK_GATHER_BITS(e4m3)
