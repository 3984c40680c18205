// Column indices in fewer bytes than CSR's four: for few tokens a product is a read of W from
// memory, and with 4-byte values the indices are half of that.
//
//   kBitmap   a bit per place of W: N x K / 8 bytes, fewest above a density of 1/16
//   kColumns  16 bits per non-zero, for K <= 65536
//
// Only the indices are derived. Values are read where they are, in CSR order, by every call.
#pragma once

#include <cstdint>
#include <vector>

#include "csr.h"

namespace sk {

enum class Format { kBitmap, kColumns };

// The indices that a kernel reads: always our memory, so that whatever happens to the caller's
// indices after they were checked, no access leaves its bounds.
struct Compressed {
  std::vector<int32_t> row_offsets;  // [n + 1]
  int64_t words;                     // of a row's bits
  std::vector<uint64_t> bits;        // kBitmap: [n][words], column 64 w + b is bit b of word w
  std::vector<uint16_t> cols;        // kColumns: [nnz + kColumnPadding]
};
constexpr int kColumnPadding = 32;  // zeros, so that a full vector can be loaded at every non-zero

// Throws std::invalid_argument if the format has no room for K columns.
Compressed compress(const Csr& w, Format format);

}  // namespace sk
