// Between the values of a sparse W [N, K] and what tensor cores read: W written out, and the
// compressed operand of 2:4 sparse products, of W or of W^T. Bytes: those of both sides, once, and
// 12 for 64 places of W.
#include "bitmap.cuh"

namespace sk {

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
  const unsigned octet = threadIdx.x % kOctets;
  Piece pieces[kTurns];
  load_pieces(pieces, words, starts, count, octet);
  __align__(16) Element eight[kTurns][8];
#pragma unroll
  for (unsigned t = 0; t < kTurns; ++t) load_piece(values, pieces[t], eight[t]);
#pragma unroll
  for (unsigned t = 0; t < kTurns; ++t) {
    if (word_of(t) >= count) break;
    const Place place = place_of(word_of(t), octet, row_words);
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

template <class Value, class Element>
__device__ Value as(Element bits) {
  if constexpr (sizeof(Value) == sizeof(Element)) {
    return bits;
  } else {
    return Convert<bf16>::low(bits);
  }
}

// values [nnz] = w [N, K] at the places of W; of bfloat16 they may be float32. The words of a warp
// are neighbours, so are their values: they meet in shared memory and go out together.
template <class Element, class Value>
__device__ void collect(const Word* words, const int* starts, const Element* w, Value* values,
                        unsigned count, unsigned row_words, unsigned k) {
  extern __shared__ __align__(16) char smem[];
  const unsigned lane = threadIdx.x % kWarp, octet = threadIdx.x % kOctets;
  Element* mine = reinterpret_cast<Element*>(smem) + threadIdx.x / kWarp * (kWarp * 8);
  __align__(16) Element eight[kTurns][8];
#pragma unroll
  for (unsigned t = 0; t < kTurns; ++t) {
    if (word_of(t) >= count) break;
    const Place place = place_of(word_of(t), octet, row_words);
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
#pragma unroll
  for (unsigned t = 0; t < kTurns; ++t) {
    const unsigned first_word = word_of(t) - lane / kOctets;
    if (first_word >= count) break;  // of the warp
    const unsigned first = starts[first_word];
    Piece piece = {0, first};
    if (word_of(t) < count) piece = piece_of(words, starts, word_of(t), octet);
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
    for (unsigned i = lane; i < end - first; i += kWarp) values[first + i] = as<Value>(mine[i]);
    __syncwarp();
  }
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
    sk_bitmap_collect_wide(const sk::Word* words, const int* starts, const unsigned short* w,
                           float* values, int count, int row_words, int k) {
  sk::collect(words, starts, w, values, count, row_words, k);
}
SK_KERNEL(sk_bitmap_collect_wide)

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
