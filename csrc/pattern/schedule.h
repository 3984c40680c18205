// The order in which the panel kernels walk the non-zeros.
#pragma once

#include <cstdint>
#include <vector>

#include "csr.h"

namespace sk {

// W is cut into row blocks and column blocks. A segment is what one row has in one column block; it
// is contiguous in CSR, since columns increase. Inside a block the segments are sorted by their
// number of non-zeros, so the kernel's inner loop has one trip count for a whole run and its exit
// is predicted. Empty segments stand only in the first column block, where they clear the output
// row.

// Consecutive segments that hold the same number of non-zeros.
struct Run {
  int32_t count;     // non-zeros in each segment
  int32_t segments;  // how many
  int64_t first;     // index of the first segment
};

struct Schedule {
  static constexpr int kAhead = 16;  // zeros at the end of an array that is read ahead of use

  int64_t rows_per_block, cols_per_block;
  int64_t row_blocks, col_blocks;
  std::vector<Run> runs;             // ordered by row block, then column block
  std::vector<int64_t> run_offsets;  // [row_blocks * col_blocks + 1] into runs
  std::vector<int64_t> nnz_offsets;  // [row_blocks * col_blocks + 1] into cols
  std::vector<uint16_t> row;         // [segments] row inside its row block
  std::vector<uint32_t> start;       // [segments + kAhead] position of the first non-zero in CSR
  std::vector<uint16_t> cols;        // [nnz] column inside its column block, in walking order
  std::vector<int32_t> source;       // [nnz + kAhead] W^T only: position in CSR, in walking order
};

// rows_per_block and cols_per_block are at most 65536.
Schedule make_schedule(const Csr& w, int64_t rows_per_block, int64_t cols_per_block);

// The same for W^T, whose rows are columns of W.
Schedule make_schedule_t(const Csr& w, int64_t rows_per_block, int64_t cols_per_block);

}  // namespace sk
