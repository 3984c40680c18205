// Operands of training in E4M3. Each tensor has a scale, a power of two that lies in memory:
// what is stored is the value times it, finite ones within 448 (an infinity or a NaN is NaN). What
// is largest in a tensor is noted beside, for the scale of the next step: as the bits of a float,
// so that a NaN is the largest of all; notes are a maximum, the same in any order.
#include "bitmap.cuh"

namespace sk {

constexpr int kFloat8Threads = 256;

// The value times a scale in E4M3, and the largest of all.
struct AsE4m3 {
  using Value = float;
  using Slot = unsigned char;
  using FourSlots = unsigned;
  float scale;
  unsigned largest;

  __device__ float scaled(float value) {
    largest = max(largest, __float_as_uint(value) & 0x7fffffffu);
    return is_finite(value) ? value * scale : __uint_as_float(0x7fffffff);
  }
  __device__ unsigned short round(float value) {
    return static_cast<unsigned short>(round_to_e4m3(scaled(value), 0));
  }
  __device__ static unsigned four(unsigned low, unsigned high) {
    return __byte_perm(low, high, 0x6420);
  }
};

// Called by whole warps.
__device__ inline void note(unsigned largest, unsigned* noted) {
  const int lane = threadIdx.x % kWarp;
  for (int other = kWarp / 2; other; other /= 2) {
    largest = max(largest, __shfl_sync(kAllLanes, largest, lane ^ other));
  }
  // Most find a larger one there already.
  if (lane == 0 && largest > *noted) atomicMax(noted, largest);
}

// The 16 values from `at` on.
__device__ inline void load_sixteen(const unsigned short* at, float (&values)[16]) {
  const uint4* parts = reinterpret_cast<const uint4*>(at);
  for (int i = 0; i < 2; ++i) {
    const uint4 eight = parts[i];
    for (int j = 0; j < 4; ++j) {
      values[8 * i + 2 * j] = Convert<bf16>::low(word(eight, j));
      values[8 * i + 2 * j + 1] = Convert<bf16>::high(word(eight, j));
    }
  }
}
__device__ inline void load_sixteen(const float* at, float (&values)[16]) {
  const uint4* parts = reinterpret_cast<const uint4*>(at);
  for (int i = 0; i < 4; ++i) {
    const uint4 four = parts[i];
    for (int j = 0; j < 4; ++j) values[4 * i + j] = __uint_as_float(word(four, j));
  }
}

template <class Element>
__device__ void cast(const Element* x, const float* scale, uint4* x8, unsigned* noted,
                     unsigned sixteens) {
  AsE4m3 form = {*scale, 0};
  const unsigned step = gridDim.x * kFloat8Threads;
  for (unsigned i = blockIdx.x * kFloat8Threads + threadIdx.x; i < sixteens; i += step) {
    float values[16];
    load_sixteen(x + 16ull * i, values);
    unsigned four[4];
    for (int j = 0; j < 4; ++j) {
      const float* v = values + 4 * j;
      const unsigned low = round_to_e4m3(form.scaled(v[0]), form.scaled(v[1]));
      four[j] = low | round_to_e4m3(form.scaled(v[2]), form.scaled(v[3])) << 16;
    }
    x8[i] = {four[0], four[1], four[2], four[3]};
  }
  note(form.largest, noted);
}

constexpr unsigned kTurnTile = 128;                  // rows and columns
constexpr unsigned kTurnStride = kTurnTile / 4 + 1;  // words of a column in shared memory
constexpr unsigned kTurnBytes = 4 * kTurnTile * kTurnStride;
static_assert(kTurnBytes <= 48 * 1024);

// Byte i of each of four words: word i.
__device__ inline void turn_four(const unsigned (&rows)[4], unsigned (&columns)[4]) {
  const unsigned low01 = __byte_perm(rows[0], rows[1], 0x5140);
  const unsigned high01 = __byte_perm(rows[0], rows[1], 0x7362);
  const unsigned low23 = __byte_perm(rows[2], rows[3], 0x5140);
  const unsigned high23 = __byte_perm(rows[2], rows[3], 0x7362);
  columns[0] = __byte_perm(low01, low23, 0x5410);
  columns[1] = __byte_perm(low01, low23, 0x7632);
  columns[2] = __byte_perm(high01, high23, 0x5410);
  columns[3] = __byte_perm(high01, high23, 0x7632);
}

// out [columns, rows] = x [rows, columns], bytes; both are multiples of 16. A block turns a tile
// around in shared memory, where column c is at (c % 4) * 32 + c / 4: no two lanes meet in a bank.
// Where there are `sums`, [rows / 128, columns], they are those of each column's E4M3 in a tile.
__device__ inline void transpose(const unsigned char* x, unsigned char* out, float* sums,
                                 unsigned rows, unsigned columns) {
  extern __shared__ __align__(16) char smem[];
  unsigned* tile = reinterpret_cast<unsigned*>(smem);
  const unsigned across = (columns + kTurnTile - 1) / kTurnTile;
  const unsigned first_row = blockIdx.x / across * kTurnTile;
  const unsigned first_column = blockIdx.x % across * kTurnTile;
  const unsigned eighth = threadIdx.x % 8, group = threadIdx.x / 8;  // group: 4 rows of the tile
  const unsigned row = first_row + 4 * group, column = first_column + 16 * eighth;
  uint4 parts[4] = {};
  if (row < rows && column < columns) {
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
      parts[i] = *reinterpret_cast<const uint4*>(x + (row + i) * 1ull * columns + column);
    }
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const unsigned four[4] = {word(parts[0], q), word(parts[1], q), word(parts[2], q),
                              word(parts[3], q)};
    unsigned turned[4];
    turn_four(four, turned);
#pragma unroll
    for (unsigned j = 0; j < 4; ++j) {
      tile[(j * 32 + 4 * eighth + q) * kTurnStride + group] = turned[j];
    }
  }
  __syncthreads();
  const unsigned to = first_row + 16 * eighth;
#pragma unroll
  for (unsigned turn = 0; turn < 4; ++turn) {
    const unsigned at = turn * 32 + group, from = first_column + at % 32 * 4 + at / 32;
    const unsigned* words = tile + at * kTurnStride + 4 * eighth;
    const uint4 sixteen = {words[0], words[1], words[2], words[3]};
    if (from < columns && to < rows) {
      *reinterpret_cast<uint4*>(out + from * 1ull * rows + to) = sixteen;
    }
    if (!sums) continue;  // all threads
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum += sum_of_e4m3(word(sixteen, i) & 0xffff) + sum_of_e4m3(word(sixteen, i) >> 16);
    }
    for (int other = 1; other < 8; other *= 2) {
      sum += __shfl_sync(kAllLanes, sum, static_cast<int>(threadIdx.x % kWarp) ^ other);
    }
    if (eighth == 0 && from < columns) sums[first_row / kTurnTile * columns + from] = sum;
  }
}

}  // namespace sk

// x8 of x, 16 values at a time.
extern "C" __global__ void __launch_bounds__(sk::kFloat8Threads)
    sk_float8_cast_bf16(const unsigned short* x, const float* scale, uint4* x8, unsigned* noted,
                        int sixteens) {
  sk::cast(x, scale, x8, noted, sixteens);
}
SK_KERNEL(sk_float8_cast_bf16)

extern "C" __global__ void __launch_bounds__(sk::kFloat8Threads)
    sk_float8_cast_f32(const float* x, const float* scale, uint4* x8, unsigned* noted,
                       int sixteens) {
  sk::cast(x, scale, x8, noted, sixteens);
}
SK_KERNEL(sk_float8_cast_f32)

// The largest of `largest` [count], which are not negative.
extern "C" __global__ void __launch_bounds__(sk::kFloat8Threads)
    sk_float8_note(const unsigned* largest, unsigned* noted, int count) {
  unsigned found = 0;
  const int step = gridDim.x * sk::kFloat8Threads;
  for (int i = blockIdx.x * sk::kFloat8Threads + threadIdx.x; i < count; i += step) {
    found = max(found, largest[i]);
  }
  sk::note(found, noted);
}
SK_KERNEL(sk_float8_note)

extern "C" __global__ void __launch_bounds__(sk::kFloat8Threads)
    sk_float8_transpose(const unsigned char* x, unsigned char* out, float* sums, int rows,
                        int columns) {
  sk::transpose(x, out, sums, rows, columns);
}
SK_KERNEL(sk_float8_transpose)

// The slots of W, [N, K / 2], and `rest` after them; K is a multiple of 32.
extern "C" __global__ void __launch_bounds__(sk::kBitmapThreads)
    sk_float8_fill(const sk::Word* words, const int* starts, const float* values,
                   const float* scale, unsigned* noted, const uint4* rest, unsigned char* operand,
                   int count, int row_words, int n, int k, int parts) {
  sk::AsE4m3 form = {*scale, 0};
  sk::fill(form, words, starts, values, rest, operand, count, row_words, n, k, parts);
  sk::note(form.largest, noted);
}
SK_KERNEL(sk_float8_fill)

// The slots of W^T, [K, N / 2], and `rest` after them; N is a multiple of 32.
extern "C" __global__ void __launch_bounds__(sk::kBitmapThreads)
    sk_float8_fill_transposed(const sk::Word* words, const int* starts, const float* values,
                              const float* scale, const uint4* rest, unsigned char* operand,
                              int row_words, int n, int k, int parts) {
  sk::AsE4m3 form = {*scale, 0};
  sk::fill_transposed(form, words, starts, values, rest, operand, row_words, n, k, parts);
}
SK_KERNEL(sk_float8_fill_transposed)
