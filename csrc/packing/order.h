// One order of the columns of W [N, K], in which stock 2:4 sparse products hold any W that is
// sparse enough: at most two of four neighbours are stored in each row.
//
// Columns are put into slots, four of them a group. A column that fits into no group whole is split
// by rows over several slots, so nothing is left out, and the slots are at least as many as the
// columns. From 90 % zeros on, 4096 rows of random places take hardly more.
#pragma once

#include <cstdint>
#include <vector>

#include "../pattern/csr.h"

namespace sk {

class Order {
 public:
  // The indices are copied and the copies are checked: std::invalid_argument unless w is valid CSR.
  // Gives up where more than most_slots would be needed.
  Order(const Csr& w, int64_t most_slots);

  // A multiple of 4, or 0 where it gave up.
  int64_t slots() const { return static_cast<int64_t>(columns_.size()); }

  // columns [slots]: the column of each, -1 for none. places [nnz]: the slot of each entry.
  void write(int32_t* columns, int32_t* places) const;

 private:
  struct Part {  // of a column, in a slot that is not its last one
    int32_t column, slot;
    std::vector<uint64_t> rest;  // bits: rows that later slots hold
  };

  std::vector<int32_t> row_offsets_, col_indices_;
  std::vector<int32_t> columns_;    // of the slots
  std::vector<int32_t> last_slot_;  // of the columns
  std::vector<Part> parts_;         // by column, then by slot
};

}  // namespace sk
