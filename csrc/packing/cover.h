// W [N, K] as groups of four slots, for the sparse tensor cores of a GPU (csrc/cuda/spmm_cover.cu).
//
// A tile is 32 rows (a slice of `row_order`) times a window of 256 columns. Its columns are put
// into slots, four of them a group, such that no row has more than one non-zero in a group: then
// one operand of mma.sp holds them with their positions. A column that fits nowhere whole is split
// by rows over several slots, so every pattern has a cover, and nothing is left out. Eight groups
// are a step: one instruction for each 16 rows. Slots that stay empty hold zeros.
#pragma once

#include <cstdint>
#include <vector>

#include "../pattern/csr.h"

namespace sk {

constexpr int kCoverRows = 32;
constexpr int kCoverWindow = 256;  // columns
constexpr int kCoverGroup = 4;     // slots
constexpr int kCoverGroups = 8;    // of a step

// Of a step: values, and the bytes of positions and columns.
constexpr int kCoverValues = 256, kCoverIndexBytes = 64 + 32;
constexpr int cover_record_bytes(int value_bytes) {
  return kCoverValues * value_bytes + kCoverIndexBytes;
}

class Cover {
 public:
  // row_order [slices * 32]: the row of each lane, -1 for none. All indices are copied and the
  // copies are checked: std::invalid_argument unless w is valid CSR and row_order has each row
  // once.
  Cover(const Csr& w, const int32_t* row_order, int64_t slices, int threads);

  int64_t steps() const { return step_offsets_.back(); }

  // step_offsets [slices * windows + 1]: steps before each tile. records [steps * record bytes]:
  // all but the values, which are 0, of value_bytes, 1 or 2. places [nnz]: where each value
  // belongs, in units of value_bytes.
  void write(int32_t* step_offsets, uint8_t* records, int64_t* places, int value_bytes) const;

 private:
  struct Slot {
    uint32_t rows;  // of the slice, whose entries in this column are here
    uint8_t col;    // of the window
  };
  using Step = Slot[kCoverGroups * kCoverGroup];

  std::vector<int32_t> row_offsets_, col_indices_, row_order_;
  int64_t slices_, windows_;
  int threads_;
  std::vector<std::vector<Slot>> slots_;  // of each slice, tile by tile, whole steps
  std::vector<int64_t> step_offsets_;
};

}  // namespace sk
