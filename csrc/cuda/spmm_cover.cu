// y[M, N] = x[M, K] @ W[N, K]^T + bias[N] for M <= 32 tokens on sparse tensor cores, W packed as
// cover.cuh says: operand A of mma.sp.m16n8k32 lies in memory as the lanes want it, and nothing has
// to be decoded.
//
// x of a window lies in shared memory, feature-major, [column][token]: ldmatrix takes 32 addresses,
// one for each slot, and so gives operand B in the order of slots at no cost. Addresses are
// swizzled by column so that 8 slots meet 8 banks if their columns differ modulo 8; the packing
// sees to that where it can.
//
// Bytes: those of the records, once, and x once for each block of rows. About 1.6 instructions for
// a slot and row (16 tokens), so memory is to bound it.
//
// runs.cuh says who does what. x of a window is a group's: it brings the next one while it uses
// this one. So large groups read x less often, and small ones give small blocks of rows more to do.
#include "cover.cuh"
#include "launch.cuh"
#include "runs.cuh"

namespace sk {

// Records of a warp in shared memory or on their way there: as many bytes of both kinds.
constexpr int kDepth = 7, kDepth8 = 12;

template <class V>
class Records {
 public:
  using Record = sk::Record<V>;
  static constexpr int kDepth = Stored<V>::kBytes == 2 ? sk::kDepth : kDepth8;
  static constexpr int kWarpBytes = kDepth * Record::kBytes;

  // Reads the steps of `range`; `shared` has kWarpBytes for this warp.
  __device__ Records(unsigned shared, const uint4* records, const Range& range)
      : shared_(shared), head_limit_(limit(Record::kHead)), tail_limit_(limit(Record::kTail)) {
    begin(records, range);
  }

  // In place of what was begun and not yet read.
  __device__ void begin_again(const uint4* records, const Range& range) {
    wait_copies<0>();
    begin(records, range);
  }

  // The shared address of the next record, when it has arrived. The one before it may still be in
  // use, the one before that not.
  __device__ unsigned next() {
    wait_copies<kDepth - 3>();
    __syncwarp();  // all lanes' copies are here, and all have read the last but one
    constexpr unsigned kTwo = 2 * Record::kBytes;
    copy(slot_ < kTwo ? slot_ + (kWarpBytes - kTwo) : slot_ - kTwo);
    const unsigned at = shared_ + slot_;
    slot_ = slot_ == kWarpBytes - Record::kBytes ? 0 : slot_ + Record::kBytes;
    return at;
  }

 private:
  // Of copy_async_if(), for the first `lanes` of a warp.
  static __device__ int limit(int lanes) {
    return static_cast<int>(threadIdx.x % kWarp) < lanes ? 0 : 0x7fffffff;
  }

  __device__ void begin(const uint4* records, const Range& range) {
    from_ = records + static_cast<long long>(range.begin) * Record::kChunks + threadIdx.x % kWarp;
    ahead_ = range.end - range.begin;
    slot_ = 0;
#pragma unroll
    for (int i = 0; i < kDepth - 2; ++i) copy(i * Record::kBytes);
  }

  __device__ void copy(unsigned slot) {
    const unsigned to = shared_ + slot + threadIdx.x % kWarp * 16;
    copy_async_if(to, from_, ahead_, Record::kHead == kWarp ? 0 : head_limit_);
    if constexpr (Record::kTail > 0) {
      copy_async_if(to + Record::kHead * 16, from_ + Record::kHead, ahead_, tail_limit_);
    }
    commit_copies();
    from_ += Record::kChunks;
    --ahead_;
  }

  const unsigned shared_;
  const int head_limit_, tail_limit_;
  const uint4* from_;
  int ahead_;      // records not yet sent for
  unsigned slot_;  // bytes
};

// Brings x of a window, kNTiles * 8 tokens, to shared memory as [column][token]. A group of warps
// does it: 8 tokens of two neighbouring columns are an item. Beyond the last token and the last
// column it is repeated: those sums are never written, those columns have no values.
template <int kNTiles>
class Window {
 public:
  static constexpr int kColumnBytes = kNTiles * 16;
  static constexpr int kBytes = kCoverColumns * kColumnBytes;

  __device__ Window(const unsigned short* x, int tokens, int k, int group_warps)
      : x_(x),
        last_token_(tokens - 1),
        k_(k),
        pair_(threadIdx.x % kPairs),
        turns_(group_warps * kWarp / kPairs),
        first_(threadIdx.x / kPairs % turns_),
        in_pairs_(k % 2 == 0 && reinterpret_cast<unsigned long long>(x) % 4 == 0) {}

  // Where column `col` begins: its chunks of 8 tokens are exchanged by an exclusive or, which gives
  // eight columns that differ modulo 8 eight different groups of banks.
  static __device__ unsigned at(unsigned col) {
    const unsigned turn = kNTiles == 1 ? 0 : kNTiles == 2 ? (col >> 2) & 1 : (col >> 1) & 3;
    return col * kColumnBytes + turn * 16;
  }

  // Sends for the first items of this thread.
  __device__ void load(int window) { load_some(window, first_); }

  // All items of this thread; the first ones have been loaded.
  __device__ void store(unsigned shared, int window) {
    store_some(shared, first_);
    for (int chunk = first_ + kAhead * turns_; chunk < kNTiles; chunk += kAhead * turns_) {
      load_some(window, chunk);
      store_some(shared, chunk);
    }
  }

 private:
  static constexpr int kPairs = kCoverColumns / 2;
  static constexpr int kAhead = kNTiles == 1 ? 1 : 2;  // items

  struct Item {
    unsigned pairs[8];
  };

  __device__ void load_some(int window, int chunk) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i, chunk += turns_) {
      if (chunk < kNTiles) load(items_[i], window, chunk);
    }
  }

  __device__ void store_some(unsigned shared, int chunk) const {
#pragma unroll
    for (int i = 0; i < kAhead; ++i, chunk += turns_) {
      if (chunk < kNTiles) store(items_[i], shared, chunk);
    }
  }

  __device__ void load(Item& item, int window, int chunk) const {
    const int col = window * kCoverColumns + pair_ * 2;
    const int first_token = chunk * 8;
    int row = min(first_token, last_token_) * k_ + min(col, in_pairs_ ? k_ - 2 : k_ - 1);
    const int second = col + 1 < k_ ? 1 : 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (in_pairs_) {
        item.pairs[i] = *reinterpret_cast<const unsigned*>(x_ + row);
      } else {
        item.pairs[i] = x_[row] | static_cast<unsigned>(x_[row + second]) << 16;
      }
      if (first_token + i < last_token_) row += k_;
    }
  }

  __device__ void store(const Item& item, unsigned shared, int chunk) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = __byte_perm(item.pairs[2 * i], item.pairs[2 * i + 1], c ? 0x7632 : 0x5410);
      }
      store_shared((shared + at(pair_ * 2 + c)) ^ chunk * 16,
                   uint4{words[0], words[1], words[2], words[3]});
    }
  }

  const unsigned short* x_;
  const int last_token_, k_;
  const int pair_, turns_, first_;  // of the group's threads, `turns_` share a pair of columns
  const bool in_pairs_;
  Item items_[kAhead];
};

// A nibble for each of 8 groups, two positions: that of the value, and another one for the zero
// beside it. The nibbles of `p`: bits 0-1 for row g, bits 2-3 for row g + 8.
__device__ inline unsigned spread_positions(unsigned p) {
  const unsigned values = (p & 0x3333u) | (p << 14 & 0x33330000u);
  return values | (values << 2 ^ 0x44444444u);
}

// A lane's share of one record.
template <class V>
struct Step {
  using Record = sk::Record<V>;
  unsigned col, positions;
  unsigned values[Record::kLaneBytes / 4];

  __device__ void load(unsigned record) {
    const unsigned lane = threadIdx.x % kWarp, at = record + lane * Record::kLaneBytes;
    col = load_shared_u8(record + Record::kColumnsAt + lane);
    positions = load_shared_u16(record + Record::kPositionsAt + lane * 2);
    if constexpr (Record::kLaneBytes == 16) {
      const uint4 four = load_shared_v4(at);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = word(four, i);
    } else {
      const uint2 two = load_shared_v2(at);
      values[0] = two.x, values[1] = two.y;
    }
  }

  // acc += the slots of the record times their x.
  template <int kNTiles>
  __device__ void multiply(float (&acc)[2][kNTiles][4], unsigned window) const {
    using X = typename Stored<V>::X;
    unsigned a[2][4];
#pragma unroll
    for (int i = 0; i < kLaneValues; i += 2) {
      const unsigned two = Stored<V>::pair(values, i / 2);
      a[i / 4][i % 4] = two & 0xffffu;
      a[i / 4][i % 4 + 1] = two >> 16;
    }
    const unsigned at_groups = spread_positions(positions);
    const unsigned slot = window + Window<kNTiles>::at(col);
#pragma unroll
    for (int j = 0; j < kNTiles; ++j) {
      unsigned b[4];
      load_matrices_transposed(b, slot ^ (j * 16));
      mma_sparse<X, 0>(acc[0][j], a[0], b, at_groups);
      mma_sparse<X, 1>(acc[1][j], a[1], b, at_groups);
    }
  }
};

// Of a row of W, which has place `place` in the order of rows, the stored values in windows [first,
// end) times x of one token.
template <class V>
__device__ float sum_cover(const uint4* records, const int* steps, const unsigned short* x,
                           int place, int windows, int first, int end) {
  using Record = sk::Record<V>;
  using X = typename Stored<V>::X;
  const int* of_windows = steps + static_cast<long long>(place / kWarp) * windows;
  float sum = 0;
  for (int window = first; window < end; ++window) {
    for (int step = of_windows[window]; step < of_windows[window + 1]; ++step) {
      const auto record = reinterpret_cast<const unsigned char*>(
          records + static_cast<long long>(step) * Record::kChunks);
      for (int group = 0; group < kWarp / 4; ++group) {
        const CoverPlace at = cover_place<V>(record, place % kWarp, group);
        if (!is_stored(at.value)) continue;
        const int col = window * kCoverColumns + record[Record::kColumnsAt + at.slot];
        sum = fmaf(Convert<X>::low(at.value), Convert<X>::low(x[col]), sum);
      }
    }
  }
  return sum;
}

template <class V, int kNTiles>
__device__ void spmm_cover(const uint4* records, const int* steps, const int* row_order,
                           const float* scales, const unsigned short* x, const unsigned short* bias,
                           unsigned short* y, float* partial, int* arrived, int tokens, int n,
                           int k, int slices, int windows, int group_warps, int most_shares,
                           int all_steps) {
  using Window = Window<kNTiles>;
  using Records = sk::Records<V>;
  using Record = sk::Record<V>;
  extern __shared__ __align__(128) char smem[];
  const unsigned shared = shared_address(smem);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int groups = kRunWarps / group_warps, group = warp / group_warps;
  const unsigned ring_shared = shared + groups * 2 * Window::kBytes + warp * Records::kWarpBytes;
  // Of two windows of x: that of the product, and that of the next one.
  unsigned x_shared = shared + group * 2 * Window::kBytes,
           next_x_shared = x_shared + Window::kBytes;
  const int runs = gridDim.x;
  const int units = (slices + group_warps - 1) / group_warps * windows;
  const int run = blockIdx.x;
  const int run_first = run_begin(run, runs, units), run_end = run_begin(run + 1, runs, units);
  Window ahead(x, tokens, k, group_warps);

  let_next_kernel_start();
  for (int unit = run_first; unit < run_end;) {
    // Of windows [first, last) of these rows, the groups take equal parts.
    const int block = unit / windows;
    int first = unit % windows;
    const int count = min(windows - first, run_end - unit);
    const bool is_first = unit == run_first;
    unit += count;
    const int last = first + count * (group + 1) / groups;
    first += count * group / groups;
    const int slice = block * group_warps + warp % group_warps;
    const int* my_steps = steps + static_cast<long long>(slice) * windows;
    // While the last kernel runs, which may be about to write the steps, they are a guess.
    Range guess = {0, 0}, range = {0, 0};
    if (slice < slices) guess = {__ldcg(my_steps + first), __ldcg(my_steps + last)};
    if (is_first) {
      guess = within({0, all_steps}, guess);
      if (slice < slices) {
        prefetch(records + static_cast<long long>(guess.begin) * Record::kChunks,
                 static_cast<long long>(guess.end - guess.begin) * Record::kBytes);
        prefetch_to_l2(row_order + slice * kWarp);
      }
      wait_for_last_kernel();
    }
    Records ring(ring_shared, records, guess);
    int stop = 0, row_of_lane = -1;
    if (slice < slices) {
      range = {__ldcg(my_steps + first), __ldcg(my_steps + last)};
      stop = my_steps[min(first + 1, last)];
      row_of_lane = row_order[slice * kWarp + lane];
    }
    if (first < last) ahead.load(first);
    if (kStartsEarly && range != guess) ring.begin_again(records, range);
    int step = range.begin;
    Step<V> current;  // one ahead of the product
    current.load(ring.next());
    float acc[2][kNTiles][4] = {};
    if (first < last) ahead.store(x_shared, first);
    for (int window = first; window < last; ++window) {
      int next_stop = stop;
      if (window + 1 < last) {
        ahead.load(window + 1);
        if (slice < slices) next_stop = my_steps[window + 2];
      }
      sync_warps(1 + group, group_warps);  // x is there, and nobody needs the last one any more
      for (; step < stop; ++step) {
        Step<V> next;
        next.load(ring.next());
        current.template multiply<kNTiles>(acc, x_shared);
        current = next;
      }
      stop = next_stop;
      if (window + 1 < last) ahead.store(next_x_shared, window + 1);
      const unsigned done = x_shared;
      x_shared = next_x_shared;
      next_x_shared = done;
    }
    // All groups meet as many barriers: racecheck counts them for a block.
    for (int i = last - first; i < (count + groups - 1) / groups; ++i) {
      sync_warps(1 + group, group_warps);
    }

    const int end_of_all = unit - block * windows;
    const auto sum_stored = [&](int token, int row) {
      int place = block * group_warps * kWarp;
      while (row_order[place] != row) ++place;
      return sum_cover<V>(records, steps, x + static_cast<long long>(token) * k, place, windows,
                          end_of_all - count, end_of_all);
    };
    const Part part = {block, group_warps * kWarp, kRunWarps, groups, group, run, runs, windows,
                       units, most_shares};
    finish<V>(acc, row_of_lane, smem, scales, bias, y, partial, arrived, tokens, n, part,
              sum_stored);
  }
}

}  // namespace sk

#define SK_COVER(name, type, tiles)                                                                \
  extern "C" __global__ void __launch_bounds__(sk::kRunWarps* sk::kWarp, 1)                        \
      name(const uint4* records, const int* steps, const int* row_order, const float* scales,      \
           const unsigned short* x, const unsigned short* bias, unsigned short* y, float* partial, \
           int* arrived, int m, int n, int k, int slices, int windows, int group_warps,            \
           int most_shares, int all_steps) {                                                       \
    sk::spmm_cover<sk::type, tiles>(records, steps, row_order, scales, x, bias, y, partial,        \
                                    arrived, m, n, k, slices, windows, group_warps, most_shares,   \
                                    all_steps);                                                    \
  }                                                                                                \
  SK_EARLY_KERNEL(name)

#define SK_COVER_TOKENS(type)                   \
  SK_COVER(sk_spmm_cover_##type##_t8, type, 1)  \
  SK_COVER(sk_spmm_cover_##type##_t16, type, 2) \
  SK_COVER(sk_spmm_cover_##type##_t32, type, 4)

SK_COVER_TOKENS(bf16)
SK_COVER_TOKENS(f16)
SK_COVER_TOKENS(int8)
SK_COVER_TOKENS(e4m3)
