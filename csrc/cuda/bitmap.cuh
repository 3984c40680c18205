// A pattern as a bitmap: what the kernels that read one share. Row by row, word c of a row has bit
// j for column 64 c + j, and starts[word] is where the values of the word begin. Both are made from
// a checked copy of the indices that nobody else can write to.
#pragma once

#include "launch.cuh"
#include "numbers.cuh"

namespace sk {

constexpr unsigned kBitmapThreads = 256, kWordColumns = 64;
constexpr unsigned kOctets = kWordColumns / 8;  // a thread takes 8 columns of a word
constexpr unsigned kBlockWords = kBitmapThreads / kOctets;
constexpr unsigned kTurns = 2;  // words of a thread at a time, so that more loads are under way

using Word = unsigned long long;

// The octet that a thread takes of word `word`, in a matrix [N, k]: which of its columns are
// stored, and where their values begin.
struct Piece {
  unsigned bits, first;
};
__device__ inline Piece piece_of(const Word* words, const int* starts, unsigned word,
                                 unsigned octet) {
  const Word bits = words[word], before = bits & ((Word{1} << octet * 8) - 1);
  return {static_cast<unsigned>(bits >> octet * 8) & 0xffu,
          static_cast<unsigned>(starts[word] + __popcll(before))};
}

// Where it begins.
struct Place {
  long long row;
  unsigned col;
};
__device__ inline Place place_of(unsigned word, unsigned octet, unsigned row_words) {
  const unsigned row = word / row_words;
  return {row, (word - row * row_words) * kWordColumns + octet * 8};
}

// The t-th word of a thread.
__device__ inline unsigned word_of(unsigned t) {
  return (blockIdx.x * kTurns + t) * kBlockWords + threadIdx.x / kOctets;
}

// The pieces of a thread; all are asked for before one is waited for.
__device__ inline void load_pieces(Piece (&pieces)[kTurns], const Word* words, const int* starts,
                                   unsigned count, unsigned octet) {
#pragma unroll
  for (unsigned t = 0; t < kTurns; ++t) {
    pieces[t] = piece_of(words, starts, min(word_of(t), count - 1), octet);
    if (word_of(t) >= count) pieces[t].bits = 0;
  }
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

// 2:4. Of four neighbours at most two are stored, and a slot each is there for two: the stored ones
// and, where they are fewer, the first free ones beside them, whose value is 0. Slots are in the
// order of the neighbours. `four` has a bit for each that is stored.

struct Slots {
  bool is_first, is_second;
};
__device__ inline Slots slots_of(unsigned four) {
  const bool both = __popc(four) >= 2;
  return {both || four == 1, both || (four != 0 && four != 1)};
}

constexpr unsigned kTileRows = 128, kTileOctets = kTileRows / 8;
constexpr unsigned kTileStride = kWordColumns + 2;  // of a row, in 16-bit values
constexpr unsigned kTileWords = kTileRows * kTileStride / 2 + kTileRows / kWarp;  // of 32 bits

// Where row `row` of a tile begins in shared memory, in 16-bit values. No two of 16 rows that are 8
// apart share a bank.
__device__ inline unsigned tile_row(unsigned row) { return row * kTileStride + row / kWarp * 2; }

// The same of a column of a tile, of rows `four` of which are stored, the first at `at`.
__device__ inline unsigned slot_pair_of_column(const unsigned short* at, unsigned four) {
  // Two bits for each `four`: the first that is stored, and the last.
  constexpr unsigned kFirst = 0x12131210, kLast = 0xffffaa50;
  const Slots slots = slots_of(four);
  unsigned first = 0, second = 0;
  if (slots.is_first) first = at[(kFirst >> four * 2 & 3) * kTileStride];
  if (slots.is_second) second = at[(kLast >> four * 2 & 3) * kTileStride];
  return first | second << 16;
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

// Slots hold 16 bits each; those of 8 bits are filled by float8.cu.
__device__ inline unsigned slot_pair(const unsigned short* from, const Slots& slots) {
  unsigned first = 0, second = 0;
  if (slots.is_first) first = from[0];
  if (slots.is_second) second = from[slots.is_first];
  return first | second << 16;
}

// What follows the slots in the operand is that of `rest`: of the blocks after `blocks`.
__device__ inline void copy_rest(const uint4* rest, unsigned short* operand, long long slots,
                                 unsigned parts, unsigned blocks) {
  const unsigned part = (blockIdx.x - blocks) * kBitmapThreads + threadIdx.x;
  if (part < parts) reinterpret_cast<uint4*>(operand + slots)[part] = rest[part];
}

// The slots of W, [N, K / 2], then what follows them. K is a multiple of 16.
__device__ inline void fill(const Word* words, const int* starts, const unsigned short* values,
                            const uint4* rest, unsigned short* operand, unsigned count,
                            unsigned row_words, unsigned n, unsigned k, unsigned parts) {
  constexpr unsigned kMost = kTurns * kBlockWords;
  const unsigned octet = threadIdx.x % kOctets, blocks = (count + kMost - 1) / kMost;
  if (blockIdx.x >= blocks) {
    copy_rest(rest, operand, static_cast<long long>(n) * (k / 2), parts, blocks);
    return;
  }
  Piece pieces[kTurns];
  load_pieces(pieces, words, starts, count, octet);
  uint2 four_slots[kTurns];
#pragma unroll
  for (unsigned t = 0; t < kTurns; ++t) {
    const unsigned low = pieces[t].bits & 15;
    const unsigned short* from = values + pieces[t].first;
    const unsigned pair = slot_pair(from, slots_of(low));
    four_slots[t] = {pair, slot_pair(from + __popc(low), slots_of(pieces[t].bits >> 4))};
  }
#pragma unroll
  for (unsigned t = 0; t < kTurns; ++t) {
    if (word_of(t) >= count) break;
    const Place place = place_of(word_of(t), octet, row_words);
    if (place.col >= k) continue;
    unsigned short* out = operand + place.row * (k / 2) + place.col / 2;
    *reinterpret_cast<uint2*>(out) = four_slots[t];
  }
}

// The slots of W^T, [K, N / 2], then what follows them. A block turns a tile of 128 rows and a word
// of columns around. N is a multiple of 16.
__device__ inline void fill_transposed(const Word* words, const int* starts,
                                       const unsigned short* values, const uint4* rest,
                                       unsigned short* operand, unsigned row_words, unsigned n,
                                       unsigned k, unsigned parts) {
  extern __shared__ __align__(16) char smem[];
  auto tile = reinterpret_cast<unsigned short*>(smem);
  auto row_bytes = reinterpret_cast<unsigned char*>(smem + 4 * kTileWords);  // [row][octet]
  auto column_bytes = row_bytes + kTileRows * kOctets;                       // [column][octet]
  const unsigned tiles = (n + kTileRows - 1) / kTileRows * row_words;
  if (blockIdx.x >= tiles) {
    copy_rest(rest, operand, static_cast<long long>(k) * (n / 2), parts, tiles);
    return;
  }
  const unsigned first_row = blockIdx.x / row_words * kTileRows;
  const unsigned first_col = blockIdx.x % row_words * kWordColumns;
  const unsigned octet = threadIdx.x % kOctets;
  constexpr unsigned kRows = kTileRows / kBlockWords;  // of a thread
  Piece pieces[kRows];
#pragma unroll
  for (unsigned t = 0; t < kRows; ++t) {
    const unsigned row = first_row + t * kBlockWords + threadIdx.x / kOctets;
    pieces[t] =
        piece_of(words, starts, min(row, n - 1) * row_words + blockIdx.x % row_words, octet);
    if (row >= n) pieces[t].bits = 0;
  }
  unsigned short elements[kRows][8];
#pragma unroll
  for (unsigned t = 0; t < kRows; ++t) load_piece(values, pieces[t], elements[t]);
#pragma unroll
  for (unsigned t = 0; t < kRows; ++t) {
    const unsigned row = t * kBlockWords + threadIdx.x / kOctets;
    const auto& eight = elements[t];
    row_bytes[row * kOctets + octet] = static_cast<unsigned char>(pieces[t].bits);
    auto out = reinterpret_cast<unsigned*>(tile + tile_row(row) + octet * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] = static_cast<unsigned>(eight[2 * i + 1]) << 16 | eight[2 * i];
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
  constexpr unsigned kStep = kBitmapThreads / kTileOctets;  // columns at a time
  const unsigned row_octet = threadIdx.x % kTileOctets, column = threadIdx.x / kTileOctets;
  if (first_row + row_octet * 8 >= n) return;
  const unsigned short* from = tile + tile_row(row_octet * 8) + column;
  unsigned short* out = operand + static_cast<long long>(first_col + column) * (n / 2) +
                        (first_row / 2 + row_octet * 4);
#pragma unroll
  for (unsigned c = 0; c < kWordColumns; c += kStep) {
    if (first_col + column + c >= k) return;
    const unsigned bits = column_bytes[(column + c) * kTileOctets + row_octet];
    *reinterpret_cast<uint2*>(out + static_cast<long long>(c) * (n / 2)) = {
        slot_pair_of_column(from + c, bits & 15),
        slot_pair_of_column(from + 4 * kTileStride + c, bits >> 4)};
  }
}

}  // namespace sk
