// y[M, N] = x[M, K] @ W[N, K]^T + bias[N] for M <= 64 tokens on dense tensor cores, W packed as
// pairs.cuh says: each lane of a warp takes its words out of a step, one after the other, into
// operand A of mma and leaves 0 in the registers that have none.
//
// Bytes: those of the steps, once, and x once for each block of rows. A slot of 64 places of W
// costs 4.5 instructions, full or empty, and as many wavefronts of shared memory as lanes meet in a
// bank: 3 on average where all have a word. x is read from shared memory once for 64 rows (mma:
// 32): 2 bytes a place with 64 tokens. So it suits more tokens than cover, whose slots are fewer
// but pay for x each.
//
// runs.cuh says who does what.
#include "launch.cuh"
#include "pairs_words.cuh"
#include "runs.cuh"
#include "warpgroups.cuh"

namespace sk {

constexpr unsigned kBufferBytes = 4352;  // of words, two a warp
constexpr unsigned kWindow = 64;         // tokens times steps of x

// Brings x of a window to shared memory as [step][token][64 columns], zeros beyond K. Beyond the
// last token lies anything: those sums go nowhere. The eight chunks of 8 columns are exchanged by
// token, so that the same chunk of eight tokens lies in eight groups of banks. All warps of a group
// do it.
template <int kTokens>
class Window {
 public:
  static constexpr unsigned kSteps = kWindow / kTokens;
  static constexpr unsigned kStepBytes = kTokens * kStepColumns * 2;
  static constexpr unsigned kBytes = kSteps * kStepBytes;

  __device__ Window(const unsigned short* x, int tokens, int k, int group_warps)
      : x_(x),
        tokens_(tokens),
        k_(k),
        turn_(group_warps * kWarp / 8),
        first_(threadIdx.x / 8 & (turn_ - 1)),
        is_aligned_(k % 8 == 0 && reinterpret_cast<unsigned long long>(x) % 16 == 0) {}

  // Sends for the chunks of this thread, a group of copies.
  __device__ void copy(unsigned shared, int window) const {
    // Rows of 8 chunks; the rows of a thread are alike modulo 8.
    unsigned to = shared + first_ * 128 + ((threadIdx.x ^ first_) & 7) * 16;
    const int first_col = window * static_cast<int>(kSteps) * kStepColumns + threadIdx.x % 8 * 8;
#pragma unroll 1
    for (unsigned row = first_; row < kSteps * kTokens; row += turn_, to += turn_ * 128) {
      const int token = row % kTokens, col = first_col + row / kTokens * kStepColumns;
      if (token >= tokens_) continue;
      const unsigned short* from = x_ + (token * k_ + col);
      if (col + 8 <= k_ && is_aligned_) {
        copy_async<16>(to, from);
      } else {
        store_shared(to, gather(from, k_ - col));
      }
    }
    commit_copies();
  }

 private:
  // The first `count` of eight numbers, then zeros.
  static __device__ uint4 gather(const unsigned short* from, int count) {
    unsigned words[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) words[i / 2] |= static_cast<unsigned>(from[i]) << i % 2 * 16;
    }
    return {words[0], words[1], words[2], words[3]};
  }

  const unsigned short* x_;
  const int tokens_, k_;
  const unsigned turn_, first_;  // rows at a time, the first one
  const bool is_aligned_;
};

// acc += a step times its x.
template <class V, int kNTiles>
__device__ inline void multiply(float (&acc)[2][kNTiles][4], unsigned (&a)[2][8], Slots<V> slots,
                                unsigned x) {
  using X = typename Stored<V>::X;
  const int lane = threadIdx.x % kWarp;
  // This lane's address for ldmatrix: tokens lane / 16 * 8 .. + 7, chunk lane / 8 % 2.
  const unsigned row = x + (lane / 16 * 8 + lane % 8) * 128 + ((lane / 8 % 2) ^ (lane % 8)) * 16;
  slots.load(a[0], 0);
#pragma unroll
  for (int i = 0; i < kSixteens; ++i) {
    if (i + 1 < kSixteens) slots.load(a[(i + 1) % 2], i + 1);
#pragma unroll
    for (int j = 0; j < kNTiles; j += 2) {
      unsigned b[4];
      load_matrices(b, (row ^ i * 32) + j * 1024);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        mma<X>(acc[tile][j], a[i % 2] + tile * 4, b[0], b[1]);
        mma<X>(acc[tile][j + 1], a[i % 2] + tile * 4, b[2], b[3]);
      }
    }
  }
}

// The same by the four warps of a warpgroup, whose x is the same. The last products go on.
template <class V, int kNTiles>
__device__ inline void multiply_together(float (&acc)[2][kNTiles][4], unsigned (&a)[2][8],
                                         Slots<V> slots, unsigned x) {
  using X = typename Stored<V>::X;
#pragma unroll
  for (int i = 0; i < kSixteens; ++i) {
    wait_warpgroup_products<1>();  // this operand is free
    slots.load(a[i % 2], i);
    const unsigned long long b = describe_rows(x + i * 32);
    begin_warpgroup_products();
    mma_warpgroup<X>(acc[0], a[i % 2], b);
    mma_warpgroup<X>(acc[1], a[i % 2] + 4, b);
    commit_warpgroup_products();
  }
}

template <class V, int kNTiles>
__device__ void spmm_pairs(const unsigned* all_words, const int* steps, const float* scales,
                           const unsigned short* x, const unsigned short* bias, unsigned short* y,
                           float* partial, int* arrived, int tokens, int n, int k, int slices,
                           int row_steps, int group_warps, int most_shares, int words_end) {
  using Window = Window<kNTiles * 8>;
  using Words = sk::Words<kBufferBytes>;
  extern __shared__ __align__(128) char smem[];
  // x first: describe_rows wants a multiple of 1024.
  const unsigned shared = (shared_address(smem) + 1023) / 1024 * 1024;
  const int lane = threadIdx.x % kWarp;
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0);  // uniform
  const int groups = kRunWarps / group_warps, group = warp / group_warps;
  const unsigned words_shared = shared + groups * 2 * Window::kBytes;
  Words words(all_words, words_shared + warp * Words::kBytes,
              words_shared + kRunWarps * Words::kBytes + warp * Words::kBarrierBytes);
  // Of two windows of x: that of the product, and that of the next one.
  unsigned x_shared = shared + group * 2 * Window::kBytes,
           next_x_shared = x_shared + Window::kBytes;
  const int windows = (row_steps + Window::kSteps - 1) / Window::kSteps;
  const int runs = gridDim.x;
  const int units = (slices + group_warps - 1) / group_warps * windows;
  const int run = blockIdx.x;
  const int run_first = run_begin(run, runs, units), run_end = run_begin(run + 1, runs, units);
  const Window x_window(x, tokens, k, group_warps);

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
    // Warps beyond the last slice do its work once more, and their sums go nowhere.
    const int own_slice = block * group_warps + warp % group_warps;
    const int slice = min(own_slice, slices - 1);
    const int first_step = first * Window::kSteps;
    const int count_steps = min(static_cast<int>(last * Window::kSteps), row_steps) - first_step;
    const int* my_steps = steps + static_cast<long long>(slice) * row_steps + first_step;
    const int row_of_lane = own_slice * kWarp + lane < n ? own_slice * kWarp + lane : -1;
    if (is_first) {
      // While the last kernel runs, which may be about to write the steps, they are a guess.
      const Range guess =
          within({0, words_end}, {__ldcg(my_steps), __ldcg(my_steps + count_steps)});
      prefetch(all_words + guess.begin, (guess.end - guess.begin) * 4ll);
      wait_for_last_kernel();
    }
    publish_to_warpgroups();  // that sums of other rows are not in the way of words
    __syncwarp();
    words.begin(my_steps, count_steps);
    if (first < last) x_window.copy(x_shared, first);
    int step = 0;
    float acc[2][kNTiles][4] = {};
    unsigned a[2][8] = {};
    for (int window = first; window < last; ++window) {
      wait_copies<0>();
      publish_to_warpgroups();
      wait_warpgroup_products<0>();        // the last window has been read
      sync_warps(1 + group, group_warps);  // by all warps, and x is there
      if (window + 1 < last) x_window.copy(next_x_shared, window + 1);
      const int window_end =
          min(static_cast<int>((window + 1 - first) * Window::kSteps), count_steps);
      for (unsigned at = x_shared; step < window_end; ++step, at += Window::kStepBytes) {
        const Slots<V> slots(words);
        if (has_warpgroups()) {
          multiply_together<V, kNTiles>(acc, a, slots, at);
        } else {
          multiply<V, kNTiles>(acc, a, slots, at);
        }
      }
      const unsigned done = x_shared;
      x_shared = next_x_shared;
      next_x_shared = done;
    }
    wait_warpgroup_products<0>();
    // All groups meet as many barriers: racecheck counts them for a block.
    for (int i = last - first; i < (count + groups - 1) / groups; ++i) {
      sync_warps(1 + group, group_warps);
    }
    wait_copies<0>();  // none is under way when sums take the place of words
    const int end_of_all = unit - block * windows;
    const auto sum_stored = [&](int token, int row) {
      return sum_pairs<V>(all_words, steps, x + static_cast<long long>(token) * k, row, row_steps,
                          (end_of_all - count) * static_cast<int>(Window::kSteps),
                          min(end_of_all * static_cast<int>(Window::kSteps), row_steps));
    };
    const Part part = {block, group_warps * kWarp, kRunWarps, groups, group, run, runs, windows,
                       units, most_shares};
    finish<V>(acc, row_of_lane, smem, scales, bias, y, partial, arrived, tokens, n, part,
              sum_stored);
  }
}

}  // namespace sk

#define SK_PAIRS(name, type, tiles)                                                              \
  extern "C" __global__ void __launch_bounds__(sk::kRunWarps* sk::kWarp, 1) name(                \
      const unsigned* words, const int* steps, const float* scales, const unsigned short* x,     \
      const unsigned short* bias, unsigned short* y, float* partial, int* arrived, int m, int n, \
      int k, int slices, int row_steps, int group_warps, int most_shares, int words_end) {       \
    sk::spmm_pairs<sk::type, tiles>(words, steps, scales, x, bias, y, partial, arrived, m, n, k, \
                                    slices, row_steps, group_warps, most_shares, words_end);     \
  }                                                                                              \
  SK_EARLY_KERNEL(name)

#define SK_PAIRS_TOKENS(type)                   \
  SK_PAIRS(sk_spmm_pairs_##type##_t16, type, 2) \
  SK_PAIRS(sk_spmm_pairs_##type##_t32, type, 4) \
  SK_PAIRS(sk_spmm_pairs_##type##_t64, type, 8)

SK_PAIRS_TOKENS(bf16)
SK_PAIRS_TOKENS(f16)
SK_PAIRS_TOKENS(int8)
SK_PAIRS_TOKENS(e4m3)
