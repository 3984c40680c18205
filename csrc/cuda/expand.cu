// W [N, K] dense, from packed W, for products of many tokens: +0 where nothing is stored; a stored
// zero is -0. Values of 8 bits become 16-bit floats, without the scales of their rows. Bytes: those
// of the pack and of W, once; each warp writes 16 bytes a lane.
#include "cover.cuh"
#include "gather.cuh"
#include "launch.cuh"
#include "mend.cuh"
#include "pairs.cuh"

namespace sk {

constexpr int kExpandWarps = 4;
constexpr int kOctet = 8;    // neighbours in a row, 16 bytes
constexpr int kTilePad = 8;  // elements beside a row of a tile: rows begin in other banks
// Shared memory of a warp: its tile, and what it decodes.
constexpr int kGatherTileColumns = 128;
constexpr int kExpandGatherBytes = kWarp * (kGatherTileColumns + kTilePad) * 2 + kWarp * 8;
constexpr int kExpandCoverBytes = kWarp * (kCoverColumns + kTilePad) * 2 + kMostRecordBytes;
constexpr int kExpandPairsBytes = kWarp * (kStepColumns + kTilePad) * 2 + kMostStepWords * 4;

// Neighbours of a row, at a multiple of 8, of which those before column k are written.
__device__ inline void write_octet(const uint4& octet, unsigned short* row, int column, int k) {
  if (k % kOctet == 0) {
    *reinterpret_cast<uint4*>(row + column) = octet;
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (column + i < k) {
        row[column + i] = static_cast<unsigned short>(word(octet, i / 2) >> i % 2 * 16);
      }
    }
  }
}

// A tile of W in shared memory, of 32 rows: a warp fills it and writes it out.
template <int kColumns>
struct Tile {
  static constexpr int kRow = kColumns + kTilePad;
  static constexpr int kBytes = kWarp * kRow * 2;
  static constexpr int kOctets = kColumns / kOctet;

  unsigned short* elements;

  __device__ void clear() const {
    for (int i = threadIdx.x % kWarp; i < kBytes / 16; i += kWarp) {
      reinterpret_cast<uint4*>(elements)[i] = {0, 0, 0, 0};
    }
  }

  // Writes row r to row_of(r) of w, from `column` on, if that is not below 0.
  template <class RowOf>
  __device__ void write(unsigned short* w, int column, int k, const RowOf& row_of) const {
    constexpr int kRows = kWarp / (kOctets < kWarp ? kOctets : kWarp);  // at a time
    const int lane = threadIdx.x % kWarp;
    const int at = lane % kOctets * kOctet;
    for (int r = lane / kOctets; r < kWarp; r += kRows) {
      const int row = row_of(r);
      if (row < 0 || column + at >= k) continue;
      write_octet(*reinterpret_cast<const uint4*>(elements + r * kRow + at),
                  w + static_cast<long long>(row) * k, column + at, k);
    }
  }
};

// A gather: a warp writes a part of a slice, lane r of row r, a tile at a time. A piece ends inside
// of the octet of its last entry; who has it writes all of this one, for which it goes on into the
// next piece, and none of that in which the piece before has ended.
//
// The lanes come to the end of a tile at different granules. Each keeps the one that it has to look
// at again, and all load theirs at once: a lane that waits for a load alone lets the warp wait.
template <class V, int kBits>
__device__ void expand(const void* values, const unsigned char* deltas, const int* bounds,
                       const int* first_piece, const int* starts, const int* row_order,
                       unsigned short* w, int k, int slices, int parts) {
  extern __shared__ __align__(16) char smem[];
  using Tile = sk::Tile<kGatherTileColumns>;
  using Word = Deltas<V, kBits>;
  // Granules at a time; the compiler keeps no more of 16 entries in registers.
  constexpr int kLoads = kIsScaled<V> ? 1 : 4;
  const int lane = threadIdx.x % kWarp;
  const int part = blockIdx.x * kExpandWarps + threadIdx.x / kWarp;
  const int slice = part / parts;
  if (slice >= slices) return;
  char* mine = smem + threadIdx.x / kWarp * kExpandGatherBytes;
  const Tile tile = {reinterpret_cast<unsigned short*>(mine)};
  int* firsts = reinterpret_cast<int*>(mine + Tile::kBytes);  // octets of each row, as lasts
  int* lasts = firsts + kWarp;

  const int begin_piece = first_piece[slice], end_piece = first_piece[slice + 1];
  const long long count = end_piece - begin_piece;
  const int from = begin_piece + static_cast<int>(part % parts * count / parts);
  const int to = begin_piece + static_cast<int>((part % parts + 1) * count / parts);
  if (from == to) return;
  int first = from == begin_piece ? 0 : starts[from * kWarp + lane] / kOctet + 1;
  int last = (to == end_piece ? k - 1 : starts[to * kWarp + lane]) / kOctet;
  if (row_order[slice * kWarp + lane] < 0) last = first - 1;
  firsts[lane] = first;
  lasts[lane] = last;
  for (int other = kWarp / 2; other; other /= 2) {
    first = min(first, __shfl_sync(kAllLanes, first, lane ^ other));
    last = max(last, __shfl_sync(kAllLanes, last, lane ^ other));
  }

  int granule = bounds[from], column = starts[from * kWarp + lane];
  const int end = bounds[end_piece];
  for (int begin = first / Tile::kOctets * kGatherTileColumns; begin <= last * kOctet;
       begin += kGatherTileColumns) {
    __syncwarp();  // the last tile is out
    tile.clear();
    __syncwarp();
    for (bool is_inside = granule < end; __ballot_sync(kAllLanes, is_inside);) {
      Granule<V, kBits> loaded[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const long long at = static_cast<long long>(min(granule + i, end - 1)) * kWarp + lane;
        loaded[i] = {};
        if (!is_inside) continue;
        loaded[i] = {static_cast<const uint4*>(values)[at],
                     reinterpret_cast<const Word*>(deltas)[at]};
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (!is_inside) continue;
        int here = column;
#pragma unroll
        for (int e = 0; e < kEntries<V>; ++e) {
          int odd = 0;
          if constexpr (kBits == 4) {
            const unsigned code = word(loaded[i].deltas, e / 8) >> (e % 4 * 8 + e % 8 / 4 * 4);
            here += (code & 7) * 2;
            odd = code >> 3 & 1;
          } else {
            here += word(loaded[i].deltas, e / 4) >> e % 4 * 8 & 255;
          }
          const unsigned four = word(loaded[i].values, e * Stored<V>::kBytes / 4);
          unsigned pair = four;
          if constexpr (kIsScaled<V>) pair = to_bf16<V>(four, e % 4 / 2);
          const unsigned value = pair >> e % 2 * 16 & 0xffffu;
          const unsigned at = here + odd - begin;  // huge before the tile
          if (value && at < kGatherTileColumns) tile.elements[lane * Tile::kRow + at] = value;
        }
        is_inside = here < begin + kGatherTileColumns;  // so are all of this granule
        if (!is_inside) continue;
        column = here;
        is_inside = ++granule < end;
      }
    }
    __syncwarp();  // a ballot orders no memory
    tile.write(w, begin, k, [&](int r) {
      const int octet = begin / kOctet + lane % Tile::kOctets;
      return firsts[r] <= octet && octet <= lasts[r] ? row_order[slice * kWarp + r] : -1;
    });
  }
}

// A cover: a warp writes a tile, a lane a row of it.
template <class V>
__device__ inline void expand_cover(const unsigned char* records, const int* steps,
                                    const int* row_order, unsigned short* w, int k, int slices,
                                    int windows) {
  extern __shared__ __align__(16) char smem[];
  const int lane = threadIdx.x % kWarp;
  const int at = blockIdx.x * kExpandWarps + threadIdx.x / kWarp;
  if (at >= slices * windows) return;
  using Tile = sk::Tile<kCoverColumns>;
  using Record = sk::Record<V>;
  char* mine = smem + threadIdx.x / kWarp * kExpandCoverBytes;
  const Tile tile = {reinterpret_cast<unsigned short*>(mine)};
  uint4* record = reinterpret_cast<uint4*>(mine + Tile::kBytes);
  tile.clear();
  const int begin = steps[at], end = steps[at + 1];
  const bool has_head = lane < Record::kHead, has_tail = lane < Record::kTail;
  const auto load = [&](int step, int chunk) {
    return reinterpret_cast<const uint4*>(records +
                                          static_cast<long long>(step) * Record::kBytes)[chunk];
  };
  uint4 chunk = {}, tail = {};
  const auto load_both = [&](int step) {
    if (step >= end) return;
    if (has_head) chunk = load(step, lane);
    if (has_tail) tail = load(step, Record::kHead + lane);
  };
  load_both(begin);
  for (int step = begin; step < end; ++step) {
    __syncwarp();  // all have read the last record
    if (has_head) record[lane] = chunk;
    if (has_tail) record[Record::kHead + lane] = tail;
    __syncwarp();
    load_both(step + 1);
    const auto* bytes = reinterpret_cast<const unsigned char*>(record);
#pragma unroll
    for (int group = 0; group < kWarp / 4; ++group) {
      const CoverPlace place = cover_place<V>(bytes, lane, group);
      if (!is_stored(place.value)) continue;
      const int column = bytes[Record::kColumnsAt + place.slot];
      tile.elements[lane * Tile::kRow + column] = place.value;
    }
  }
  __syncwarp();
  const int first_row = at / windows * kWarp;
  tile.write(w, at % windows * kCoverColumns, k, [&](int r) { return row_order[first_row + r]; });
}

// Pairs: a warp writes a step.
template <class V>
__device__ inline void expand_pairs(const unsigned* words, const int* steps, unsigned short* w,
                                    int k, int n, int slices, int row_steps) {
  extern __shared__ __align__(16) char smem[];
  const int lane = threadIdx.x % kWarp;
  const int step = blockIdx.x * kExpandWarps + threadIdx.x / kWarp;
  if (step >= slices * row_steps) return;
  using Tile = sk::Tile<kStepColumns>;
  char* mine = smem + threadIdx.x / kWarp * kExpandPairsBytes;
  const Tile tile = {reinterpret_cast<unsigned short*>(mine)};
  auto* head = reinterpret_cast<unsigned*>(mine + Tile::kBytes);
  const int chunks = min(steps[step + 1] - steps[step], kMostStepWords) / 4;
  for (int i = lane; i < chunks; i += kWarp) {
    reinterpret_cast<uint4*>(head)[i] = reinterpret_cast<const uint4*>(words + steps[step])[i];
  }
  __syncwarp();
  visit_pairs<V>(head, lane, [&](int row, int column, unsigned pair) {
    *reinterpret_cast<unsigned*>(tile.elements + row * Tile::kRow + column) = pair;
  });
  __syncwarp();
  const int first_row = step / row_steps * kWarp;
  tile.write(w, step % row_steps * kStepColumns, k,
             [&](int r) { return first_row + r < n ? first_row + r : -1; });
}

// y [M, N] = x w^T + bias anew, of the tokens that find_spoilt() finds, where w is stored alone.
template <class T>
__device__ void mend_expanded(const unsigned short* w, const unsigned short* x,
                              const unsigned short* bias, unsigned short* y, int m, int n, int k) {
  const auto sum_part = [&](unsigned row, const unsigned short* from, unsigned lane) {
    const unsigned short* values = w + static_cast<long long>(row) * k;
    float sum = 0;
    for (unsigned col = lane; col < static_cast<unsigned>(k); col += kWarp) {
      if (!is_stored(values[col])) continue;
      sum = fmaf(Convert<T>::low(values[col]), Convert<T>::low(from[col]), sum);
    }
    return sum;
  };
  mend_tokens<T>(x, bias, y, m, n, k, 1, sum_part);
}

}  // namespace sk

#define SK_EXPAND_MEND(name, type)                                                       \
  extern "C" __global__ void __launch_bounds__(sk::kMendThreads)                         \
      name(const unsigned short* w, const unsigned short* x, const unsigned short* bias, \
           unsigned short* y, int m, int n, int k) {                                     \
    sk::mend_expanded<sk::type>(w, x, bias, y, m, n, k);                                 \
  }                                                                                      \
  SK_KERNEL(name)

SK_EXPAND_MEND(sk_expand_mend_bf16, bf16)
SK_EXPAND_MEND(sk_expand_mend_f16, f16)

#define SK_EXPAND_PAIRS(name, type)                                                           \
  extern "C" __global__ void name(const unsigned* words, const int* steps, unsigned short* w, \
                                  int k, int n, int slices, int row_steps) {                  \
    sk::expand_pairs<sk::type>(words, steps, w, k, n, slices, row_steps);                     \
  }                                                                                           \
  SK_KERNEL(name)

#define SK_EXPAND_GATHER(name, type, bits)                                                        \
  extern "C" __global__ void name(                                                                \
      const void* values, const unsigned char* deltas, const int* bounds, const int* first_piece, \
      const int* starts, const int* row_order, unsigned short* w, int k, int slices, int parts) { \
    sk::expand<sk::type, bits>(values, deltas, bounds, first_piece, starts, row_order, w, k,      \
                               slices, parts);                                                    \
  }                                                                                               \
  SK_KERNEL(name)

#define SK_EXPAND_COVER(name, type)                                                           \
  extern "C" __global__ void name(const unsigned char* records, const int* steps,             \
                                  const int* row_order, unsigned short* w, int k, int slices, \
                                  int windows) {                                              \
    sk::expand_cover<sk::type>(records, steps, row_order, w, k, slices, windows);             \
  }                                                                                           \
  SK_KERNEL(name)

// Of 16 bits, whatever they mean.
SK_EXPAND_GATHER(sk_expand_d4, bf16, 4)
SK_EXPAND_GATHER(sk_expand_d8, bf16, 8)
SK_EXPAND_COVER(sk_expand_cover, bf16)
SK_EXPAND_PAIRS(sk_expand_pairs, bf16)

#define SK_EXPAND_TYPE(type)                     \
  SK_EXPAND_GATHER(sk_expand_d4_##type, type, 4) \
  SK_EXPAND_GATHER(sk_expand_d8_##type, type, 8) \
  SK_EXPAND_COVER(sk_expand_cover_##type, type)  \
  SK_EXPAND_PAIRS(sk_expand_pairs_##type, type)

SK_EXPAND_TYPE(int8)
SK_EXPAND_TYPE(e4m3)
