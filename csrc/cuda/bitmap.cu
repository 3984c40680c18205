// Between the values of a sparse W [N, K] and what tensor cores read: W written out, and the
// compressed operand of 2:4 sparse products, of W or of W^T. Bytes: those of both sides, once, and
// 12 for 64 places of W.
//
// Row by row, word c of a row has bit j for column 64 c + j, and starts[word] is where the values
// of the word begin. Both are made from a checked copy of the indices that nobody else can write
// to.
#include "launch.cuh"
#include "numbers.cuh"

namespace sk {

constexpr unsigned kBitmapThreads = 256, kWordColumns = 64;
constexpr unsigned kOctets = kWordColumns / 8;  // a thread takes 8 columns of a word
constexpr unsigned kBlockWords = kBitmapThreads / kOctets;
constexpr unsigned kTurns = 2;  // words of a thread at a time, so that more loads are under way

using Word = unsigned long long;

// Eight columns: which are stored, and where their values begin.
struct Piece {
  unsigned bits, first;
};

// What a thread reads of its words, some time before it needs it.
template <unsigned kWords>
struct Ahead {
  Word words[kWords];
  int starts[kWords];

  __device__ void load(unsigned i, const Word* all_words, const int* all_starts, unsigned word) {
    words[i] = all_words[word];
    starts[i] = all_starts[word];
  }
  __device__ Piece piece(unsigned i, unsigned octet) const {
    const Word before = words[i] & ((Word{1} << octet * 8) - 1);
    return {static_cast<unsigned>(words[i] >> octet * 8) & 0xffu,
            static_cast<unsigned>(starts[i] + __popcll(before))};
  }
};

// The words of a matrix of `count` of them, kTurns * kBlockWords at a time: block after block.
struct Turn {
  unsigned chunk, octet, count;

  __device__ Turn(unsigned count) : chunk(blockIdx.x), octet(threadIdx.x % kOctets), count(count) {}
  __device__ bool is_in() const { return chunk * (kTurns * kBlockWords) < count; }
  __device__ unsigned word(unsigned t) const {
    return (chunk * kTurns + t) * kBlockWords + threadIdx.x / kOctets;
  }
  __device__ void load(Ahead<kTurns>& ahead, const Word* words, const int* starts) const {
#pragma unroll
    for (unsigned t = 0; t < kTurns; ++t) {
      ahead.words[t] = 0;
      if (word(t) < count) ahead.load(t, words, starts, word(t));
    }
  }
};

// Where the octet of a word begins in a matrix [N, k].
struct Place {
  long long row;
  unsigned col;
};
__device__ inline Place place_of(unsigned word, unsigned octet, unsigned row_words) {
  const unsigned row = word / row_words;
  return {row, (word - row * row_words) * kWordColumns + octet * 8};
}

// The elements of a piece, 0 where none is stored.
template <class Element>
__device__ void load_piece(const Element* values, const Piece& piece, Element (&eight)[8]) {
  unsigned at = piece.first;
#pragma unroll
  for (unsigned i = 0; i < 8; ++i) {
    const unsigned is_here = piece.bits >> i & 1;
    eight[i] = 0;
    if (is_here) eight[i] = values[at];
    at += is_here;
  }
}

// Copies 8 neighbours in parts of 16 bytes, to where they lie on a multiple of that.
template <class Element>
__device__ void copy_eight(const Element* from, Element* to) {
#pragma unroll
  for (unsigned i = 0; i < 8 * sizeof(Element) / sizeof(uint4); ++i) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
}

// w [N, K] = W.
template <class Element>
__device__ void write_out(const Word* words, const int* starts, const Element* values, Element* w,
                          unsigned count, unsigned row_words, unsigned k) {
  Turn turn(count);
  Ahead<kTurns> ahead;
  turn.load(ahead, words, starts);
  while (turn.is_in()) {
    __align__(16) Element eight[kTurns][8];
#pragma unroll
    for (unsigned t = 0; t < kTurns; ++t) load_piece(values, ahead.piece(t, turn.octet), eight[t]);
    const Turn now = turn;
    turn.chunk += gridDim.x;
    turn.load(ahead, words, starts);
#pragma unroll
    for (unsigned t = 0; t < kTurns; ++t) {
      if (now.word(t) >= count) break;
      const Place place = place_of(now.word(t), now.octet, row_words);
      if (place.col >= k) continue;
      Element* out = w + place.row * k + place.col;
      if (k % 8 == 0) {
        copy_eight(eight[t], out);
      } else {
#pragma unroll
        for (unsigned i = 0; i < 8; ++i) {
          if (place.col + i < k) out[i] = eight[t][i];
        }
      }
    }
  }
}

// values [nnz] = w [N, K] at the places of W. The words of a warp are neighbours, so are their
// values: they meet in shared memory and go out together.
template <class Element>
__device__ void collect(const Word* words, const int* starts, const Element* w, Element* values,
                        unsigned count, unsigned row_words, unsigned k) {
  extern __shared__ __align__(16) char smem[];
  const unsigned lane = threadIdx.x % kWarp;
  Element* mine = reinterpret_cast<Element*>(smem) + threadIdx.x / kWarp * (kWarp * 8);
  for (Turn turn(count); turn.is_in(); turn.chunk += gridDim.x) {
    Ahead<kTurns> ahead;
    __align__(16) Element eight[kTurns][8];
#pragma unroll
    for (unsigned t = 0; t < kTurns; ++t) {
      if (turn.word(t) >= count) continue;
      const Place place = place_of(turn.word(t), turn.octet, row_words);
      const Element* from = w + place.row * k + place.col;
      if (k % 8 == 0) {
        if (place.col < k) copy_eight(from, eight[t]);
      } else {
#pragma unroll
        for (unsigned i = 0; i < 8; ++i) {
          if (place.col + i < k) eight[t][i] = from[i];
        }
      }
    }
    turn.load(ahead, words, starts);
#pragma unroll
    for (unsigned t = 0; t < kTurns; ++t) {
      const unsigned first_word = turn.word(t) - lane / kOctets;
      if (first_word >= count) break;  // of the warp
      const unsigned first = __shfl_sync(kAllLanes, ahead.starts[t], 0);
      const bool is_in = turn.word(t) < count;
      const Piece piece = is_in ? ahead.piece(t, turn.octet) : Piece{0, first};
      Element* to = mine + (piece.first - first);
#pragma unroll
      for (unsigned i = 0; i < 8; ++i) {
        if (piece.bits >> i & 1) *to++ = eight[t][i];
      }
      unsigned end = piece.first + __popc(piece.bits);
      for (int other = 1; other < kWarp; other *= 2) {
        end = max(end, __shfl_sync(kAllLanes, end, static_cast<int>(lane) ^ other));
      }
      __syncwarp();
      for (unsigned i = lane; i < end - first; i += kWarp) values[first + i] = mine[i];
      __syncwarp();
    }
  }
}

// 2:4. Of four neighbours at most two are stored, and a slot each is there for two: the stored ones
// and, where they are fewer, the first free ones beside them, whose value is 0. Slots are in the
// order of the neighbours. `four` has a bit for each that is stored.
struct Slots {
  bool is_first, is_second;  // stored
};
__device__ inline Slots slots_of(unsigned four) {
  const bool both = __popc(four) >= 2;
  return {both || four == 1, both || (four != 0 && four != 1)};
}

__device__ inline unsigned slot_pair(const unsigned short* from, const Slots& slots) {
  const unsigned first = slots.is_first ? from[0] : 0u;
  const unsigned second = slots.is_second ? from[slots.is_first] : 0u;
  return first | second << 16;
}

// What follows the slots in the operand is that of `rest`.
__device__ inline void copy_rest(const uint4* rest, unsigned short* operand, long long slots,
                                 unsigned parts) {
  for (unsigned part = blockIdx.x * kBitmapThreads + threadIdx.x; part < parts;
       part += gridDim.x * kBitmapThreads) {
    reinterpret_cast<uint4*>(operand + slots)[part] = rest[part];
  }
}

// The slots of W, [N, K / 2], then what follows them. K is a multiple of 16.
__device__ inline void fill(const Word* words, const int* starts, const unsigned short* values,
                            const uint4* rest, unsigned short* operand, unsigned count,
                            unsigned row_words, unsigned n, unsigned k, unsigned parts) {
  Turn turn(count);
  Ahead<kTurns> ahead;
  turn.load(ahead, words, starts);
  while (turn.is_in()) {
    uint2 four_slots[kTurns];
#pragma unroll
    for (unsigned t = 0; t < kTurns; ++t) {
      const Piece piece = ahead.piece(t, turn.octet);
      const unsigned low = piece.bits & 15;
      four_slots[t] = {slot_pair(values + piece.first, slots_of(low)),
                       slot_pair(values + piece.first + __popc(low), slots_of(piece.bits >> 4))};
    }
    const Turn now = turn;
    turn.chunk += gridDim.x;
    turn.load(ahead, words, starts);
#pragma unroll
    for (unsigned t = 0; t < kTurns; ++t) {
      if (now.word(t) >= count) break;
      const Place place = place_of(now.word(t), now.octet, row_words);
      if (place.col >= k) continue;
      *reinterpret_cast<uint2*>(operand + place.row * (k / 2) + place.col / 2) = four_slots[t];
    }
  }
  copy_rest(rest, operand, static_cast<long long>(n) * (k / 2), parts);
}

constexpr unsigned kTileRows = 128, kTileOctets = kTileRows / 8;
constexpr unsigned kTileWords =
    kTileRows * (kWordColumns / 2 + 1) + kTileRows / kWarp;  // of 32 bits

// Where row `row` of a tile begins in shared memory, in 16-bit values. No two of 16 rows that are 8
// apart share a bank.
__device__ inline unsigned tile_row(unsigned row) {
  return 2 * (row * (kWordColumns / 2 + 1) + row / kWarp);
}

// The bits of 8 rows of 8 columns, a byte a row, as a byte a column.
__device__ inline Word transpose_bits(Word x) {
  Word t = (x ^ x >> 7) & 0x00aa00aa00aa00aaull;
  x ^= t ^ t << 7;
  t = (x ^ x >> 14) & 0x0000cccc0000ccccull;
  x ^= t ^ t << 14;
  t = (x ^ x >> 28) & 0x00000000f0f0f0f0ull;
  return x ^ t ^ t << 28;
}

// The slots of W^T, [K, N / 2], then what follows them. A block turns tiles of 128 rows and a word
// of columns around. N is a multiple of 16.
__device__ inline void fill_transposed(const Word* words, const int* starts,
                                       const unsigned short* values, const uint4* rest,
                                       unsigned short* operand, unsigned row_words, unsigned n,
                                       unsigned k, unsigned parts) {
  constexpr unsigned kRows = kTileRows / kBlockWords;  // of a thread
  extern __shared__ __align__(16) char smem[];
  auto tile = reinterpret_cast<unsigned short*>(smem);
  auto row_bytes = reinterpret_cast<unsigned char*>(smem + 4 * kTileWords);  // [row][octet]
  auto column_bytes = row_bytes + kTileRows * kOctets;                       // [column][octet]
  const unsigned tiles = (n + kTileRows - 1) / kTileRows * row_words;
  const unsigned octet = threadIdx.x % kOctets;
  const auto load = [&](Ahead<kRows>& ahead, unsigned at) {
#pragma unroll
    for (unsigned t = 0; t < kRows; ++t) {
      const unsigned row = at / row_words * kTileRows + t * kBlockWords + threadIdx.x / kOctets;
      ahead.words[t] = 0;
      if (at < tiles && row < n) ahead.load(t, words, starts, row * row_words + at % row_words);
    }
  };
  Ahead<kRows> ahead;
  load(ahead, blockIdx.x);
  for (unsigned at = blockIdx.x; at < tiles; at += gridDim.x) {
    const unsigned first_row = at / row_words * kTileRows,
                   first_col = at % row_words * kWordColumns;
    unsigned short eight[kRows][8];
    unsigned bits_of[kRows];
#pragma unroll
    for (unsigned t = 0; t < kRows; ++t) {
      const Piece piece = ahead.piece(t, octet);
      bits_of[t] = piece.bits;
      load_piece(values, piece, eight[t]);
    }
    load(ahead, at + gridDim.x);
#pragma unroll
    for (unsigned t = 0; t < kRows; ++t) {
      const unsigned row = t * kBlockWords + threadIdx.x / kOctets;
      row_bytes[row * kOctets + octet] = static_cast<unsigned char>(bits_of[t]);
      auto out = reinterpret_cast<unsigned*>(tile + tile_row(row) + octet * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[i] = eight[t][2 * i] | static_cast<unsigned>(eight[t][2 * i + 1]) << 16;
      }
    }
    __syncthreads();
    if (threadIdx.x < kTileOctets * kOctets) {
      const unsigned row_octet = threadIdx.x / kOctets;
      Word bits = 0;
#pragma unroll
      for (unsigned i = 0; i < 8; ++i) {
        bits |= static_cast<Word>(row_bytes[(row_octet * 8 + i) * kOctets + octet]) << 8 * i;
      }
      bits = transpose_bits(bits);
#pragma unroll
      for (unsigned i = 0; i < 8; ++i) {
        column_bytes[(octet * 8 + i) * kTileOctets + row_octet] =
            static_cast<unsigned char>(bits >> 8 * i);
      }
    }
    __syncthreads();
    const unsigned row_octet = threadIdx.x % kTileOctets;
    for (unsigned c = threadIdx.x / kTileOctets;
         c < kWordColumns && first_col + c < k && first_row + row_octet * 8 < n;
         c += kBitmapThreads / kTileOctets) {
      const unsigned bits = column_bytes[c * kTileOctets + row_octet];
      unsigned pairs[2];
#pragma unroll
      for (unsigned half = 0; half < 2; ++half) {
        const unsigned four = bits >> 4 * half & 15, row = row_octet * 8 + half * 4;
        const Slots slots = slots_of(four);
        const unsigned low = four & 1 ? 0 : four & 2 ? 1 : four & 4 ? 2 : 3;
        const unsigned high = four & 8 ? 3 : four & 4 ? 2 : four & 2 ? 1 : 0;
        const unsigned first = slots.is_first ? tile[tile_row(row + low) + c] : 0u;
        const unsigned second = slots.is_second ? tile[tile_row(row + high) + c] : 0u;
        pairs[half] = first | second << 16;
      }
      const long long row_of_out = static_cast<long long>(first_col + c) * (n / 2);
      *reinterpret_cast<uint2*>(operand + row_of_out + (first_row / 2 + row_octet * 4)) = {
          pairs[0], pairs[1]};
    }
    __syncthreads();  // the tile has been read
  }
  copy_rest(rest, operand, static_cast<long long>(k) * (n / 2), parts);
}

}  // namespace sk

#define SK_BITMAP(bytes, element)                                                                  \
  extern "C" __global__ void __launch_bounds__(sk::kBitmapThreads)                                 \
      sk_bitmap_write_out_##bytes(const sk::Word* words, const int* starts, const element* values, \
                                  element* w, int count, int row_words, int k) {                   \
    sk::write_out(words, starts, values, w, count, row_words, k);                                  \
  }                                                                                                \
  SK_KERNEL(sk_bitmap_write_out_##bytes)                                                           \
  extern "C" __global__ void __launch_bounds__(sk::kBitmapThreads)                                 \
      sk_bitmap_collect_##bytes(const sk::Word* words, const int* starts, const element* w,        \
                                element* values, int count, int row_words, int k) {                \
    sk::collect(words, starts, w, values, count, row_words, k);                                    \
  }                                                                                                \
  SK_KERNEL(sk_bitmap_collect_##bytes)

SK_BITMAP(2, unsigned short)
SK_BITMAP(4, unsigned)
SK_BITMAP(8, unsigned long long)

extern "C" __global__ void __launch_bounds__(sk::kBitmapThreads)
    sk_bitmap_fill(const sk::Word* words, const int* starts, const unsigned short* values,
                   const uint4* rest, unsigned short* operand, int count, int row_words, int n,
                   int k, int parts) {
  sk::fill(words, starts, values, rest, operand, count, row_words, n, k, parts);
}
SK_KERNEL(sk_bitmap_fill)

extern "C" __global__ void __launch_bounds__(sk::kBitmapThreads)
    sk_bitmap_fill_transposed(const sk::Word* words, const int* starts,
                              const unsigned short* values, const uint4* rest,
                              unsigned short* operand, int row_words, int n, int k, int parts) {
  sk::fill_transposed(words, starts, values, rest, operand, row_words, n, k, parts);
}
SK_KERNEL(sk_bitmap_fill_transposed)
