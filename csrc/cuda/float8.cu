// Operands of training in E4M3. Each tensor has a scale, a power of two that lies in memory:
// what is stored is the value times it, finite ones within 448 (an infinity or a NaN is NaN). What
// is largest in a tensor is noted beside, for the scale of the next step: as the bits of a float,
// so that a NaN is the largest of all; notes are a maximum, the same in any order.
#include "bitmap.cuh"

namespace sk {

constexpr int kFloat8Threads = 256;

// A scale, and the largest of all values that it was put to.
struct Scaled {
  float scale;
  unsigned largest;

  __device__ float operator()(float value) {
    largest = max(largest, __float_as_uint(value) & 0x7fffffffu);
    return is_finite(value) ? value * scale : __uint_as_float(0x7fffffff);
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

// The largest of `largest` [count], which are not negative, by `blocks` blocks of which this one is
// number `block`.
__device__ inline void note_all(const unsigned* largest, unsigned* noted, unsigned count,
                                unsigned block, unsigned blocks) {
  unsigned found = 0;
  for (unsigned i = block * kFloat8Threads + threadIdx.x; i < count; i += blocks * kFloat8Threads) {
    found = max(found, largest[i]);
  }
  note(found, noted);
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
  Scaled scaled = {*scale, 0};
  const unsigned step = gridDim.x * kFloat8Threads;
  for (unsigned i = blockIdx.x * kFloat8Threads + threadIdx.x; i < sixteens; i += step) {
    float values[16];
    load_sixteen(x + 16ull * i, values);
    unsigned four[4];
    for (int j = 0; j < 4; ++j) {
      const float* v = values + 4 * j;
      const unsigned low = round_to_e4m3(scaled(v[0]), scaled(v[1]));
      four[j] = low | round_to_e4m3(scaled(v[2]), scaled(v[3])) << 16;
    }
    x8[i] = {four[0], four[1], four[2], four[3]};
  }
  note(scaled.largest, noted);
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
                                 unsigned rows, unsigned columns, unsigned block) {
  extern __shared__ __align__(16) char smem[];
  unsigned* tile = reinterpret_cast<unsigned*>(smem);
  const unsigned across = (columns + kTurnTile - 1) / kTurnTile;
  const unsigned first_row = block / across * kTurnTile;
  const unsigned first_column = block % across * kTurnTile;
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

// total [columns] = the sum of sums [parts, columns], times a factor: a column each.
__device__ inline void add_up(const float* sums, const float* factor, float* total, unsigned parts,
                              unsigned columns, unsigned block) {
  const unsigned column = block * kFloat8Threads + threadIdx.x;
  if (column >= columns) return;
  float sum = 0;
#pragma unroll 8
  for (unsigned part = 0; part < parts; ++part) sum += sums[part * 1ull * columns + column];
  total[column] = sum * *factor;
}

// Operands of 2:4 products: the slots of W, [N, K / 2], and of W^T, [K, N / 2], each followed by
// what the library wants there. W has at most two of four neighbours along both axes, N and K are
// multiples of 32. A block rounds the values of 128 rows of a word, each once, and puts them in
// shared memory as they are stored, then at their places: rows are read from the first, columns
// from the second. Slots are as bitmap.cuh has them.

constexpr unsigned kStoredBytes = 40;  // of a row: at most 32 of 64 places are stored, and 2 words
constexpr unsigned kOctetBytes = kTileRows + 8;  // of an octet's bits: no two share a bank
constexpr unsigned kPlaceWords = kTileRows * kWordColumns / 4 + kTileRows / 8 * 2;
constexpr unsigned kFillBytes = 4 * kPlaceWords + kOctets * kOctetBytes + kTileRows * kStoredBytes;
static_assert(kFillBytes <= 48 * 1024);

// Where row `row` of a tile begins, in words. No two of 16 rows that are 8 apart share a bank.
__device__ inline unsigned place_row(unsigned row) {
  return row * (kWordColumns / 4) + row / 8 * 2;
}

constexpr unsigned kNoByte = 4;  // of __byte_perm(word, 0, ...)

// Which bytes of a word go to the two slots of four neighbours: those at `first` and `second`.
__device__ inline unsigned slot_bytes(unsigned four, unsigned first, unsigned second) {
  const Slots slots = slots_of(four);
  return (slots.is_first ? first : kNoByte) | (slots.is_second ? second : kNoByte) << 4;
}

// Bytes for four neighbours, of which `four` are stored, from `next` on.
__device__ inline unsigned place_bytes(unsigned four, unsigned next) {
  unsigned places = 0;
#pragma unroll
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned is_here = four >> i & 1;
    places |= (is_here ? next : kNoByte) << 4 * i;
    next += is_here;
  }
  return places;
}

// The slots of an octet: `bits` are stored, and their bytes are those of `stored`.
__device__ inline unsigned slots_of_stored(unsigned bits, unsigned stored) {
  const unsigned low = bits & 15, high = bits >> 4, next = __popc(low);
  const unsigned of_low = slot_bytes(low, 0, slots_of(low).is_first);
  const unsigned of_high = slot_bytes(high, next, next + slots_of(high).is_first);
  return __byte_perm(stored, 0, of_low | of_high << 8);
}

// The slots of four neighbours, of which `four` are stored, from the bytes at their places.
__device__ inline unsigned slots_of_places(unsigned four, unsigned places) {
  // Two bits for each `four`: the first that is stored, and the last.
  constexpr unsigned kFirst = 0x12131210, kLast = 0xffffaa50;
  return __byte_perm(places, 0,
                     slot_bytes(four, kFirst >> four * 2 & 3, kLast >> four * 2 & 3) | 0x4400);
}

__device__ inline void fill_both(Scaled& scaled, const Word* words, const int* starts,
                                 const float* values, unsigned char* operand,
                                 unsigned char* operand_t, unsigned row_words, unsigned n,
                                 unsigned k, unsigned block) {
  extern __shared__ __align__(16) char smem[];
  auto places = reinterpret_cast<unsigned*>(smem);                           // by place_row()
  auto octet_bits = reinterpret_cast<unsigned char*>(places + kPlaceWords);  // [octet][136]
  unsigned char* stored = octet_bits + kOctets * kOctetBytes;                // [row][40]
  const unsigned first_row = block / row_words * kTileRows, word = block % row_words;
  const unsigned octet = threadIdx.x % kOctets;
  constexpr unsigned kRows = kTileRows / kBlockWords;     // of a thread
  constexpr unsigned kEach = kWordColumns / 2 / kOctets;  // values of a row that it rounds
  Word bits[kRows];
  float found[kRows][kEach];
#pragma unroll
  for (unsigned t = 0; t < kRows; ++t) {
    const unsigned row = first_row + t * kBlockWords + threadIdx.x / kOctets;
    const unsigned at = min(row, n - 1) * row_words + word;
    bits[t] = row < n ? words[at] : 0;
    const unsigned count = __popcll(bits[t]);
    const float* from = values + starts[at] + octet;
#pragma unroll
    for (unsigned i = 0; i < kEach; ++i) {
      found[t][i] = 0;
      if (i * kOctets + octet < count) found[t][i] = from[i * kOctets];
    }
  }
#pragma unroll
  for (unsigned t = 0; t < kRows; ++t) {
    const unsigned row = t * kBlockWords + threadIdx.x / kOctets;
    unsigned char* to = stored + row * kStoredBytes + octet;
#pragma unroll
    for (unsigned i = 0; i < kEach; i += 2) {
      const unsigned two = round_to_e4m3(scaled(found[t][i]), scaled(found[t][i + 1]));
      to[i * kOctets] = static_cast<unsigned char>(two);
      to[(i + 1) * kOctets] = static_cast<unsigned char>(two >> 8);
    }
  }
  __syncwarp();  // a row is of one warp
  const unsigned first_column = word * kWordColumns + octet * 8;
#pragma unroll
  for (unsigned t = 0; t < kRows; ++t) {
    const unsigned row = t * kBlockWords + threadIdx.x / kOctets;
    const unsigned before = __popcll(bits[t] & ((Word{1} << octet * 8) - 1));
    const unsigned mine = static_cast<unsigned>(bits[t] >> octet * 8) & 0xffu;
    auto from = reinterpret_cast<const unsigned*>(stored + row * kStoredBytes + (before & ~3u));
    const unsigned four = __byte_perm(from[0], from[1], 0x3210 + 0x1111 * (before % 4));
    if (first_row + row < n && first_column < k) {
      *reinterpret_cast<unsigned*>(operand + (first_row + row) * 1ull * (k / 2) +
                                   first_column / 2) = slots_of_stored(mine, four);
    }
    octet_bits[octet * kOctetBytes + row] = static_cast<unsigned char>(mine);
    const unsigned low = place_bytes(mine & 15, 0),
                   high = place_bytes(mine >> 4, __popc(mine & 15));
    *reinterpret_cast<uint2*>(places + place_row(row) + octet * 2) = {__byte_perm(four, 0, low),
                                                                      __byte_perm(four, 0, high)};
  }
  if (!operand_t) return;  // all threads
  __syncthreads();
  const unsigned row_octet = threadIdx.x % kTileOctets, columns = threadIdx.x / kTileOctets;
  const unsigned row = row_octet * 8, column = word * kWordColumns + columns * 4;
  if (first_row + row >= n || column >= k) return;
  const Word of_rows = *reinterpret_cast<const Word*>(octet_bits + columns / 2 * kOctetBytes + row);
  const auto of_columns =
      static_cast<unsigned>(transpose_bits(of_rows) >> columns % 2 * 32);  // a byte each
  unsigned turned[2][4];
#pragma unroll
  for (unsigned half = 0; half < 2; ++half) {
    unsigned four[4];
#pragma unroll
    for (unsigned i = 0; i < 4; ++i)
      four[i] = places[place_row(row) + (half * 4 + i) * 16 + columns];
    turn_four(four, turned[half]);
  }
  unsigned char* to = operand_t + column * 1ull * (n / 2) + (first_row + row) / 2;
#pragma unroll
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned mine = of_columns >> 8 * i & 0xff;
    *reinterpret_cast<unsigned*>(to + i * 1ull * (n / 2)) =
        slots_of_places(mine & 15, turned[0][i]) | slots_of_places(mine >> 4, turned[1][i]) << 16;
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

// The largest of `largest` [count], by half of the blocks, and of `others` [other_count].
extern "C" __global__ void __launch_bounds__(sk::kFloat8Threads)
    sk_float8_note(const unsigned* largest, unsigned* noted, const unsigned* others,
                   unsigned* noted_other, int count, int other_count) {
  const unsigned half = gridDim.x / 2;
  if (blockIdx.x < half) {
    sk::note_all(largest, noted, count, blockIdx.x, half);
  } else {
    sk::note_all(others, noted_other, other_count, blockIdx.x - half, half);
  }
}
SK_KERNEL(sk_float8_note)

// Of the first blocks, `noting` note what is largest, and the next ones `adding` add up the sums of
// columns that a launch before has made, [parts, added], into total [added].
extern "C" __global__ void __launch_bounds__(sk::kFloat8Threads)
    sk_float8_transpose(const unsigned char* x, unsigned char* out, float* sums,
                        const unsigned* largest, unsigned* noted, const float* added,
                        const float* factor, float* total, int rows, int columns, int noting,
                        int count, int adding, int parts, int added_columns) {
  const int block = blockIdx.x;
  if (block < noting) {
    sk::note_all(largest, noted, count, block, noting);
  } else if (block < noting + adding) {
    sk::add_up(added, factor, total, parts, added_columns, block - noting);
  } else {
    sk::transpose(x, out, sums, rows, columns, block - noting - adding);
  }
}
SK_KERNEL(sk_float8_transpose)

// Of W, and of W^T unless that is null; noted is raised to the largest value. Of the first blocks,
// `noting` note what is largest in x, and the next ones copy what follows the slots of each.
extern "C" __global__ void __launch_bounds__(sk::kFloat8Threads)
    sk_float8_fill(const sk::Word* words, const int* starts, const float* values,
                   const float* scale, unsigned* noted, const unsigned* largest, unsigned* noted_x,
                   const uint4* rest, const uint4* rest_t, unsigned char* operand,
                   unsigned char* operand_t, int row_words, int n, int k, int noting, int count,
                   int parts, int parts_t) {
  constexpr int kThreads = sk::kFloat8Threads;
  int block = blockIdx.x;
  if (block < noting) {
    sk::note_all(largest, noted_x, count, block, noting);
    return;
  }
  block -= noting;
  const int copying = (parts + parts_t + kThreads - 1) / kThreads;
  if (block < copying) {
    const int part = block * kThreads + threadIdx.x;
    const long long slots = n / 2 * static_cast<long long>(k);
    if (part < parts) {
      reinterpret_cast<uint4*>(operand + slots)[part] = rest[part];
    } else if (part < parts + parts_t) {
      reinterpret_cast<uint4*>(operand_t + slots)[part - parts] = rest_t[part - parts];
    }
    return;
  }
  sk::Scaled scaled = {*scale, 0};
  sk::fill_both(scaled, words, starts, values, operand, operand_t, row_words, n, k,
                block - copying);
  sk::note(scaled.largest, noted);
}
SK_KERNEL(sk_float8_fill)
