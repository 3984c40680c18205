// W [N, K] dense, from packed W, for products of many tokens: +0 where nothing is stored; a stored
// zero is -0. Bytes: those of the pack and of W, once; each warp writes 16 bytes a lane.
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
constexpr int kExpandCoverBytes = kWarp * (kCoverColumns + kTilePad) * 2 + Record::kBytes;
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

// The entries of a lane, one after another, from a granule on; the next granule is under way.
template <int kBits>
class Entries {
 public:
  using Word = typename Deltas<kBits>::Word;

  __device__ Entries(const unsigned short* values, const unsigned char* deltas, const Range& range)
      : values_(reinterpret_cast<const uint4*>(values)),
        deltas_(reinterpret_cast<const Word*>(deltas)),
        granule_(range.begin),
        end_(range.end) {
    load();
  }

  // Takes an entry, which is a step without a value where its value is +0, on from `column`;
  // false if there is none.
  __device__ bool take(int* column, unsigned* value, int* odd) {
    if (left_ == 0) {
      if (granule_ >= end_) return false;
      left_ = kGranule;
      low_ = next_.values.x | Half{next_.values.y} << 32;
      high_ = next_.values.z | Half{next_.values.w} << 32;
      codes_ = codes_of(next_.deltas);
      ++granule_;
      load();
    }
    --left_;
    *value = static_cast<unsigned>(low_) & 0xffffu;
    const unsigned code = static_cast<unsigned>(codes_) & 0xffu;
    low_ = low_ >> 16 | high_ << 48;
    high_ >>= 16;
    codes_ >>= 8;
    *column += kBits == 4 ? (code & 7) * 2 : code;
    *odd = kBits == 4 ? code >> 3 : 0;
    return true;
  }

 private:
  using Half = unsigned long long;

  // A byte an entry.
  static __device__ Half codes_of(unsigned deltas) {
    return (deltas & 0x0f0f0f0fu) | Half{deltas >> 4 & 0x0f0f0f0fu} << 32;
  }
  static __device__ Half codes_of(const uint2& deltas) { return deltas.x | Half{deltas.y} << 32; }

  __device__ void load() {
    if (granule_ >= end_) return;
    const long long at = static_cast<long long>(granule_) * kWarp + threadIdx.x % kWarp;
    next_ = {values_[at], deltas_[at]};
  }

  const uint4* values_;
  const Word* deltas_;
  Granule<kBits> next_ = {};
  Half low_ = 0, high_ = 0, codes_ = 0;
  int granule_, end_, left_ = 0;
};

// A gather: a warp writes a piece, lane r of row r, a tile at a time. A piece ends inside of the
// octet of its last entry; it writes all of this one, for which it goes on into the next piece, and
// none of that in which the piece before has ended.
template <int kBits>
__device__ void expand(const unsigned short* values, const unsigned char* deltas, const int* bounds,
                       const int* slice_of, const int* first_piece, const int* starts,
                       const int* row_order, unsigned short* w, int k, int pieces) {
  extern __shared__ __align__(16) char smem[];
  using Tile = sk::Tile<kGatherTileColumns>;
  const int lane = threadIdx.x % kWarp;
  const int piece = blockIdx.x * kExpandWarps + threadIdx.x / kWarp;
  if (piece >= pieces) return;
  char* mine = smem + threadIdx.x / kWarp * kExpandGatherBytes;
  const Tile tile = {reinterpret_cast<unsigned short*>(mine)};
  int* firsts = reinterpret_cast<int*>(mine + Tile::kBytes);  // octets of each row, as lasts
  int* lasts = firsts + kWarp;

  const int slice = slice_of[piece], row = row_order[slice * kWarp + lane];
  const bool is_last = piece + 1 == first_piece[slice + 1];
  int column = starts[piece * kWarp + lane];
  int first = piece == first_piece[slice] ? 0 : column / kOctet + 1;
  int last = (is_last ? k - 1 : starts[(piece + 1) * kWarp + lane]) / kOctet;
  if (row < 0) last = first - 1;
  firsts[lane] = first;
  lasts[lane] = last;
  const int last_column = last * kOctet + kOctet - 1;
  for (int other = kWarp / 2; other; other /= 2) {
    first = min(first, __shfl_sync(kAllLanes, first, lane ^ other));
    last = max(last, __shfl_sync(kAllLanes, last, lane ^ other));
  }

  Entries<kBits> entries(values, deltas, {bounds[piece], bounds[first_piece[slice + 1]]});
  unsigned value = 0;
  int odd = 0;
  bool is_more = row >= 0 && entries.take(&column, &value, &odd);
  for (int begin = first / Tile::kOctets * kGatherTileColumns; begin <= last * kOctet;
       begin += kGatherTileColumns) {
    __syncwarp();  // the last tile is out
    tile.clear();
    __syncwarp();
    while (is_more && column < begin + kGatherTileColumns) {
      const int at = column + odd - begin;
      if (value && at >= 0) tile.elements[lane * Tile::kRow + at] = value;
      is_more = column <= last_column && entries.take(&column, &value, &odd);
    }
    __syncwarp();
    tile.write(w, begin, k, [&](int r) {
      const int octet = begin / kOctet + lane % Tile::kOctets;
      return firsts[r] <= octet && octet <= lasts[r] ? row_order[slice * kWarp + r] : -1;
    });
  }
}

// A cover: a warp writes a tile, a lane a row of it.
__device__ inline void expand_cover(const unsigned char* records, const int* steps,
                                    const int* row_order, unsigned short* w, int k, int slices,
                                    int windows) {
  extern __shared__ __align__(16) char smem[];
  const int lane = threadIdx.x % kWarp;
  const int at = blockIdx.x * kExpandWarps + threadIdx.x / kWarp;
  if (at >= slices * windows) return;
  using Tile = sk::Tile<kCoverColumns>;
  char* mine = smem + threadIdx.x / kWarp * kExpandCoverBytes;
  const Tile tile = {reinterpret_cast<unsigned short*>(mine)};
  uint4* record = reinterpret_cast<uint4*>(mine + Tile::kBytes);
  tile.clear();
  const int begin = steps[at], end = steps[at + 1];
  const bool has_tail = lane < Record::kChunks - Record::kTailAt;
  const auto load = [&](int step, int chunk) {
    return reinterpret_cast<const uint4*>(records +
                                          static_cast<long long>(step) * Record::kBytes)[chunk];
  };
  uint4 chunk = {}, tail = {};
  const auto load_both = [&](int step) {
    if (step >= end) return;
    chunk = load(step, lane);
    if (has_tail) tail = load(step, Record::kTailAt + lane);
  };
  load_both(begin);
  for (int step = begin; step < end; ++step) {
    __syncwarp();  // all have read the last record
    record[lane] = chunk;
    if (has_tail) record[Record::kTailAt + lane] = tail;
    __syncwarp();
    load_both(step + 1);
    const auto* bytes = reinterpret_cast<const unsigned char*>(record);
#pragma unroll
    for (int group = 0; group < kWarp / 4; ++group) {
      const CoverPlace place = cover_place(bytes, lane, group);
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
  visit_pairs(head, lane, [&](int row, int column, unsigned pair) {
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

extern "C" __global__ void sk_expand_pairs(const unsigned* words, const int* steps,
                                           unsigned short* w, int k, int n, int slices,
                                           int row_steps) {
  sk::expand_pairs(words, steps, w, k, n, slices, row_steps);
}
SK_KERNEL(sk_expand_pairs)

#define SK_EXPAND(name, bits)                                                                     \
  extern "C" __global__ void name(const unsigned short* values, const unsigned char* deltas,      \
                                  const int* bounds, const int* slice_of, const int* first_piece, \
                                  const int* starts, const int* row_order, unsigned short* w,     \
                                  int k, int pieces) {                                            \
    sk::expand<bits>(values, deltas, bounds, slice_of, first_piece, starts, row_order, w, k,      \
                     pieces);                                                                     \
  }                                                                                               \
  SK_KERNEL(name)

SK_EXPAND(sk_expand_d4, 4)
SK_EXPAND(sk_expand_d8, 8)

extern "C" __global__ void sk_expand_cover(const unsigned char* records, const int* steps,
                                           const int* row_order, unsigned short* w, int k,
                                           int slices, int windows) {
  sk::expand_cover(records, steps, row_order, w, k, slices, windows);
}
SK_KERNEL(sk_expand_cover)
