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
#include "pairs.cuh"
#include "runs.cuh"

namespace sk {

constexpr unsigned kBufferBytes = 4352;  // of words, two a warp
constexpr unsigned kWindow = 64;         // tokens times steps of x
static_assert(kMostStepWords * 4 <= kBufferBytes, "a step fits where all pairs have values");

// The words of a warp on their way through shared memory, in two buffers: while the steps of one
// are used, the other is filled, with as many whole steps as fit.
class Words {
 public:
  static constexpr unsigned kBytes = 2 * kBufferBytes;
  static constexpr unsigned kBarrierBytes = 2 * 8;

  // `shared` has kBytes for this warp alone, `barriers` kBarrierBytes.
  __device__ Words(const unsigned* words, unsigned shared, unsigned barriers)
      : words_(words), shared_(shared), barriers_(barriers), lane_(threadIdx.x % kWarp) {
    if (has_warpgroups()) {
      if (lane_ < 2) init_barrier(barriers + lane_ * 8);
      __syncwarp();
    }
  }

  // Sends for the first of `count` steps; `bounds`: where each begins, and where the last one ends.
  __device__ void begin(const int* bounds, int count) {
    bounds_ = bounds;
    left_ = count;
    begin_ = __ldcg(bounds);
    look_ahead();
    now_ = fill(0);
    after_ = fill(1);
    buffer_ = 0;
    step_ = 0;
    at_ = shared_;
  }

  // The shared address of the next step, when it has arrived. The one before it is used up.
  __device__ unsigned next() {
    __syncwarp();  // by all lanes
    if (step_ == now_) {
      now_ = after_;
      after_ = fill(buffer_);
      buffer_ ^= 1;
      step_ = 0;
      at_ = shared_ + buffer_ * kBufferBytes;
    }
    if (step_++ == 0) wait(buffer_);
    return at_;
  }

  // The step there has so many bytes.
  __device__ void skip(unsigned bytes) { at_ += bytes; }

 private:
  // Where the next 32 steps end; beyond the last one it says nothing.
  __device__ void look_ahead() { ends_ = __ldcg(bounds_ + min(lane_ + 1, left_)); }

  // Sends for as many steps as fit. How many?
  __device__ int fill(int buffer) {
    const bool fits = lane_ < left_ && ends_ - begin_ <= static_cast<int>(kBufferBytes / 4);
    const int count = __popc(__ballot_sync(kAllLanes, fits));
    if (!count) return 0;
    const int end = __shfl_sync(kAllLanes, ends_, count - 1);
    const unsigned to = shared_ + buffer * kBufferBytes;
    const unsigned* from = words_ + begin_;
    if (has_warpgroups()) {
      if (lane_ == 0) copy_bulk(to, from, (end - begin_) * 4, barriers_ + buffer * 8);
    } else {
      for (int i = lane_ * 4; i < end - begin_; i += kWarp * 4)
        copy_async<16>(to + i * 4, from + i);
      commit_copies();
    }
    begin_ = end;
    left_ -= count;
    bounds_ += count;
    look_ahead();
    return count;
  }

  // Until the steps of a buffer have arrived.
  __device__ void wait(int buffer) {
    if (!has_warpgroups()) {
      wait_copies<0>();
    } else {
      wait_barrier(barriers_ + buffer * 8, phases_ >> buffer & 1);
      phases_ ^= 1u << buffer;
    }
    __syncwarp();
  }

  const unsigned* words_;
  const unsigned shared_, barriers_;
  const int lane_;
  const int* bounds_ = nullptr;  // of the steps not yet sent for
  int left_ = 0, begin_ = 0, ends_ = 0;
  int now_ = 0, after_ = 0;  // steps of this buffer, and of the other one
  int step_ = 0, buffer_ = 0;
  unsigned at_ = 0, phases_ = 0;  // a bit a barrier: that of the next arrival
};

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

// A lane's slots of one step.
class Slots {
 public:
  // Takes the slots of the next step.
  __device__ explicit Slots(Words& words) {
    const unsigned at = words.next(), lane = threadIdx.x % kWarp;
    mask_ = load_shared_u32(at + lane * 4);
    const unsigned start = load_shared_u16(at + kWarp * 4 + lane * 2);
    words.skip(__shfl_sync(kAllLanes, start, 0) * 16);
    at_ = at + kHeadWords * 4 + (lane ? start : 0);
  }

  // The registers of 16 columns: operand A of rows 0-15, then of rows 16-31. In order, from 0 on.
  __device__ void load(unsigned (&a)[8], int sixteen) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      // Four slots, a byte each: 4, the bytes of a word, if the lane has it.
      const unsigned four = rotate_right(mask_, 2 * sixteen + tile) & 0x04040404u;
      load_shared_if(a[tile * 4], at_, four & 0x04u);
      load_shared_if(a[tile * 4 + 1], dot_bytes(four, 0x00000001u, at_), four & 0x0400u);
      load_shared_if(a[tile * 4 + 2], dot_bytes(four, 0x00000101u, at_), four & 0x040000u);
      load_shared_if(a[tile * 4 + 3], dot_bytes(four, 0x00010101u, at_), four & 0x04000000u);
      at_ = dot_bytes(four, 0x01010101u, at_);
    }
  }

 private:
  static __device__ unsigned rotate_right(unsigned bits, unsigned by) {
    return by ? bits >> by | bits << (32 - by) : bits;
  }

  unsigned mask_, at_;
};

// acc += a step times its x.
template <class T, int kNTiles>
__device__ inline void multiply(float (&acc)[2][kNTiles][4], unsigned (&a)[2][8], Slots slots,
                                unsigned x) {
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
        mma<T>(acc[tile][j], a[i % 2] + tile * 4, b[0], b[1]);
        mma<T>(acc[tile][j + 1], a[i % 2] + tile * 4, b[2], b[3]);
      }
    }
  }
}

// The same by the four warps of a warpgroup, whose x is the same. The last products go on.
template <class T, int kNTiles>
__device__ inline void multiply_together(float (&acc)[2][kNTiles][4], unsigned (&a)[2][8],
                                         Slots slots, unsigned x) {
#pragma unroll
  for (int i = 0; i < kSixteens; ++i) {
    wait_warpgroup_products<1>();  // this operand is free
    slots.load(a[i % 2], i);
    const unsigned long long b = describe_rows(x + i * 32);
    begin_warpgroup_products();
    mma_warpgroup<T>(acc[0], a[i % 2], b);
    mma_warpgroup<T>(acc[1], a[i % 2] + 4, b);
    commit_warpgroup_products();
  }
}

// Of a row of W the stored values in steps [first, end) times x of one token.
template <class T>
__device__ float sum_pairs(const unsigned* words, const int* steps, const unsigned short* x,
                           int row, int row_steps, int first, int end) {
  const int* my_steps = steps + static_cast<long long>(row / kWarp) * row_steps;
  float sum = 0;
  for (int step = first; step < end; ++step) {
    const auto add = [&](int of_step, int column, unsigned pair) {
      if (of_step != row % kWarp) return;
      const unsigned short* at = x + step * kStepColumns + column;
      if (pair & 0xffffu) sum = fmaf(Convert<T>::low(pair), Convert<T>::low(at[0]), sum);
      if (pair >> 16) sum = fmaf(Convert<T>::high(pair), Convert<T>::low(at[1]), sum);
    };
    for (int t = 0; t < 4; ++t) visit_pairs(words + my_steps[step], row % 8 * 4 + t, add);
  }
  return sum;
}

template <class T, int kNTiles>
__device__ void spmm_pairs(const unsigned* all_words, const int* steps, const unsigned short* x,
                           const unsigned short* bias, unsigned short* y, float* partial,
                           int* arrived, int tokens, int n, int k, int slices, int row_steps,
                           int group_warps, int most_shares, int words_end) {
  using Window = Window<kNTiles * 8>;
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
  const int run_first = run_begin(blockIdx.x, runs, units);
  const int run_end = run_begin(blockIdx.x + 1, runs, units);
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
        const Slots slots(words);
        if (has_warpgroups()) {
          multiply_together<T, kNTiles>(acc, a, slots, at);
        } else {
          multiply<T, kNTiles>(acc, a, slots, at);
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
      return sum_pairs<T>(all_words, steps, x + static_cast<long long>(token) * k, row, row_steps,
                          (end_of_all - count) * static_cast<int>(Window::kSteps),
                          min(end_of_all * static_cast<int>(Window::kSteps), row_steps));
    };
    finish<T, kNTiles>(acc, row_of_lane, smem, bias, y, partial, arrived, tokens, n, block, windows,
                       units, group_warps, most_shares, sum_stored);
  }
}

}  // namespace sk

#define SK_PAIRS(name, type, tiles)                                                              \
  extern "C" __global__ void __launch_bounds__(sk::kRunWarps* sk::kWarp, 1) name(                \
      const unsigned* words, const int* steps, const unsigned short* x,                          \
      const unsigned short* bias, unsigned short* y, float* partial, int* arrived, int m, int n, \
      int k, int slices, int row_steps, int group_warps, int most_shares, int words_end) {       \
    sk::spmm_pairs<sk::type, tiles>(words, steps, x, bias, y, partial, arrived, m, n, k, slices, \
                                    row_steps, group_warps, most_shares, words_end);             \
  }                                                                                              \
  SK_EARLY_KERNEL(name)

#define SK_PAIRS_TOKENS(type)                   \
  SK_PAIRS(sk_spmm_pairs_##type##_t16, type, 2) \
  SK_PAIRS(sk_spmm_pairs_##type##_t32, type, 4) \
  SK_PAIRS(sk_spmm_pairs_##type##_t64, type, 8)

SK_PAIRS_TOKENS(bf16)
SK_PAIRS_TOKENS(f16)
