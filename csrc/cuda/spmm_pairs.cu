// y[M, N] = x[M, K] @ W[N, K]^T + bias[N] for M <= 64 tokens on dense tensor cores, W packed as
// pairs.cuh says: each lane of a warp takes its words out of the stream, one after the other, into
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

// The words of a warp on their way through shared memory: a ring of rows of 16 bytes a lane. What
// the ring begins with lies behind its end once more, so that a lane's words of a step are a piece.
class Words {
 public:
  static constexpr unsigned kRowBytes = kWarp * 16, kRows = 16;
  static constexpr unsigned kRingBytes = kRows * kRowBytes, kLaneBytes = kSlots * 4;
  static constexpr unsigned kBytes = kRingBytes + kLaneBytes;

  // Reads the words of `range`; `shared` has kBytes for this warp.
  __device__ Words(unsigned shared, const unsigned* words, const Range& range)
      : shared_(shared), lane_(threadIdx.x % kWarp) {
    begin(words, range);
  }

  // In place of what was begun and not yet read.
  __device__ void begin_again(const unsigned* words, const Range& range) {
    wait_copies<0>();
    begin(words, range);
  }

  // Until all words before `end` are here. What lies before the last step may be overwritten.
  __device__ void wait_for(int end) {
    __syncwarp();  // all lanes have read what they need of it
#pragma unroll 1
    for (const unsigned bytes = offset(end); arrived_ < bytes; arrived_ += kRowBytes) {
      wait_copies<kAhead - 1>();
      copy();
    }
    __syncwarp();  // all lanes' copies are here
  }

  // Until the copies that this thread committed before `sent` rows are here too.
  __device__ unsigned sent() const { return sent_; }
  __device__ void wait_for_others(unsigned sent) const {
    wait_copies_but<kAhead>((sent_ - sent) / kRowBytes);
  }

  // Bytes of the stream before `word`, and where the byte at such an offset lies.
  __device__ unsigned offset(int word) const { return (word - origin_) * 4; }
  __device__ unsigned at(unsigned offset) const { return shared_ + (offset & (kRingBytes - 1)); }

 private:
  static constexpr int kAhead = 6;  // rows under way
  static constexpr int kStepRows = (kMostStepWords * 4 + kRowBytes - 16) / kRowBytes + 1;
  static_assert(kAhead + kStepRows <= kRows, "a row on its way may not replace one of the step");

  __device__ void begin(const unsigned* words, const Range& range) {
    const int quad = range.begin / 4;
    from_ = reinterpret_cast<const uint4*>(words) + quad + lane_;
    ahead_ = (range.end + 3) / 4 - quad - lane_;
    origin_ = quad * 4;
    arrived_ = sent_ = 0;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) copy();
  }

  __device__ void copy() {
    const unsigned slot = sent_ & (kRingBytes - 1);
    copy_async_if(shared_ + slot + lane_ * 16, from_, ahead_, 0);
    if (slot == 0 && lane_ < static_cast<int>(kLaneBytes / 16)) {
      copy_async_if(shared_ + kRingBytes + lane_ * 16, from_, ahead_, 0);
    }
    commit_copies();
    from_ += kWarp;
    ahead_ -= kWarp;
    sent_ += kRowBytes;
  }

  const unsigned shared_;
  const int lane_;
  const uint4* from_;        // of this lane
  int ahead_;                // quads not yet sent for, this lane's first
  int origin_;               // the word at offset 0
  unsigned arrived_, sent_;  // bytes
};

// Brings x of a window to shared memory as [step][token][64 columns], zeros beyond K. Beyond the
// last token lies anything: those sums go nowhere. The eight chunks of 8 columns are exchanged by
// token, so that the same chunk of eight tokens lies in eight groups of banks. All warps of a group
// do it.
template <int kTokens>
class Window {
 public:
  static constexpr unsigned kSteps = 64 / kTokens;
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
    const unsigned chunk = threadIdx.x % 8;
    // Rows of 8 chunks; the threads of a group are a power of two, so a thread's are alike.
    unsigned to = shared + first_ * 128 + ((chunk ^ first_) & 7) * 16;
#pragma unroll 1
    for (unsigned row = first_; row < kSteps * kTokens; row += turn_, to += turn_ * 128) {
      const int token = row % kTokens;
      const int col = (window * kSteps + row / kTokens) * kStepColumns + chunk * 8;
      if (token >= tokens_) continue;
      const unsigned short* from = x_ + static_cast<long long>(token) * k_ + col;
      if (is_aligned_ && col < k_) {
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

// What a lane has of a step.
class Slots {
 public:
  __device__ Slots(const Words& words, int word) {
    const unsigned head = words.offset(word), lane = threadIdx.x % kWarp;
    mask_ = load_shared_u32(words.at(head + lane * 4));
    const unsigned start = load_shared_u16(words.at(head + kWarp * 4 + lane * 2));
    at_ = words.at(head + kHeadWords * 4 + start);
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
  // Of this lane for ldmatrix: tokens lane / 16 * 8 .. + 7, chunk lane / 8 % 2.
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

// Where the steps of a slice end, in words: 32 of them are read at a time.
class Ends {
 public:
  __device__ Ends(const int* steps, int last) : steps_(steps), last_(last) {}

  // Of the next step, from `first` on.
  __device__ int next() {
    const int lane = threadIdx.x % kWarp;
    if (count_ % kWarp == 0) ends_ = steps_[min(count_ + lane + 1, last_)];
    return __shfl_sync(kAllLanes, ends_, count_++ % kWarp);
  }

 private:
  const int* steps_;
  const int last_;
  int ends_ = 0, count_ = 0;
};

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
  const unsigned words_shared = shared + groups * 2 * Window::kBytes + warp * Words::kBytes;
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
    // While the last kernel runs, which may be about to write the steps, they are a guess.
    Range guess = {__ldcg(my_steps), __ldcg(my_steps + count_steps)};
    if (is_first) {
      guess = within({0, words_end}, guess);
      prefetch(all_words + guess.begin, (guess.end - guess.begin) * 4ll);
      wait_for_last_kernel();
    }
    Words words(words_shared, all_words, guess);
    const Range range = {__ldcg(my_steps), __ldcg(my_steps + count_steps)};
    const int row_of_lane = own_slice * kWarp + lane < n ? own_slice * kWarp + lane : -1;
    if (kStartsEarly && range != guess) words.begin_again(all_words, range);
    if (first < last) x_window.copy(x_shared, first);
    unsigned sent = words.sent();
    Ends ends(my_steps, count_steps);
    int step = 0, word = range.begin, end = first < last ? ends.next() : word;
    float acc[2][kNTiles][4] = {};
    unsigned a[2][8] = {};
    for (int window = first; window < last; ++window) {
      words.wait_for_others(sent);
      publish_to_warpgroups();
      wait_warpgroup_products<0>();        // the last window has been read
      sync_warps(1 + group, group_warps);  // by all warps, and x is there
      if (window + 1 < last) x_window.copy(next_x_shared, window + 1);
      sent = words.sent();
      const int window_end =
          min(static_cast<int>((window + 1 - first) * Window::kSteps), count_steps);
      for (unsigned at = x_shared; step < window_end; ++step, at += Window::kStepBytes) {
        words.wait_for(end);
        const Slots slots(words, word);
        word = end;
        end = ends.next();
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
    wait_copies<0>();  // none is under way when sums take the place of the rings
    finish<T, kNTiles>(acc, row_of_lane, smem, bias, y, partial, arrived, tokens, n, block, windows,
                       units, group_warps, most_shares);
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
