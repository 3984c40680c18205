// y[M, N] = x[M, K] @ W[N, K]^T + bias[N] for M <= 64 tokens on dense tensor cores, W packed as
// pairs.cuh says: a warp takes the words of its lanes out of the stream into operand A of mma and
// leaves 0 in the registers that have none.
//
// The rank of a lane in a slot is the number of lanes before it that have a word there, so the
// lanes that read a slot find their words side by side: one wavefront, whatever the pattern.
//
// Bytes: those of the steps, once, and x once for each block of rows. About 8 instructions for a
// slot of 64 places of W, full or empty, and x is read from shared memory once for 32 rows: 4 bytes
// a place with 64 tokens. So it suits more tokens than cover, whose slots are fewer but pay for x
// each.
//
// runs.cuh says who does what.
#include "launch.cuh"
#include "pairs.cuh"
#include "runs.cuh"

namespace sk {

// The words of a warp on their way through shared memory: a ring of rows of 16 bytes a lane.
class Words {
 public:
  static constexpr int kRowBytes = kWarp * 16, kRows = 16;
  static constexpr int kBytes = kRows * kRowBytes;

  // Reads the words of `range`; `shared`, a multiple of kBytes, has as many for this warp.
  __device__ Words(unsigned shared, const unsigned* words, const Range& range) : shared_(shared) {
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
    for (const int bytes = (end - origin_) * 4; arrived_ < bytes; arrived_ += kRowBytes) {
      wait_copies<kAhead - 1>();
      copy();
    }
    __syncwarp();  // all lanes' copies are here
  }

  // Until the copies that this thread committed before `sent` rows are here too.
  __device__ int sent() const { return sent_; }
  __device__ void wait_for_others(int sent) const { wait_copies_but<kAhead>(sent_ - sent); }

  // Bytes of the stream before `word`, and where the byte at such an offset lies.
  __device__ unsigned offset(int word) const { return (word - origin_) * 4; }
  __device__ unsigned at(unsigned offset) const { return (offset & (kBytes - 1)) | shared_; }

 private:
  static constexpr int kAhead = 6;  // rows under way
  static constexpr int kStepRows = (kMostStepWords * 4 + kRowBytes - 16) / kRowBytes + 1;
  static_assert(kAhead + kStepRows <= kRows, "a row on its way may not replace one of the step");

  __device__ void begin(const unsigned* words, const Range& range) {
    const int lane = threadIdx.x % kWarp, quad = range.begin / 4;
    from_ = reinterpret_cast<const uint4*>(words) + quad + lane;
    ahead_ = (range.end + 3) / 4 - quad - lane;
    origin_ = quad * 4;
    arrived_ = 0;
    sent_ = 0;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) copy();
  }

  __device__ void copy() {
    copy_async_if(shared_ + sent_ % kRows * kRowBytes + threadIdx.x % kWarp * 16, from_, ahead_, 0);
    commit_copies();
    from_ += kWarp;
    ahead_ -= kWarp;
    ++sent_;
  }

  const unsigned shared_;
  const uint4* from_;  // of this lane
  int ahead_;          // quads not yet sent for, this lane's first
  int origin_;         // the word at offset 0
  int arrived_;        // bytes
  int sent_;           // rows
};

// Brings x of a window to shared memory as [step][token][64 columns], kTokens tokens, zeros beyond
// the last one and beyond K. The eight chunks of 8 columns are exchanged by token, so that the same
// chunk of eight tokens lies in eight groups of banks. All warps of a group do it.
template <int kTokens>
class Window {
 public:
  static constexpr int kSteps = 64 / kTokens;
  static constexpr int kStepBytes = kTokens * kStepColumns * 2;
  static constexpr int kBytes = kSteps * kStepBytes;

  __device__ Window(const unsigned short* x, int tokens, int k, int group_warps)
      : x_(x),
        tokens_(tokens),
        k_(k),
        threads_(group_warps * kWarp),
        is_aligned_(k % 8 == 0 && reinterpret_cast<unsigned long long>(x) % 16 == 0) {}

  // Sends for the chunks of this thread, a group of copies.
  __device__ void copy(unsigned shared, int window) const {
    constexpr int kChunks = kBytes / 16;
#pragma unroll 1
    for (int chunk = threadIdx.x % threads_; chunk < kChunks; chunk += threads_) {
      const int token = chunk / 8 % kTokens;
      const int col = (window * kSteps + chunk / (8 * kTokens)) * kStepColumns + chunk % 8 * 8;
      const unsigned to = shared + chunk / 8 * 128 + ((chunk ^ token) & 7) * 16;
      const unsigned short* from = x_ + static_cast<long long>(token) * k_ + col;
      const int count = token < tokens_ ? k_ - col : 0;
      if (is_aligned_ && count > 0) {
        copy_async<16>(to, from);
      } else {
        store_shared(to, gather(from, count));
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
  const int tokens_, k_, threads_;
  const bool is_aligned_;
};

// What a lane knows of the slots of a step: where they are, and which bits of a mask concern it.
class Slots {
 public:
  static constexpr int kBytes = kSlots * 8;  // of shared memory, a warp's

  __device__ explicit Slots(unsigned shared)
      : shared_(shared), self_(1u << threadIdx.x % kWarp), before_(self_ - 1) {}

  // Finds where the slots of the step at `word` begin.
  __device__ void begin(const Words& words, int word) const {
    const int lane = threadIdx.x % kWarp;
    const unsigned mask = load_shared_u32(words.at(words.offset(word + lane)));
    const unsigned count = __popc(mask);
    unsigned sum = count;  // of the lanes up to this one
#pragma unroll
    for (int i = 1; i < kWarp; i *= 2) {
      const unsigned below = __shfl_up_sync(kAllLanes, sum, i);
      if (lane >= i) sum += below;
    }
    store_shared(shared_ + lane * 8, uint2{mask, words.offset(word + kSlots) + (sum - count) * 4});
    __syncwarp();
  }

  // The registers of 32 rows and 16 columns: operand A of rows 0-15, then of rows 16-31.
  __device__ void load(unsigned (&a)[8], const Words& words, int sixteen) const {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const uint4 two = load_shared_v4(shared_ + (sixteen * 8 + i) * 8);
      a[i] = take(words, two.x, two.y);
      a[i + 1] = take(words, two.z, two.w);
    }
  }

 private:
  __device__ unsigned take(const Words& words, unsigned mask, unsigned offset) const {
    return load_shared_if(words.at(offset + __popc(mask & before_) * 4), mask & self_);
  }

  const unsigned shared_, self_, before_;
};

// acc += the step at `word`, up to `end`, times its x.
template <class T, int kNTiles>
__device__ inline void multiply(float (&acc)[2][kNTiles][4], Words& words, const Slots& slots,
                                int word, int end, unsigned x) {
  const int lane = threadIdx.x % kWarp;
  // Of this lane for ldmatrix: tokens lane / 16 * 8 .. + 7, chunk lane / 8 % 2.
  const unsigned row = x + (lane / 16 * 8 + lane % 8) * 128 + ((lane / 8 % 2) ^ (lane % 8)) * 16;
  words.wait_for(end);
  slots.begin(words, word);
  unsigned a[2][8];  // one ahead of the product
  slots.load(a[0], words, 0);
#pragma unroll
  for (int i = 0; i < kSixteens; ++i) {
    if (i + 1 < kSixteens) slots.load(a[(i + 1) % 2], words, i + 1);
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

// The same by the four warps of a warpgroup, whose x is the same. Where a warp has no rows, its
// step is empty.
template <class T, int kNTiles>
__device__ inline void multiply_together(float (&acc)[2][kNTiles][4], Words& words,
                                         const Slots& slots, int word, int end, unsigned x,
                                         bool has_rows) {
  unsigned a[2][8] = {};
  if (has_rows) {
    words.wait_for(end);
    slots.begin(words, word);
    slots.load(a[0], words, 0);
  }
#pragma unroll
  for (int i = 0; i < kSixteens; ++i) {
    const unsigned long long b = describe_rows(x + i * 32);
    begin_warpgroup_products();
    mma_warpgroup<T>(acc[0], a[i % 2], b);
    mma_warpgroup<T>(acc[1], a[i % 2] + 4, b);
    commit_warpgroup_products();
    if (i + 1 < kSixteens) {
      wait_warpgroup_products<1>();  // the other operand is free
      if (has_rows) slots.load(a[(i + 1) % 2], words, i + 1);
    }
  }
  wait_warpgroup_products<0>();
}

template <class T, int kNTiles>
__device__ void spmm_pairs(const unsigned* all_words, const int* steps, const unsigned short* x,
                           const unsigned short* bias, unsigned short* y, float* partial,
                           int* arrived, int tokens, int n, int k, int slices, int row_steps,
                           int group_warps, int most_shares, int words_end) {
  using Window = Window<kNTiles * 8>;
  extern __shared__ __align__(128) char smem[];
  // Rings first: they want a multiple of their size.
  const unsigned shared =
      (shared_address(smem) + Words::kBytes - 1) / Words::kBytes * Words::kBytes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int groups = kRunWarps / group_warps, group = warp / group_warps;
  const unsigned slots_shared = shared + kRunWarps * Words::kBytes;
  const Slots slots(slots_shared + warp * Slots::kBytes);
  // Of two windows of x: that of the product, and that of the next one.
  unsigned x_shared = slots_shared + kRunWarps * Slots::kBytes + group * 2 * Window::kBytes,
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
    const int slice = block * group_warps + warp % group_warps;
    const int* my_steps = steps + static_cast<long long>(slice) * row_steps;
    int step = first * Window::kSteps;
    const int last_step = min(last * Window::kSteps, row_steps);
    // While the last kernel runs, which may be about to write the steps, they are a guess.
    Range guess = {0, 0}, range = {0, 0};
    if (slice < slices) guess = {__ldcg(my_steps + step), __ldcg(my_steps + last_step)};
    if (is_first) {
      guess = within({0, words_end}, guess);
      prefetch(all_words + guess.begin, (guess.end - guess.begin) * 4ll);
      wait_for_last_kernel();
    }
    Words words(shared + warp * Words::kBytes, all_words, guess);
    int end = 0, row_of_lane = -1;
    if (slice < slices) {
      range = {__ldcg(my_steps + step), __ldcg(my_steps + last_step)};
      end = my_steps[min(step + 1, last_step)];
      if (slice * kWarp + lane < n) row_of_lane = slice * kWarp + lane;
    }
    if (kStartsEarly && range != guess) words.begin_again(all_words, range);
    int word = range.begin;
    float acc[2][kNTiles][4] = {};
    if (first < last) x_window.copy(x_shared, first);
    int sent = words.sent();
    for (int window = first; window < last; ++window) {
      words.wait_for_others(sent);
      publish_to_warpgroups();
      sync_warps(1 + group, group_warps);  // x is there, and nobody needs the last one any more
      if (window + 1 < last) x_window.copy(next_x_shared, window + 1);
      sent = words.sent();
      const int window_end = min((window + 1) * Window::kSteps, last_step);
      for (unsigned at = x_shared; step < window_end; ++step, at += Window::kStepBytes) {
        const bool has_rows = slice < slices;
        const int next_end = has_rows ? my_steps[min(step + 2, last_step)] : 0;
        if (has_warpgroups()) {
          multiply_together<T, kNTiles>(acc, words, slots, word, end, at, has_rows);
        } else if (has_rows) {
          multiply<T, kNTiles>(acc, words, slots, word, end, at);
        }
        word = end;
        end = next_end;
      }
      const unsigned done = x_shared;
      x_shared = next_x_shared;
      next_x_shared = done;
    }
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
