// W [N, K] for a CPU: 16 rows in the 16 lanes of a register.
//
// A part is kLanesRows rows, a group 16 of them, a block kLanesCols columns, whose x fits four
// registers of 16 with one number to spare, which is 0. In a block a group has as many steps as the
// longest of its rows has non-zeros there. A step is 16 values and 16 columns of a byte, a row's in
// a lane; rows that have no more take the value 0 and the column of that 0, so that nothing but
// stored values meets x. Inside a block the groups of a part are sorted by their steps, so that the
// end of most is predicted.
//
//   heads  [parts][blocks][groups of the part]: which group, and its steps
//   cols   [steps][16], the bits of a column as in Chunk (pattern/compressed.h)
//   values [steps][16]
#pragma once

#include <cstdint>
#include <vector>

#include "../pattern/csr.h"

namespace sk {

constexpr int kLanesRows = 512, kLanesGroup = 16, kLanesCols = 63;

struct LanesHead {
  uint8_t group, steps;
};

struct LanesShape {
  int64_t n, k;
  int64_t parts() const { return (n + kLanesRows - 1) / kLanesRows; }
  int64_t blocks() const { return (k + kLanesCols - 1) / kLanesCols; }
  int64_t groups() const { return (n + kLanesGroup - 1) / kLanesGroup; }  // of all parts
  int64_t rows_in(int64_t part) const {
    return part + 1 < parts() ? kLanesRows : n - part * kLanesRows;
  }
  int64_t groups_in(int64_t part) const { return (rows_in(part) + kLanesGroup - 1) / kLanesGroup; }
  int64_t heads_before(int64_t part) const { return part * blocks() * (kLanesRows / kLanesGroup); }
};

class LanesPack {
 public:
  // The indices are copied and the copy is checked: std::invalid_argument unless w is valid CSR.
  explicit LanesPack(const Csr& w);

  const LanesShape shape;
  std::vector<int64_t> part_steps;  // [parts + 1]: steps before each part
  std::vector<LanesHead> heads;
  std::vector<uint8_t> cols;
  std::vector<int64_t> places;  // [nnz]: where in values each value belongs
};

// std::invalid_argument unless the heads of `part` name groups that it has, and its steps are some
// of the `steps` of W. Nobody keeps a caller from writing to these arrays; as a column any byte is
// in bounds.
void check_lanes(const LanesShape&, const int64_t* part_steps, const LanesHead* heads,
                 int64_t steps, int64_t part);

// dense[n][k] = W, of elements of so many bytes, on memory of zeros.
void lanes_to_dense(const LanesShape&, const int64_t* part_steps, const LanesHead* heads,
                    int64_t steps, const uint8_t* cols, const void* values, int element_bytes,
                    void* dense, int threads);

}  // namespace sk
