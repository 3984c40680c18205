// y[M, N] = x[M, K] @ W[N, K]^T + bias[N] on Hopper's tensor cores, W packed as pairs.cuh says: for
// more tokens than spmm_pairs.cu takes, and for as many, where x is what that one waits for.
//
// Warps are specialised. Four of them bring x, a step of 64 columns at a time, into rings of
// `stages` places; the others multiply, and meet nobody but the three of their warpgroup and the
// one that takes the same words: a warp has 16 rows of a slice of 32. A place of a ring has two
// barriers, `full` and `empty`, so a warpgroup goes on while others are still behind.
//
// A block has one or more groups of warpgroups, each with its part of K and its own ring. Runs are
// as runs.cuh says, a window is a step. The first of `token_tiles` blocks has the first kTokens
// tokens, and so on; those of the same rows run at the same time, so that W is read once.
#include "launch.cuh"
#include "pairs_words.cuh"
#include "runs.cuh"

namespace sk {

constexpr int kRingProducers = 4;           // warps that bring x
constexpr unsigned kRingWordsBytes = 6144;  // of words, two for two warps
constexpr unsigned kMostStages = 8;         // of a ring
constexpr unsigned kRingBarrierBytes = 1024;
constexpr int kRingBarrier = 15;  // of all that multiply
constexpr int kMostWarpgroups = 4, kRingThreads = (kMostWarpgroups + 1) * 128;
// Of a thread; a launch has so many a thread, and who takes more waits for those that others give.
constexpr int kLaunchRegisters = 65536 / kRingThreads / 8 * 8;
constexpr int kProducerRegisters = 32, kConsumerRegisters = 112;
static_assert(kMostWarpgroups * kConsumerRegisters + kProducerRegisters <=
                  kLaunchRegisters * (kMostWarpgroups + 1),
              "all get theirs");

// The place of a ring that is next, and which time it is.
struct Place {
  unsigned stage = 0, phase = 0;

  __device__ void advance(unsigned stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// A ring in shared memory, of x as [stage][token][64 columns], zeros beyond K, as describe_rows
// wants it. Beyond the last token lies anything: those sums go nowhere.
template <int kTokens>
struct Ring {
  static constexpr unsigned kStageBytes = kTokens * kStepColumns * 2;

  unsigned shared, barriers, stages;

  __device__ unsigned x(const Place& at) const { return shared + at.stage * kStageBytes; }
  __device__ unsigned full(const Place& at) const { return barriers + at.stage * 8; }
  __device__ unsigned empty(const Place& at) const { return full(at) + kMostStages * 8; }

  // By one thread, with the numbers of warps that fill and read it.
  __device__ void init(int writers, int readers) const {
    for (Place at; at.stage < stages; ++at.stage) {
      init_barrier(full(at), writers);
      init_barrier(empty(at), readers);
    }
  }
};

// Brings x to a ring: `writers` warps do it together, this one is `writer`.
template <int kTokens>
class Producer {
 public:
  __device__ Producer(const Ring<kTokens>& ring, const unsigned short* x, int tokens, int k,
                      int writer, int writers)
      : ring_(ring), x_(x), k_(k), tokens_(tokens), turn_(writers * 4) {
    const int lane = threadIdx.x % kWarp;
    first_ = writer * 4 + lane / 8;
    chunk_ = lane % 8;
    is_aligned_ = k % 8 == 0 && reinterpret_cast<unsigned long long>(x) % 16 == 0;
  }

  // Up to three stages are under way. The oldest is published before the next place has to be free:
  // who reads that one gives it back when he has begun with the next.
  __device__ void bring(int first_step, int end_step) {
    const int ahead = min(static_cast<int>(ring_.stages) - 1, 3);
    Place done = next_;
#pragma unroll 1
    for (int step = first_step; step < end_step; ++step) {
      if (step - first_step >= ahead) {
        if (ahead == 3) {
          wait_copies<2>();
        } else if (ahead == 2) {
          wait_copies<1>();
        } else {
          wait_copies<0>();
        }
        publish(done);
      }
      wait_barrier(ring_.empty(next_), next_.phase ^ 1);
      copy(ring_.x(next_), step);
      next_.advance(ring_.stages);
    }
    wait_copies<0>();
    while (done.stage != next_.stage || done.phase != next_.phase) publish(done);
  }

 private:
  // Says that the copies of this warp into a place have come.
  __device__ void publish(Place& at) const {
    publish_to_warpgroups();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) arrive_at(ring_.full(at));
    at.advance(ring_.stages);
  }

  __device__ void copy(unsigned shared, int step) const {
    // Rows of 8 chunks; the rows of a thread are alike modulo 4, and modulo 8 or in turns.
    const int col = step * kStepColumns + chunk_ * 8;
    if (col + 8 <= k_ && is_aligned_) {
      const unsigned short* from = x_ + (static_cast<long long>(first_) * k_ + col);
#pragma unroll 4
      for (int token = first_; token < tokens_; token += turn_) {
        copy_async<16>(shared + token * 128 + (chunk_ ^ (token & 7)) * 16, from);
        from += static_cast<long long>(turn_) * k_;
      }
    } else {
#pragma unroll 1
      for (int token = first_; token < tokens_; token += turn_) {
        const unsigned short* from = x_ + (static_cast<long long>(token) * k_ + col);
        unsigned words[4] = {};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (col + i < k_) words[i / 2] |= static_cast<unsigned>(from[i]) << i % 2 * 16;
        }
        store_shared(shared + token * 128 + (chunk_ ^ (token & 7)) * 16,
                     {words[0], words[1], words[2], words[3]});
      }
    }
    commit_copies();
  }

  const Ring<kTokens> ring_;
  const unsigned short* x_;
  const int k_, tokens_, turn_;  // tokens at a time
  int first_, chunk_;
  bool is_aligned_;
  Place next_;
};

// acc += `count` steps of the slice's words times x of a ring.
template <class V, class Words, int kTokens>
__device__ inline void multiply_ring(float (&acc)[1][kTokens / 8][4], Words& words, int count,
                                     int tile, const Ring<kTokens>& ring, Place& place) {
  const bool is_first_lane = threadIdx.x % kWarp == 0;
  using X = typename Stored<V>::X;
  // Operands; with four of a few tokens, values of 8 bits would not stay in registers.
  constexpr int kAhead = kIsScaled<V> && kTokens == 32 ? 2 : 4;
  unsigned a[kAhead][4] = {};
  Place last;
  for (int step = 0; step < count; ++step) {
    Slots<V> slots(words, tile);
    wait_barrier(ring.full(place), place.phase);
    const unsigned long long x = describe_rows(ring.x(place));
#pragma unroll
    for (int i = 0; i < kSixteens; ++i) {
      unsigned (&operand)[4] = a[i % kAhead];
      wait_warpgroup_products<kAhead - 1>();  // this operand is free
      // So is what the products of the last step have read.
      if (i == kAhead - 1 && step && is_first_lane) arrive_at(ring.empty(last));
      slots.load(operand, i);
      begin_warpgroup_products();
      mma_warpgroup<X>(acc[0], operand, x + i * 2);
      commit_warpgroup_products();
    }
    last = place;
    place.advance(ring.stages);
  }
  wait_warpgroup_products<0>();
  if (count && is_first_lane) arrive_at(ring.empty(last));
}

template <class V, int kTokens>
__device__ void spmm_pairs_ring(const unsigned* all_words, const int* steps, const float* scales,
                                const unsigned short* x, const unsigned short* bias,
                                unsigned short* y, float* partial, int* arrived, int all_tokens,
                                int n, int k, int slices, int row_steps, int groups, int stages,
                                int token_tiles, int most_shares, int words_end) {
  using Words = sk::Words<kRingWordsBytes, 2>;
  extern __shared__ __align__(128) char smem[];
  const unsigned barriers = shared_address(smem);
  const unsigned shared = (barriers + kRingBarrierBytes + 1023) / 1024 * 1024;
  char* const tile_memory = smem + (shared - barriers);
  const int lane = threadIdx.x % kWarp;
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0);  // uniform
  const int consumers = blockDim.x / kWarp - kRingProducers, group_warps = consumers / groups;
  const bool is_consumer = warp < consumers;
  const int group = is_consumer ? warp / group_warps : (warp - consumers) % groups;
  const int writers = (kRingProducers - 1 - group) / groups + 1;
  const unsigned stage_bytes = Ring<kTokens>::kStageBytes;
  const Ring<kTokens> ring = {shared + group * stages * stage_bytes,
                              barriers + group * 2 * kMostStages * 8,
                              static_cast<unsigned>(stages)};
  const unsigned words_shared = shared + groups * stages * stage_bytes;
  const unsigned word_barriers = barriers + 4 * 2 * kMostStages * 8;

  const int rows = group_warps * 16, block_slices = group_warps / 2;
  const int runs = gridDim.x / token_tiles, run = blockIdx.x / token_tiles;
  const int token_tile = blockIdx.x % token_tiles, first_token = token_tile * kTokens;
  const int tokens = min(kTokens, all_tokens - first_token);
  const int blocks = (slices + block_slices - 1) / block_slices;
  const int units = blocks * row_steps;
  const int run_first = run_begin(run, runs, units), run_end = run_begin(run + 1, runs, units);

  require_warpgroups();
  let_next_kernel_start();
  if (warp % group_warps == 0 && is_consumer && lane == 0) {
    ring.init(writers, group_warps);
  }
  if (!is_consumer) {
    __syncthreads();  // barriers are made
    give_registers<kProducerRegisters>();
    wait_for_last_kernel();
    Producer<kTokens> producer(ring, x + static_cast<long long>(first_token) * k, tokens, k,
                               (warp - consumers) / groups, writers);
    for (int unit = run_first; unit < run_end;) {
      const int first = unit % row_steps, count = min(row_steps - first, run_end - unit);
      producer.bring(first + count * group / groups, first + count * (group + 1) / groups);
      unit += count;
      __syncthreads();  // sums have taken the place of x
    }
    return;
  }

  const int pair = warp / 2;
  Words words(all_words, words_shared + pair * Words::kBytes,
              word_barriers + pair * Words::kBarrierBytes, 1 + pair, warp % 2);
  __syncthreads();
  take_registers<kConsumerRegisters>();
  Place place;
  for (int unit = run_first; unit < run_end;) {
    // Of steps [first, first + count) of these rows, the groups take equal parts.
    const int block = unit / row_steps, first = unit % row_steps;
    const int count = min(row_steps - first, run_end - unit);
    const bool is_first = unit == run_first;
    unit += count;
    const int my_first = first + count * group / groups;
    const int my_count = first + count * (group + 1) / groups - my_first;
    // Warps beyond the last slice do its work once more, and their sums go nowhere.
    const int own_slice = block * block_slices + warp % group_warps / 2;
    const int* my_steps =
        steps + (static_cast<long long>(min(own_slice, slices - 1)) * row_steps + my_first);
    if (is_first) {
      // While the last kernel runs, which may be about to write the steps, they are a guess.
      const Range guess = within({0, words_end}, {__ldcg(my_steps), __ldcg(my_steps + my_count)});
      prefetch(all_words + guess.begin, (guess.end - guess.begin) * 4ll);
      wait_for_last_kernel();
    }
    publish_to_warpgroups();  // that sums of other rows are not in the way of words
    __syncwarp();
    words.begin(my_steps, my_count);
    float acc[1][kTokens / 8][4] = {};
    multiply_ring<V>(acc, words, my_count, warp % 2, ring, place);
    const int row = own_slice * kWarp + warp % 2 * 16 + lane;
    const int row_of_lane = lane < 16 && row < n ? row : -1;
    int opaque_tile = token_tile;
    asm volatile("" : "+r"(opaque_tile));  // the pointers that follow from it wait in no registers
    const long long tile = opaque_tile;
    const auto sum_stored = [&](int token, int of_w) {
      return sum_pairs<V>(all_words, steps, x + (tile * kTokens + token) * k, of_w, row_steps,
                          first, first + count);
    };
    const Part part = {block, rows, consumers, groups, group,
                       run,   runs, row_steps, units,  most_shares};
    finish<V, kRingBarrier>(acc, row_of_lane, tile_memory, scales, bias, y + tile * kTokens * n,
                            partial + tile * blocks * most_shares * kTokens * rows,
                            arrived + tile * blocks, tokens, n, part, sum_stored);
    __syncthreads();
  }
}

}  // namespace sk

#define SK_PAIRS_RING(name, type, tokens)                                                         \
  extern "C" __global__ void __launch_bounds__(sk::kRingThreads, 1)                               \
      name(const unsigned* words, const int* steps, const float* scales, const unsigned short* x, \
           const unsigned short* bias, unsigned short* y, float* partial, int* arrived, int m,    \
           int n, int k, int slices, int row_steps, int groups, int stages, int token_tiles,      \
           int most_shares, int words_end) {                                                      \
    sk::spmm_pairs_ring<sk::type, tokens>(words, steps, scales, x, bias, y, partial, arrived, m,  \
                                          n, k, slices, row_steps, groups, stages, token_tiles,   \
                                          most_shares, words_end);                                \
  }                                                                                               \
  SK_EARLY_KERNEL(name)

// With values of 8 bits up to 64 tokens alone.
#define SK_PAIRS_RING_FEW(type)                            \
  SK_PAIRS_RING(sk_spmm_pairs_ring_##type##_t32, type, 32) \
  SK_PAIRS_RING(sk_spmm_pairs_ring_##type##_t64, type, 64)
#define SK_PAIRS_RING_TOKENS(type)                         \
  SK_PAIRS_RING_FEW(type)                                  \
  SK_PAIRS_RING(sk_spmm_pairs_ring_##type##_t96, type, 96) \
  SK_PAIRS_RING(sk_spmm_pairs_ring_##type##_t128, type, 128)

SK_PAIRS_RING_TOKENS(bf16)
SK_PAIRS_RING_TOKENS(f16)
SK_PAIRS_RING_FEW(int8)
SK_PAIRS_RING_FEW(e4m3)
