// y[M, N] = x[M, K] @ W[N, K]^T + bias[N] for M <= 64 tokens on tensor cores, W packed as
// stream.cuh says.
//
// A warp writes its slice of 32 rows out, window by window, into a ring of four windows of 32
// columns in shared memory, and multiplies each complete window by mma.m16n8k16. Lane r stores row
// r:
//
//   address of (row, column) = line * 256 + (the warp's half of its pair) * 128 + row * 4
//                              + (column & 1) * 2,   line = column / 2 mod 64
//
// so a bank belongs to a row, and stores never conflict. The order of columns inside a product is
// free if x has the same: lane (g, t) of a fragment takes lines 4 t .. 4 t + 3 of a window. It
// loads rows g, g + 8, g + 16 and g + 24 of a line in an order that begins at its t, so again
// without conflict, and then turns the four registers round. Four warps share a panel of x. Small
// rings let many warps hide one another's latencies: with windows of 128 columns, half as many
// warps took 1.6 times as long.
//
// Blocks that share four slices leave their sums in `partial`, and the last one to arrive adds them
// up in a fixed order.
#include "launch.cuh"
#include "stream.cuh"

namespace sk {

constexpr int kTensorWarps = 4;
constexpr int kBlockRows = kTensorWarps * kWarp;
constexpr int kTensorDepth = 3;      // granules
constexpr int kLines = kWindow / 2;  // of a window: pairs of columns
constexpr int kRingLines = kRing * kLines;
constexpr int kPairBytes = kRingLines * 256;  // the rings of two warps
constexpr int kChunk = 8;                     // 16-bit elements that cp.async copies at once
constexpr int kRowChunks = kPanel / kChunk;   // of one token in a panel

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
  unsigned pair;    // for the first pair, what makes its lines negative
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

constexpr unsigned kLineMask = (kRingLines - 1) * 0x01010101u;
static_assert(kRingLines == 64, "a line is 6 bits of a byte: sums of 8 deltas do not carry");

template <int kBits>
struct Position;

template <>
struct Position<4> {
  unsigned lines;  // the line of the last entry, in each byte

  __device__ void begin(int line) { lines = line % kRingLines * 0x01010101u; }

  __device__ void store(const Ring& ring, const Granule<4>& g) {
    const unsigned d = g.deltas, e = d >> 4;
    const unsigned first = ((d & 0x07070707u) * 0x01010101u + lines) & kLineMask;
    const unsigned second =
        ((e & 0x07070707u) * 0x01010101u + __byte_perm(first, 0, 0x3333)) & kLineMask;
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
  unsigned column;  // of the last entry, mod 128

  __device__ void begin(int line) { column = line % kRingLines * 2; }

  __device__ void store(const Ring& ring, const Granule<8>& g) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const unsigned d = j ? g.deltas.y : g.deltas.x;
      // Prefix sums of four bytes, two in each half word.
      const unsigned even = d & 0x00ff00ffu, odd = (d >> 8) & 0x00ff00ffu;
      const unsigned pairs = (even + odd) * 0x00010001u;  // entries 1, 3: sums of 2 and of 4
      const unsigned start = column * 0x00010001u;
      const unsigned at_odd = (pairs + start) & 0x007f007fu;
      const unsigned at_even = (pairs + start - odd) & 0x007f007fu;
      const unsigned columns = at_even | (at_odd << 8);
      column = at_odd >> 16;
      const unsigned lines = (columns >> 1) & kLineMask;
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

// Columns [begin, begin + 128) of x, kNTiles * 8 tokens, on their way to shared memory: chunks of 8
// columns, swizzled so that the loads of `multiply_window` meet no conflict. Zeros beyond M and K.
template <int kNTiles>
struct XPanel {
  uint4 chunks[kNTiles];

  __device__ void load(const unsigned short* x, int tokens, int k, int begin, bool aligned) {
#pragma unroll
    for (int j = 0; j < kNTiles; ++j) {
      const int i = j * kTensorWarps * kWarp + threadIdx.x;
      const int token = i / kRowChunks, col = begin + i % kRowChunks * kChunk;
      const unsigned short* from = x + static_cast<long long>(token) * k + col;
      chunks[j] = {0, 0, 0, 0};
      if (token >= tokens || col >= k) continue;
      if (aligned) {
        chunks[j] = *reinterpret_cast<const uint4*>(from);
      } else {
        unsigned short eight[kChunk];
#pragma unroll
        for (int c = 0; c < kChunk; ++c) eight[c] = col + c < k ? from[c] : 0;
        chunks[j] = {eight[0] | static_cast<unsigned>(eight[1]) << 16,
                     eight[2] | static_cast<unsigned>(eight[3]) << 16,
                     eight[4] | static_cast<unsigned>(eight[5]) << 16,
                     eight[6] | static_cast<unsigned>(eight[7]) << 16};
      }
    }
  }

  __device__ void store(unsigned to) const {
#pragma unroll
    for (int j = 0; j < kNTiles; ++j) {
      const int i = j * kTensorWarps * kWarp + threadIdx.x;
      const int token = i / kRowChunks, chunk = i % kRowChunks;
      const unsigned at = to + (token * kRowChunks + (chunk ^ (token & 1) * 4)) * 16;
      asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};"
                   :
                   : "r"(at), "r"(chunks[j].x), "r"(chunks[j].y), "r"(chunks[j].z), "r"(chunks[j].w)
                   : "memory");
    }
  }
};

__device__ inline uint4 load_shared(unsigned address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ inline void clear_shared(unsigned address) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%1,%1,%1};" : : "r"(address), "r"(0) : "memory");
}

__device__ inline unsigned load_shared_word(unsigned address) {
  unsigned v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
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

// acc += window `w` of the panel times x. rows[s]: the lane's first words of window 0 of the ring.
// Leaves the window empty.
template <class T, int kNTiles>
__device__ inline void multiply_window(float (&acc)[2][kNTiles][4], const unsigned (&rows)[4],
                                       unsigned ring, unsigned x_shared, int w) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int window = w * (kLines * 256);
  unsigned a[kWindow / 8][4];
#pragma unroll
  for (int i = 0; i < kWindow / 8; ++i) load_rows(a[i], rows, window + i * 256, t);
  const int chunk = w * 4 + t;
  const unsigned x_lane = x_shared + (g * kRowChunks + (chunk ^ (g & 1) * 4)) * 16;
#pragma unroll
  for (int j = 0; j < kNTiles; ++j) {
    const uint4 b = load_shared(x_lane + j * 8 * kRowChunks * 16);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      mma<T>(acc[0][j], a[i][0], a[i][1], a[i + 1][0], a[i + 1][1], word(b, i), word(b, i + 1));
      mma<T>(acc[1][j], a[i][2], a[i][3], a[i + 1][2], a[i + 1][3], word(b, i), word(b, i + 1));
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kLines; i += 4) {
    clear_shared(ring + window + (lane / 8 + i) * 256 + lane % 8 * 16);
  }
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
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int group = blockIdx.x / parts, part = blockIdx.x % parts;
  const int slice = group * kTensorWarps + warp;
  const int panels = (k + kPanel - 1) / kPanel;
  const int first = part_panel(part, parts, panels);
  const int last = part_panel(part + 1, parts, panels);
  const bool aligned = k % kChunk == 0 && reinterpret_cast<unsigned long long>(x) % 16 == 0;

  int begin = 0, end = 0;
  if (slice < slices) {
    begin = offsets[slice * parts + part];
    end = offsets[slice * parts + part + 1];
  }
  using Stream = Stream<kBits, kTensorDepth>;
  const unsigned x_shared = base + 2 * kPairBytes;
  Stream stream(x_shared + kNTiles * 8 * kPanel * 2 + warp * Stream::kWarpBytes, values, deltas,
                begin, end);
  XPanel<kNTiles> x_ahead;
  x_ahead.load(x, tokens, k, first * kPanel, aligned);
  for (int i = threadIdx.x; i < 2 * kPairBytes / 16; i += kTensorWarps * kWarp) {
    clear_shared(base + i * 16);
  }

  Ring ring;
  ring.middle = base + kPairBytes;
  ring.pair = warp < 2 ? 0xc0c0c0c0u : 0u;
  ring.lane = (lane * 4 + warp % 2 * 128) * 0x01010101u;
  const unsigned my_ring = base + warp / 2 * kPairBytes + warp % 2 * 128;
  unsigned rows[4];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const int t = lane % 4;
    rows[s] = my_ring + t * 4 * 256 + ((s + t) % 4 * 8 + lane / 4) * 4;
  }
  Position<kBits> position;
  position.begin(first * (kPanel / 2));
  float acc[2][kNTiles][4] = {};

  // Granules of the four windows of a panel.
  const ushort4* panel_counts = reinterpret_cast<const ushort4*>(counts) + slice * panels;
  ushort4 granules = {0, 0, 0, 0};
  if (slice < slices && first < last) granules = panel_counts[first];
  for (int panel = first; panel < last; ++panel) {
    __syncthreads();  // nobody needs x of the last panel any more
    x_ahead.store(x_shared);
    ushort4 next = {0, 0, 0, 0};
    if (panel + 1 < last) {
      x_ahead.load(x, tokens, k, (panel + 1) * kPanel, aligned);
      if (slice < slices) next = panel_counts[panel + 1];
    }
    __syncthreads();  // x is there
#pragma unroll 1
    for (int w = 0; w < kRing; ++w) {
      const int left = w == 0 ? granules.x : w == 1 ? granules.y : w == 2 ? granules.z : granules.w;
#pragma unroll 1
      for (int i = 0; i < left; ++i) {
        position.store(ring, stream.front());
        stream.advance();
      }
      __syncwarp();
      multiply_window<T, kNTiles>(acc, rows, my_ring, x_shared, w);
    }
    granules = next;
  }

  // The tile of y, [token][row], through shared memory: rows lie in the order of their nnz.
  constexpr int kTileRow = kBlockRows + 4;
  float* tile = reinterpret_cast<float*>(smem);
  __syncthreads();
  const int first_row = group * kBlockRows;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    const int row = slice < slices ? row_order[slice * kWarp + b * 8 + lane / 4] : -1;
    if (row < 0) continue;
#pragma unroll
    for (int i = 0; i < 2 * kNTiles; ++i) {
      const int token = i / 2 * 8 + lane % 4 * 2 + i % 2;
      tile[token * kTileRow + row - first_row] = acc[b / 2][i / 2][b % 2 * 2 + i % 2];
    }
  }
  __syncthreads();
  float4 sums[2 * kNTiles];  // of tokens warp, warp + 4, ...; four rows a lane
#pragma unroll
  for (int i = 0; i < 2 * kNTiles; ++i) {
    sums[i] = *reinterpret_cast<const float4*>(tile + (warp + 4 * i) * kTileRow + lane * 4);
  }
  if (parts > 1) {
    constexpr int kTileQuads = kNTiles * 8 * kBlockRows / 4;
    float4* all = reinterpret_cast<float4*>(partial) +
                  static_cast<long long>(group) * parts * kTileQuads + warp * kWarp + lane;
#pragma unroll
    for (int i = 0; i < 2 * kNTiles; ++i) {
      if (warp + 4 * i < tokens) all[part * kTileQuads + i * 4 * kWarp] = sums[i];
    }
    __threadfence();
    __syncthreads();
    int* before = reinterpret_cast<int*>(smem);
    if (threadIdx.x == 0) *before = atomicAdd(arrived + group, 1);
    __syncthreads();
    if (*before != parts - 1) return;
    __threadfence();
#pragma unroll
    for (int i = 0; i < 2 * kNTiles; ++i) sums[i] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 2
    for (int p = 0; p < parts; ++p) {
#pragma unroll
      for (int i = 0; i < 2 * kNTiles; ++i) {
        if (warp + 4 * i >= tokens) continue;
        const float4 add = __ldcg(all + p * kTileQuads + i * 4 * kWarp);
        sums[i].x += add.x;
        sums[i].y += add.y;
        sums[i].z += add.z;
        sums[i].w += add.w;
      }
    }
    if (threadIdx.x == 0) arrived[group] = 0;  // for the next launch
  }

  const int row = first_row + lane * 4;
  float add[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) add[r] = bias && row + r < n ? Convert<T>::low(bias[row + r]) : 0.0f;
#pragma unroll
  for (int i = 0; i < 2 * kNTiles; ++i) {
    const int token = warp + 4 * i;
    if (token >= tokens) continue;
    unsigned short* out = y + static_cast<long long>(token) * n + row;
    const unsigned short four[4] = {
        Convert<T>::round(sums[i].x + add[0]), Convert<T>::round(sums[i].y + add[1]),
        Convert<T>::round(sums[i].z + add[2]), Convert<T>::round(sums[i].w + add[3])};
    if (n % 4 == 0 && row < n && reinterpret_cast<unsigned long long>(y) % 8 == 0) {
      *reinterpret_cast<uint2*>(out) = {four[0] | static_cast<unsigned>(four[1]) << 16,
                                        four[2] | static_cast<unsigned>(four[3]) << 16};
    } else {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if (row + r < n) out[r] = four[r];
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
  SK_TENSOR(sk_spmm_tensor_##type##_d##bits##_t8, type, bits, 1, 5)  \
  SK_TENSOR(sk_spmm_tensor_##type##_d##bits##_t16, type, bits, 2, 5) \
  SK_TENSOR(sk_spmm_tensor_##type##_d##bits##_t32, type, bits, 4, 4) \
  SK_TENSOR(sk_spmm_tensor_##type##_d##bits##_t64, type, bits, 8, 3)

SK_TENSOR_TOKENS(bf16, 4)
SK_TENSOR_TOKENS(bf16, 8)
SK_TENSOR_TOKENS(f16, 4)
SK_TENSOR_TOKENS(f16, 8)
