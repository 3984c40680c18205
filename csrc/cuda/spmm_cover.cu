// y[M, N] = x[M, K] @ W[N, K]^T + bias[N] for M <= 64 tokens on sparse tensor cores, W packed as
// cover.cuh says: operand A of mma.sp.m16n8k32 lies in memory as the lanes want it, and nothing has
// to be decoded.
//
// x of a window lies in shared memory, feature-major, [column][token]: ldmatrix takes 32 addresses,
// one for each slot, and so gives operand B in the order of slots at no cost. Addresses are
// swizzled by column so that 8 slots meet 8 banks if their columns differ modulo 8; the packing
// sees to that where it can.
//
// Bytes: those of the records, once, and x once for each block of 256 or 512 rows. About 1.6
// instructions for a slot and row (16 tokens), so memory is to bound it.
//
// The work, windows of blocks of rows, is cut into equal runs, one for each thread block; runs that
// share rows leave their sums in `partial`, and the last one to arrive adds them up in a fixed
// order.
#include "cover.cuh"
#include "launch.cuh"

namespace sk {

// The records of a warp, kDepth of them in shared memory or on their way there.
template <int kValues, int kDepth>
class Records {
 public:
  using Layout = Record<kValues>;
  static constexpr int kWarpBytes = kDepth * Layout::kBytes;

  // Reads steps [begin, end); `shared` has kWarpBytes for this warp.
  __device__ Records(unsigned shared, const uint4* records, int begin, int end)
      : shared_(shared),
        from_(records + static_cast<long long>(begin) * Layout::kChunks + threadIdx.x % kWarp),
        ahead_(end - begin),
        tail_limit_(threadIdx.x % kWarp < Layout::kChunks - Layout::kTailAt ? 0 : 0x7fffffff),
        slot_(0),
        free_((kDepth - 2) * Layout::kBytes) {
#pragma unroll
    for (int i = 0; i < kDepth - 2; ++i) copy(i * Layout::kBytes);
  }

  // The shared address of the next record, when it has arrived. The one before it may still be in
  // use, the one before that not.
  __device__ unsigned next() {
    wait_copies<kDepth - 3>();
    __syncwarp();  // all lanes' copies are here, and all have read the last but one
    copy(free_);
    const unsigned at = shared_ + slot_;
    slot_ = after(slot_);
    free_ = after(free_);
    return at;
  }

 private:
  static __device__ unsigned after(unsigned slot) {
    return slot == kWarpBytes - Layout::kBytes ? 0 : slot + Layout::kBytes;
  }

  __device__ void copy(unsigned slot) {
    const unsigned to = shared_ + slot + threadIdx.x % kWarp * 16;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      copy_async_if(to + i * kWarp * 16, from_ + i * kWarp, ahead_, 0);
    }
    copy_async_if(to + Layout::kTailAt * 16, from_ + Layout::kTailAt, ahead_, tail_limit_);
    commit_copies();
    from_ += Layout::kChunks;
    --ahead_;
  }

  const unsigned shared_;
  const uint4* from_;
  int ahead_;  // records not yet sent for
  const int tail_limit_;
  unsigned slot_, free_;  // bytes
};

// x of one window, kNTiles * 8 tokens, [column][token] in shared memory. A thread takes two
// neighbouring columns and a part of the tokens. Zeros beyond M and K.
template <int kNTiles, int kWarps>
struct Window {
  static constexpr int kColumnBytes = kNTiles * 16;
  static constexpr int kBytes = kCoverColumns * kColumnBytes;
  static constexpr int kPairs = kCoverColumns / 2;
  static constexpr int kTokens = kNTiles * 8 * kPairs / (kWarps * kWarp);  // of a thread
  unsigned pairs[kTokens];

  // Where column `col` begins: its chunks of 8 tokens are exchanged by an exclusive or, which gives
  // eight columns that differ modulo 8 eight different groups of banks.
  static __device__ unsigned at(unsigned col) {
    const unsigned turn = kNTiles == 1   ? 0
                          : kNTiles == 2 ? (col >> 2) & 1
                          : kNTiles == 4 ? (col >> 1) & 3
                                         : col & 7;
    return col * kColumnBytes + turn * 16;
  }

  __device__ void load(const unsigned short* x, int tokens, int k, int window, bool aligned) {
    const int col = window * kCoverColumns + threadIdx.x % kPairs * 2;
    const int first = threadIdx.x / kPairs * kTokens;
    const unsigned short* from = x + static_cast<long long>(first) * k + col;
    if (aligned && (window + 1) * kCoverColumns <= k) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i, from += k) {
        pairs[i] = first + i < tokens ? *reinterpret_cast<const unsigned*>(from) : 0;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kTokens; ++i, from += k) {
        pairs[i] = 0;
        if (first + i < tokens && col < k) pairs[i] = from[0];
        if (first + i < tokens && col + 1 < k) pairs[i] |= static_cast<unsigned>(from[1]) << 16;
      }
    }
  }

  __device__ void store(unsigned to) const {
    const int part = threadIdx.x / kPairs;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      unsigned words[kTokens / 2];
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        words[i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], c ? 0x7632 : 0x5410);
      }
      const unsigned column = to + at(threadIdx.x % kPairs * 2 + c);
      if constexpr (kTokens == 4) {
        store_shared(column + part * 8, uint2{words[0], words[1]});
      } else {
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          store_shared(column ^ (part * (kTokens / 8) + j) * 16,
                       uint4{words[4 * j], words[4 * j + 1], words[4 * j + 2], words[4 * j + 3]});
        }
      }
    }
  }
};

// A nibble for each of 8 groups, two positions: that of the value, and another one for the zero
// beside it. The nibbles of `p`: bits 0-1 for row g, bits 2-3 for row g + 8.
__device__ inline unsigned spread_positions(unsigned p) {
  const unsigned values = (p & 0x3333u) | (p << 14 & 0x33330000u);
  return values | (values << 2 ^ 0x44444444u);
}

// A lane's share of one record.
template <int kValues>
struct Step {
  unsigned col, positions;
  uint4 values[kValues];

  __device__ void load(unsigned record) {
    using Layout = Record<kValues>;
    const unsigned lane = threadIdx.x % kWarp;
    col = load_shared_u8(record + Layout::kColumnsAt + lane);
    positions = kValues == 1 ? load_shared_u16(record + Layout::kPositionsAt + lane * 2)
                             : load_shared_u32(record + Layout::kPositionsAt + lane * 4);
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = load_shared_v4(record + i * 512 + lane * 16);
  }

  // acc += the slots of the record times their x.
  template <class T, int kNTiles, int kWarps>
  __device__ void multiply(float (&acc)[2][kNTiles][4], unsigned window) const {
    unsigned a[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (kValues == 1) {
        const unsigned pair = word(values[0], i / 2);
        a[i / 4][i % 4] = i % 2 ? pair >> 16 : pair & 0xffffu;
      } else {
        a[i / 4][i % 4] = word(values[i / 4], i % 4);
      }
    }
    const unsigned at_groups = kValues == 1 ? spread_positions(positions) : positions;
    const unsigned slot = window + Window<kNTiles, kWarps>::at(col);
#pragma unroll
    for (int j = 0; j < kNTiles; ++j) {
      unsigned b[4];
      load_matrices_transposed(b, slot ^ (j * 16));
      mma_sparse<T, 0>(acc[0][j], a[0], b, at_groups);
      mma_sparse<T, 1>(acc[1][j], a[1], b, at_groups);
    }
  }
};

// The first window of run `run`, of `units` windows in all.
__device__ inline int run_begin(int run, int runs, int units) {
  return static_cast<int>(static_cast<long long>(run) * units / runs);
}
// The run that has window `unit`.
__device__ inline int run_of(int unit, int runs, int units) {
  return static_cast<int>((static_cast<long long>(unit + 1) * runs - 1) / units);
}

template <class T, int kValues, int kNTiles, int kWarps, int kDepth>
__device__ void spmm_cover(const uint4* records, const int* steps, const int* row_order,
                           const unsigned short* x, const unsigned short* bias, unsigned short* y,
                           float* partial, int* arrived, int tokens, int n, int k, int slices,
                           int windows, int most_shares) {
  constexpr int kRows = kWarps * kWarp;  // of a block
  constexpr int kTileRow = kRows + 4;    // floats
  extern __shared__ __align__(128) char smem[];
  const unsigned window_shared = shared_address(smem);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool aligned = k % 2 == 0 && reinterpret_cast<unsigned long long>(x) % 4 == 0;
  const int runs = gridDim.x;
  const int units = (slices + kWarps - 1) / kWarps * windows;
  const int run_end = run_begin(blockIdx.x + 1, runs, units);

  for (int unit = run_begin(blockIdx.x, runs, units); unit < run_end;) {
    const int block = unit / windows, first = unit % windows;
    const int last = min(windows, first + run_end - unit);
    unit += last - first;
    const int slice = block * kWarps + warp;
    const int* my_steps = steps + static_cast<long long>(slice) * windows;
    int step = 0, end = 0, stop = 0;
    if (slice < slices) {
      step = my_steps[first];
      stop = my_steps[first + 1];
      end = my_steps[last];
    }
    using Records = Records<kValues, kDepth>;
    Records ring(window_shared + Window<kNTiles, kWarps>::kBytes + warp * Records::kWarpBytes,
                 records, step, end);
    Window<kNTiles, kWarps> ahead;
    ahead.load(x, tokens, k, first, aligned);
    Step<kValues> current;  // one ahead of the product
    current.load(ring.next());
    float acc[2][kNTiles][4] = {};
    for (int window = first; window < last; ++window) {
      __syncthreads();  // nobody needs x of the last window any more
      ahead.store(window_shared);
      int next_stop = stop;
      if (window + 1 < last) {
        ahead.load(x, tokens, k, window + 1, aligned);
        if (slice < slices) next_stop = my_steps[window + 2];
      }
      __syncthreads();  // x is there
      for (; step < stop; ++step) {
        Step<kValues> next;
        next.load(ring.next());
        current.template multiply<T, kNTiles, kWarps>(acc, window_shared);
        current = next;
      }
      stop = next_stop;
    }

    // The tile of y, [token][row], through shared memory: rows lie in the order of their nnz.
    float* tile = reinterpret_cast<float*>(smem);
    __syncthreads();
    const int first_row = block * kRows;
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
    // Of tokens warp, warp + kWarps, ...: four rows of each 128 a lane.
    constexpr int kQuads = kRows / 128;
    float4 sums[2 * kNTiles];
#pragma unroll
    for (int i = 0; i < 2 * kNTiles; ++i) {
      const int token = warp + i / kQuads * kWarps;
      sums[i] =
          *reinterpret_cast<const float4*>(tile + token * kTileRow + i % kQuads * 128 + lane * 4);
    }
    __syncthreads();  // the tile has been read
    const int first_run = run_of(block * windows, runs, units);
    const int shares = run_of(block * windows + windows - 1, runs, units) - first_run + 1;
    bool is_last = true;
    if (shares > 1) {
      constexpr int kTileQuads = kNTiles * 8 * kRows / 4;
      float4* all = reinterpret_cast<float4*>(partial) +
                    static_cast<long long>(block) * most_shares * kTileQuads + threadIdx.x;
      float4* mine = all + (static_cast<int>(blockIdx.x) - first_run) * kTileQuads;
#pragma unroll
      for (int i = 0; i < 2 * kNTiles; ++i) {
        if (warp + i / kQuads * kWarps < tokens) mine[i * kRows] = sums[i];
      }
      __syncthreads();
      int* before = reinterpret_cast<int*>(smem);
      if (threadIdx.x == 0) {
        __threadfence();  // after the barrier, so it orders the stores of all threads
        *before = atomicAdd(arrived + block, 1);
      }
      __syncthreads();
      is_last = *before == shares - 1;
      if (is_last) {
        __threadfence();
#pragma unroll
        for (int i = 0; i < 2 * kNTiles; ++i) sums[i] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll(kNTiles < 8 ? 8 / kNTiles : 1)
        for (int share = 0; share < shares; ++share) {
#pragma unroll
          for (int i = 0; i < 2 * kNTiles; ++i) {
            if (warp + i / kQuads * kWarps >= tokens) continue;
            const float4 add = __ldcg(all + share * kTileQuads + i * kRows);
            sums[i].x += add.x;
            sums[i].y += add.y;
            sums[i].z += add.z;
            sums[i].w += add.w;
          }
        }
        if (threadIdx.x == 0) arrived[block] = 0;  // for the next launch
      }
      __syncthreads();  // `before` has been read
    }
    if (!is_last) continue;

#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const int row = first_row + quad * 128 + lane * 4;
      float add[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        add[r] = bias && row + r < n ? Convert<T>::low(bias[row + r]) : 0.0f;
      }
#pragma unroll
      for (int i = quad; i < 2 * kNTiles; i += kQuads) {
        const int token = warp + i / kQuads * kWarps;
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
  }
}

}  // namespace sk

#define SK_COVER(name, type, values, tiles, warps, depth, ctas)                                   \
  extern "C" __global__ void __launch_bounds__(warps* sk::kWarp, ctas)                            \
      name(const uint4* records, const int* steps, const int* row_order, const unsigned short* x, \
           const unsigned short* bias, unsigned short* y, float* partial, int* arrived, int m,    \
           int n, int k, int slices, int windows, int most_shares) {                              \
    sk::spmm_cover<sk::type, values, tiles, warps, depth>(records, steps, row_order, x, bias, y,  \
                                                          partial, arrived, m, n, k, slices,      \
                                                          windows, most_shares);                  \
  }                                                                                               \
  SK_KERNEL(name)

// 16 warps on a multiprocessor. Many tokens want larger blocks, which share a window of x.
#define SK_COVER_TOKENS(type, values, depth)                                      \
  SK_COVER(sk_spmm_cover_##type##_v##values##_t8, type, values, 1, 8, depth, 2)   \
  SK_COVER(sk_spmm_cover_##type##_v##values##_t16, type, values, 2, 8, depth, 2)  \
  SK_COVER(sk_spmm_cover_##type##_v##values##_t32, type, values, 4, 16, depth, 1) \
  SK_COVER(sk_spmm_cover_##type##_v##values##_t64, type, values, 8, 16, depth, 1)

SK_COVER_TOKENS(bf16, 1, 7)
SK_COVER_TOKENS(bf16, 2, 5)
SK_COVER_TOKENS(f16, 1, 7)
SK_COVER_TOKENS(f16, 2, 5)
