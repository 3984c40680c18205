// The indices of a sparse matrix, which belong to the caller, and how a change of them is noticed.
#pragma once

#include <cstdint>
#include <vector>

namespace sk {

struct Csr {
  const int32_t* row_offsets;  // [n + 1]
  const int32_t* col_indices;  // [nnz], strictly increasing inside a row
  int64_t n, k, nnz;
  int64_t version;  // grows with every write to the two arrays; below 0: nobody counts
};

// Throws std::invalid_argument, with what is wrong, unless w is valid CSR with nnz non-zeros.
void check(const Csr& w);

// Recognises the indices it has seen last. To read all of them on every call would cost as much as
// a product of few tokens. They are believed to be the same if
// - the version is the same,
// - row_offsets, read whole, are equal, and
// - 64 evenly spaced cache lines of col_indices, or all of them if there are no more, are equal.
// A write that no version counts (a collective, `.data`) is so noticed if it changes the number of
// non-zeros of any row or meets a line of the sample: a pattern replaced by another one always is,
// a single column moved inside its row may not be. Where nobody counts versions (tensors made in
// inference mode), all indices are hashed by each call.
class Witness {
 public:
  // Whether w is what it was. If not, it is checked, and is what the next call compares with.
  // Throws std::invalid_argument if w is not valid CSR with nnz non-zeros.
  bool recognises(const Csr& w);

 private:
  bool is_known(const Csr& w);

  bool has_seen_ = false;
  int64_t version_ = -1;
  uint64_t hash_ = 0;
  std::vector<int32_t> row_offsets_, sample_;
};

}  // namespace sk
