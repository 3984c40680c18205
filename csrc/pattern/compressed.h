// Column indices in fewer bytes than CSR's four: for few tokens a product is a read of W from
// memory, and with 4-byte values the indices are half of that.
//
//   kBitmap     a bit per place of W: N x K / 8 bytes, fewest above a density of 1/16
//   kWindow64,  20 bytes for up to 16 consecutive non-zeros of a row that lie in a window of 64 or
//   kWindow128  128 columns, for K <= 65536
//   kColumns    16 bits per non-zero, for K <= 65536
//   kColumns32  32 bits per non-zero
//
// Only the indices are derived. Values are read where they are, in CSR order, by every call.
#pragma once

#include <cstdint>
#include <vector>

#include "csr.h"

namespace sk {

enum class Format { kBitmap, kColumns, kWindow64, kWindow128, kColumns32 };

constexpr int kChunk = 16;
struct Chunk {
  uint16_t base;         // the window begins at column kChunk * base
  uint16_t mask;         // as many bits, from the lowest on, as there are non-zeros
  uint8_t cols[kChunk];  // in the window: bits 0 to 4 of the column, its bit 5 as bit 7, 6 as bit 6
};

// The indices that a kernel reads: always our memory, so that whatever happens to the caller's
// indices after they were checked, no access leaves its bounds.
struct Compressed {
  std::vector<int32_t> row_offsets;    // [n + 1]
  int64_t words;                       // of a row's bits
  std::vector<uint64_t> bits;          // kBitmap: [n][words], column 64 w + b is bit b of word w
  std::vector<uint16_t> cols;          // kColumns: [nnz + kColumnPadding]
  std::vector<int32_t> cols32;         // kColumns32: [nnz]
  std::vector<int32_t> chunk_offsets;  // kWindow*: [n + 1] into chunks
  std::vector<Chunk> chunks;
};
constexpr int kColumnPadding = 32;  // zeros, so that a full vector can be loaded at every non-zero

// Throws std::invalid_argument if the format has no room for K columns.
Compressed compress(const Csr& w, Format format);

}  // namespace sk
