// How the kernels on tensor cores share out their work and add up what each has of it.
//
// A warp takes 32 rows, a slice. A block has 16 warps in groups of `group_warps` that take the same
// windows of columns: so a block of rows has group_warps * 32 rows, and each group its part of K.
// All windows of all blocks of rows are cut into runs of equal length, one for each thread block;
// runs that share rows leave their sums in `partial`, and the last one to arrive adds them up in a
// fixed order.
//
// A place that is not stored takes no part in a product, but a tensor core multiplies x there by
// the zero of an operand: NaN if x is infinite or NaN, and NaN stays. So a finite sum is right, and
// one that is not is computed anew from the stored values alone. That is rare and need not be fast.
#pragma once

#include "numbers.cuh"

namespace sk {

constexpr int kRunWarps = 16;  // of a block, one on each multiprocessor

// The bytes of W that a warp prefetches before it may read them.
constexpr unsigned kPrefetchBytes = 8192;

// Begins to bring what a warp reads first to L2: `bytes` of them, or the first kPrefetchBytes.
__device__ inline void prefetch(const void* from, long long bytes) {
  constexpr int kLine = 128;
  const unsigned most = bytes < kPrefetchBytes ? static_cast<unsigned>(bytes) : kPrefetchBytes;
  for (unsigned at = threadIdx.x % kWarp * kLine; at < most; at += kWarp * kLine) {
    prefetch_to_l2(static_cast<const char*>(from) + at);
  }
}

// The first window of run `run`, of `units` windows in all.
__device__ inline int run_begin(int run, int runs, int units) {
  return static_cast<int>(static_cast<long long>(run) * units / runs);
}
// The run that has window `unit`.
__device__ inline int run_of(int unit, int runs, int units) {
  return static_cast<int>((static_cast<long long>(unit + 1) * runs - 1) / units);
}

// y of one token and four rows.
template <class V>
__device__ inline void write(unsigned short* y, const float* scales, const unsigned short* bias,
                             int n, int token, int row, const float4& sum) {
  using X = typename Stored<V>::X;
  const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
  unsigned short four[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const float add = bias && row + r < n ? Convert<X>::low(bias[row + r]) : 0.0f;
    const float scale = scale_of<V>(scales, min(row + r, n - 1));
    four[r] = Convert<X>::round(fmaf(sums[r], scale, add));
  }
  unsigned short* out = y + static_cast<long long>(token) * n + row;
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

__device__ inline void add_to(float4& sum, const float4& add) {
  sum.x += add.x;
  sum.y += add.y;
  sum.z += add.z;
  sum.w += add.w;
}

__device__ inline bool is_finite(const float4& sum) {
  return fmaf(sum.x, 0.0f, fmaf(sum.y, 0.0f, fmaf(sum.z, 0.0f, sum.w * 0.0f))) == 0;
}

// What a thread block has of a block of rows, and who else has a share of it.
struct Part {
  int block, rows;    // the block of rows, and how many: a multiple of 4 that divides the threads
  int warps;          // of this thread block, that come here
  int groups, group;  // of warps that have a part of K each, and this thread's
  int run, runs;
  int windows, units;  // of a block of rows, of all
  int most_shares;
};

// Writes y of a block of rows, or adds this run's sums to those of the others. The first warps of
// the thread block come here, and shared memory from `smem` on is theirs. acc: of 16 kRowTiles rows
// as mma has them, row_of_lane: the row of W of each of these, -1 for none. sum_stored(token, row):
// this run's sum of stored values.
template <class V, int kBarrier = 0, int kRowTiles, int kNTiles, class SumStored>
__device__ inline void finish(const float (&acc)[kRowTiles][kNTiles][4], int row_of_lane,
                              char* smem, const float* scales, const unsigned short* bias,
                              unsigned short* y, float* partial, int* arrived, int tokens, int n,
                              const Part& part, const SumStored& sum_stored) {
  // Sums of the groups, [group][token][row], in shared memory: rows lie in the order of their
  // nnz.
  const int lane = threadIdx.x % kWarp, block = part.block, rows = part.rows;
  const int tile_row = rows + 4;  // floats
  float* tile = reinterpret_cast<float*>(smem);
  sync_warps(kBarrier, part.warps);
#pragma unroll
  for (int b = 0; b < 2 * kRowTiles; ++b) {
    const int row = __shfl_sync(kAllLanes, row_of_lane, b * 8 + lane / 4);
    if (row < 0) continue;
    float* out = tile + part.group * kNTiles * 8 * tile_row + row - block * rows;
#pragma unroll
    for (int i = 0; i < 2 * kNTiles; ++i) {
      const int token = i / 2 * 8 + lane % 4 * 2 + i % 2;
      out[token * tile_row] = acc[b / 2][i / 2][b % 2 * 2 + i % 2];
    }
  }
  sync_warps(kBarrier, part.warps);
  const int first_run = run_of(block * part.windows, part.runs, part.units);
  const int last_run = run_of(block * part.windows + part.windows - 1, part.runs, part.units);
  const int shares = last_run - first_run + 1, share = part.run - first_run;
  // A thread has four rows, and every turn-th token.
  const int row_quads = rows / 4, turn = part.warps * kWarp / row_quads;
  const int row = threadIdx.x % row_quads * 4, first_token = threadIdx.x / row_quads;
  const long long tile_quads = kNTiles * 8 * row_quads;
  float4* all = reinterpret_cast<float4*>(partial) + block * part.most_shares * tile_quads;
  for (int token = first_token; token < tokens; token += turn) {
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int g = 0; g < part.groups; ++g) {
      add_to(sum,
             *reinterpret_cast<const float4*>(tile + (g * kNTiles * 8 + token) * tile_row + row));
    }
    if (!is_finite(sum)) {
      float* four = tile + token * tile_row + row;  // this thread's, and read
      *reinterpret_cast<float4*>(four) = sum;
#pragma unroll 1
      for (int r = 0; r < 4; ++r) {
        const int of_w = block * rows + row + r;
        if (of_w < n && !is_finite(four[r])) four[r] = sum_stored(token, of_w);
      }
      sum = *reinterpret_cast<const float4*>(four);
    }
    if (shares == 1) {
      write<V>(y, scales, bias, n, token, block * rows + row, sum);
    } else {
      all[share * tile_quads + token * row_quads + row / 4] = sum;
    }
  }
  sync_warps(kBarrier, part.warps);  // the tile has been read, sums have been written
  if (shares == 1) return;

  int* before = reinterpret_cast<int*>(smem);
  if (threadIdx.x == 0) {
    __threadfence();  // after the barrier, so it orders the stores of all threads
    *before = atomicAdd(arrived + block, 1);
  }
  sync_warps(kBarrier, part.warps);
  const bool is_last = *before == shares - 1;
  sync_warps(kBarrier, part.warps);  // `before` has been read
  if (!is_last) return;
  __threadfence();
  if (threadIdx.x == 0) arrived[block] = 0;  // for the next launch
  constexpr int kTokens = kNTiles < 4 ? 1 : kRowTiles == 1 ? 2 : kNTiles / 2;  // at a time
  constexpr int kShares = 8 / kTokens < 4 ? 4 : 8 / kTokens;
  for (int token = first_token; token < tokens; token += kTokens * turn) {
    float4 sums[kTokens] = {};
    const float4* from = all + token * row_quads + row / 4;
#pragma unroll(kShares)
    for (int other = 0; other < shares; ++other) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        if (token + i * turn >= tokens) continue;
        add_to(sums[i], __ldcg(from + other * tile_quads + i * turn * row_quads));
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (token + i * turn >= tokens) break;
      write<V>(y, scales, bias, n, token + i * turn, block * rows + row, sums[i]);
    }
  }
}

}  // namespace sk
