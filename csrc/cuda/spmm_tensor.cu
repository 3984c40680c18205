// y[M, N] = x[M, K] @ W[N, K]^T + bias[N] for M <= 64 tokens on tensor cores, W packed as
// stream.cuh says.
//
// A warp writes its slice of 32 rows out, window by window, into a ring of two windows in shared
// memory, and multiplies each complete window by mma.m16n8k16. Lane r stores row r:
//
//   address of (row, column) = line * 256 + (the warp's half of its pair) * 128 + row * 4
//                              + (column & 1) * 2,   line = column / 2 mod 128 (two windows)
//
// so a bank belongs to a row and stores never conflict. The order of columns inside a product is
// free if x has the same: lane (g, t) of a fragment takes lines 16 t .. 16 t + 15. It loads rows g,
// g + 8, g + 16 and g + 24 of a line in an order that begins at its t, again without conflict, and
// then turns the four registers round. Four warps share x, which cp.async brings a window ahead.
// Reading and clearing the ring is 4 bytes an element of W whatever its sparsity: that, and the
// stores, are the limit of this kernel beside memory.
//
// Blocks that share four slices leave their sums in `partial`, and the last one to arrive adds them
// up in a fixed order.
#include "launch.cuh"
#include "stream.cuh"

namespace sk {

constexpr int kTensorWarps = 4;
#ifndef AHEAD_T
#define AHEAD_T 4
#endif
constexpr int kTensorAhead = AHEAD_T;
constexpr int kRingBytes = 2 * 2 * kLines * 256;  // two pairs of warps, two windows
constexpr int kChunk = 8;                         // 16-bit elements that cp.async copies at once
constexpr int kRowChunks = kWindow / kChunk;      // of one token in a window

template <class T>
__device__ inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                           unsigned b0, unsigned b1);

template <>
__device__ inline void mma<bf16>(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                 unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma<f16>(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Stores the low and the high half of `pair` where they are not zero. f16's comparison serves every
// 16-bit float: both zeros, and nothing else, equal zero.
__device__ inline void store_pair(unsigned low_address, unsigned high_address, unsigned pair) {
  asm volatile(
      "{\n"
      ".reg .pred p, q;\n"
      ".reg .b16 lo, hi;\n"
      "mov.b32 {lo, hi}, %2;\n"
      "setp.neu.f16x2 p|q, %2, %3;\n"
      "@p st.shared.b16 [%0], lo;\n"
      "@q st.shared.b16 [%1], hi;\n"
      "}"
      :
      : "r"(low_address), "r"(high_address), "r"(pair), "r"(0)
      : "memory");
}

// The ring of a warp, as its lanes see it while they store.
struct Ring {
  unsigned middle;  // shared address between the two pairs' rings
  unsigned pair;    // 0x80808080 for the first pair: addresses below the middle
  unsigned lane;    // the low byte of the lane's addresses, four times

  // Four low bytes. halves: bit 1 of each byte, the column's parity.
  __device__ unsigned low_bytes(unsigned halves) const { return lane | (halves & 0x02020202u); }
  // Byte i of `low` below byte i of `lines`, which is signed.
  __device__ unsigned address(unsigned lines, unsigned low, int i) const {
    unsigned offset;  // not by __byte_perm, which promises nothing about signs
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(offset) : "r"(low), "r"(lines), "r"(0xcc40 + i * 0x1111));
    return middle + offset;
  }
};

template <int kBits>
struct Position;

template <>
struct Position<4> {
  unsigned lines;  // the line of the last entry, in each byte

  __device__ void begin(int line) { lines = (line & 127) * 0x01010101u; }

  __device__ void store(const Ring& ring, const Granule<4>& g) {
    const unsigned d = g.deltas, e = d >> 4;
    const unsigned first = ((d & 0x07070707u) * 0x01010101u + lines) & 0x7f7f7f7fu;
    const unsigned second =
        ((e & 0x07070707u) * 0x01010101u + __byte_perm(first, 0, 0x3333)) & 0x7f7f7f7fu;
    lines = __byte_perm(second, 0, 0x3333);
    const unsigned low[2] = {ring.low_bytes(d >> 2), ring.low_bytes(e >> 2)};
    const unsigned high[2] = {first | ring.pair, second | ring.pair};
#pragma unroll
    for (int i = 0; i < kGranule; i += 2) {
      store_pair(ring.address(high[i / 4], low[i / 4], i % 4),
                 ring.address(high[i / 4], low[i / 4], i % 4 + 1), word(g.values, i / 2));
    }
  }
};

template <>
struct Position<8> {
  unsigned column;  // of the last entry, mod 256

  __device__ void begin(int line) { column = (line & 127) * 2; }

  __device__ void store(const Ring& ring, const Granule<8>& g) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const unsigned d = j ? g.deltas.y : g.deltas.x;
      // Prefix sums of four bytes mod 256, two in each half word.
      const unsigned even = d & 0x00ff00ffu, odd = (d >> 8) & 0x00ff00ffu;
      const unsigned pairs = (even + odd) * 0x00010001u;  // entries 1, 3: sums of 2 and of 4
      const unsigned start = column * 0x00010001u;
      const unsigned at_odd = (pairs + start) & 0x00ff00ffu;
      const unsigned at_even = (pairs + start - odd) & 0x00ff00ffu;
      const unsigned columns = at_even | (at_odd << 8);
      column = at_odd >> 16;
      const unsigned lines = (columns >> 1) & 0x7f7f7f7fu;
      const unsigned low = ring.low_bytes(columns << 1);
      const unsigned high = lines | ring.pair;
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        store_pair(ring.address(high, low, i), ring.address(high, low, i + 1),
                   word(g.values, 2 * j + i / 2));
      }
    }
  }
};

// Columns [begin, begin + 128) of x, kNTiles * 8 tokens, to shared memory: chunks of 8 columns,
// swizzled so that the loads of `multiply_window` meet no conflict. Zeros beyond M and K.
template <int kNTiles>
__device__ inline void stage_window(unsigned to, const unsigned short* x, int tokens, int k,
                                    int begin, bool aligned) {
#pragma unroll
  for (int j = 0; j < kNTiles; ++j) {
    const int i = j * kTensorWarps * kWarp + threadIdx.x;
    const int token = i / kRowChunks, chunk = i % kRowChunks;
    const unsigned at =
        to + (token * kRowChunks + (chunk ^ ((chunk >> 3) << 1) ^ (token & 1))) * 16;
    const int col = begin + chunk * kChunk;
    const unsigned short* from = x + static_cast<long long>(token) * k + col;
    if (aligned) {
      const bool there = token < tokens && col < k;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                   :
                   : "r"(at), "l"(there ? from : x), "r"(there ? 16 : 0)
                   : "memory");
    } else {
      unsigned pairs[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const unsigned lo = token < tokens && col + 2 * c < k ? from[2 * c] : 0;
        const unsigned hi = token < tokens && col + 2 * c + 1 < k ? from[2 * c + 1] : 0;
        pairs[c] = lo | hi << 16;
      }
      asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};"
                   :
                   : "r"(at), "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
                   : "memory");
    }
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}

__device__ inline uint4 load_shared(unsigned address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ inline unsigned load_shared_word(unsigned address) {
  unsigned v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ inline void clear_shared(unsigned address) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%1,%1,%1};" : : "r"(address), "r"(0) : "memory");
}

// Rows g, g + 8, g + 16, g + 24 of a line, as lane (g, t) of a fragment needs them.
__device__ inline void load_rows(unsigned (&rows)[4], const unsigned (&address)[4], int offset,
                                 int t) {
  unsigned turned[4];
#pragma unroll
  for (int s = 0; s < 4; ++s) turned[s] = load_shared_word(address[s] + offset);
  unsigned half[4];
#pragma unroll
  for (int b = 0; b < 4; ++b) half[b] = t & 1 ? turned[(b + 3) % 4] : turned[b];
#pragma unroll
  for (int b = 0; b < 4; ++b) rows[b] = t & 2 ? half[(b + 2) % 4] : half[b];
}

// acc += the window's columns of W times those of x; leaves the window's ring empty.
template <class T, int kNTiles>
__device__ inline void multiply_window(float (&acc)[2][kNTiles][4], unsigned ring_window,
                                       unsigned x_window) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  unsigned address[4];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    address[s] = ring_window + t * 16 * 256 + ((s + t) % 4 * 8 + g) * 4;
  }
  const unsigned x_lane = x_window + g * kRowChunks * 16;
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    uint4 b[kNTiles];
#pragma unroll
    for (int j = 0; j < kNTiles; ++j) {
      const int chunk = t * 4 + i / 4;
      b[j] = load_shared(x_lane + j * 8 * kRowChunks * 16 +
                         (chunk ^ ((chunk >> 3) << 1) ^ (g & 1)) * 16);
    }
#pragma unroll
    for (int s = 0; s < 4; s += 2) {
      unsigned low[4], high[4];
      load_rows(low, address, (i + s) * 256, t);
      load_rows(high, address, (i + s + 1) * 256, t);
#pragma unroll
      for (int j = 0; j < kNTiles; ++j) {
        mma<T>(acc[0][j], low[0], low[1], high[0], high[1], word(b[j], s), word(b[j], s + 1));
        mma<T>(acc[1][j], low[2], low[3], high[2], high[3], word(b[j], s), word(b[j], s + 1));
      }
    }
  }
  __syncwarp();
  const unsigned mine = ring_window + lane / 8 * 256 + lane % 8 * 16;
#pragma unroll
  for (int i = 0; i < kLines; i += 4) clear_shared(mine + i * 256);
  __syncwarp();
}

template <class T, int kBits, int kNTiles>
__device__ void spmm_tensor(const uint4* values, const typename Deltas<kBits>::Word* deltas,
                            const int* offsets, const unsigned short* counts, const int* row_order,
                            const unsigned short* x, const unsigned short* bias, unsigned short* y,
                            float* partial, int* arrived, int tokens, int n, int k, int slices,
                            int parts) {
  extern __shared__ __align__(128) char smem[];
  const unsigned base = static_cast<unsigned>(__cvta_generic_to_shared(smem));
  constexpr int kXBytes = kNTiles * 8 * kWindow * 2;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = blockIdx.x / parts, part = blockIdx.x % parts;
  const int slice = group * kTensorWarps + warp;
  const int windows = (k + kWindow - 1) / kWindow;
  const int first = part_window(part, parts, windows);
  const int last = part_window(part + 1, parts, windows);
  const bool aligned = k % kChunk == 0 && reinterpret_cast<unsigned long long>(x) % 16 == 0;

  int g = 0, end = 0;
  if (slice < slices) {
    g = offsets[slice * parts + part];
    end = offsets[slice * parts + part + 1];
  }
  Granule<kBits> ahead[kTensorAhead];
#pragma unroll
  for (int i = 0; i < kTensorAhead; ++i) {
    if (g + i < end) ahead[i] = load_granule<kBits>(values, deltas, g + i, lane);
  }
  const unsigned x_base = base + kRingBytes;
  stage_window<kNTiles>(x_base + (first & 1) * kXBytes, x, tokens, k, first * kWindow, aligned);
  for (int i = threadIdx.x; i < kRingBytes / 16; i += kTensorWarps * kWarp) {
    clear_shared(base + i * 16);
  }

  Ring ring;
  ring.middle = base + kRingBytes / 2;
  ring.pair = warp < 2 ? 0x80808080u : 0u;
  ring.lane = (lane * 4 + warp % 2 * 128) * 0x01010101u;
  const unsigned my_ring = base + warp / 2 * (kRingBytes / 2) + warp % 2 * 128;
  Position<kBits> position;
  position.begin(first * kLines);
  float acc[2][kNTiles][4] = {};

  int w = first - 1;  // the window that is being filled
  int left = 0;       // granules until it is complete
  while (w < last) {
#pragma unroll
    for (int i = 0; i < kTensorAhead; ++i) {  // ahead[i] stays in its registers
      while (left == 0 && w < last) {
        if (w >= first) {
          __syncwarp();
          multiply_window<T, kNTiles>(acc, my_ring + (w & 1) * kLines * 256,
                                      x_base + (w & 1) * kXBytes);
        }
        if (++w == last) break;
        if (slice < slices) left = counts[slice * windows + w];
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();  // x of window w has come, and nobody reads that of w - 1 any more
        if (w + 1 < last) {
          stage_window<kNTiles>(x_base + ((w + 1) & 1) * kXBytes, x, tokens, k, (w + 1) * kWindow,
                                aligned);
        }
      }
      if (w < last) {
        position.store(ring, ahead[i]);
        if (g + kTensorAhead < end) {
          ahead[i] = load_granule<kBits>(values, deltas, g + kTensorAhead, lane);
        }
        ++g;
        --left;
      }
    }
  }

  if (parts > 1) {
    constexpr int kSums = 2 * kNTiles * 4;
    const long long group_sums = static_cast<long long>(kTensorWarps) * kSums * kWarp;
    float* all = partial + group * parts * group_sums + warp * kSums * kWarp + lane;
    float* mine = all + part * group_sums;
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      mine[i * kWarp] = acc[i / (4 * kNTiles)][i / 4 % kNTiles][i % 4];
    __threadfence();
    __syncthreads();
    __shared__ int before;
    if (threadIdx.x == 0) before = atomicAdd(arrived + group, 1);
    __syncthreads();
    if (before != parts - 1) return;
    __threadfence();
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[i / (4 * kNTiles)][i / 4 % kNTiles][i % 4] = 0.0f;
    for (int p = 0; p < parts; ++p) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        acc[i / (4 * kNTiles)][i / 4 % kNTiles][i % 4] += __ldcg(all + p * group_sums + i * kWarp);
      }
    }
    if (threadIdx.x == 0) arrived[group] = 0;  // for the next launch
  }

  if (slice >= slices) return;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    const int row = row_order[slice * kWarp + b * 8 + lane / 4];
    if (row < 0) continue;
    const float add = bias ? Convert<T>::low(bias[row]) : 0.0f;
#pragma unroll
    for (int j = 0; j < kNTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = j * 8 + lane % 4 * 2 + i;
        const float sum = acc[b / 2][j][b % 2 * 2 + i] + add;
        if (token < tokens) y[static_cast<long long>(token) * n + row] = Convert<T>::round(sum);
      }
    }
  }
}

}  // namespace sk

#define SK_TENSOR(name, type, bits, tiles, ctas)                                                   \
  extern "C" __global__ void __launch_bounds__(sk::kTensorWarps* sk::kWarp, ctas)                  \
      name(const uint4* values, const void* deltas, const int* offsets,                            \
           const unsigned short* counts, const int* row_order, const unsigned short* x,            \
           const unsigned short* bias, unsigned short* y, float* partial, int* arrived, int m,     \
           int n, int k, int slices, int parts) {                                                  \
    sk::spmm_tensor<sk::type, bits, tiles>(                                                        \
        values, static_cast<const sk::Deltas<bits>::Word*>(deltas), offsets, counts, row_order, x, \
        bias, y, partial, arrived, m, n, k, slices, parts);                                        \
  }                                                                                                \
  SK_KERNEL(name)

#define SK_TENSOR_TOKENS(type, bits)                                 \
  SK_TENSOR(sk_spmm_tensor_##type##_d##bits##_t8, type, bits, 1, 3)  \
  SK_TENSOR(sk_spmm_tensor_##type##_d##bits##_t16, type, bits, 2, 3) \
  SK_TENSOR(sk_spmm_tensor_##type##_d##bits##_t32, type, bits, 4, 2) \
  SK_TENSOR(sk_spmm_tensor_##type##_d##bits##_t64, type, bits, 8, 2)

SK_TENSOR_TOKENS(bf16, 4)
SK_TENSOR_TOKENS(bf16, 8)
SK_TENSOR_TOKENS(f16, 4)
SK_TENSOR_TOKENS(f16, 8)
