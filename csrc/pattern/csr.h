// The indices of a sparse matrix, which belong to the caller, and how a change of them is noticed.
#pragma once

#include <cstdint>
#include <vector>

namespace sk {

struct Csr {
  const int32_t* row_offsets;  // [n + 1]
  const int32_t* col_indices;  // [nnz], strictly increasing inside a row
  int64_t n, k, nnz;
  // Version of each array: grows with every write to it. Below 0: nobody counts.
  int64_t row_version = -1, col_version = -1;
};

// Throws std::invalid_argument, with what is wrong, unless w is valid CSR with nnz non-zeros.
void check(const Csr& w);

// A private copy of the indices, checked. All that is derived is made from one, so nothing that
// anybody writes to the caller's arrays, at any time, leads a kernel out of its bounds.
class Snapshot {
 public:
  explicit Snapshot(const Csr& w);  // throws as check() does

  Csr csr() const;
  uint64_t hash() const;

 private:
  std::vector<int32_t> row_offsets_, col_indices_;
  int64_t n_, k_;
};

// Recognises the indices that it has learnt. To read all of them on every call would cost as much
// as a product of few tokens. They are believed to be the same if
// - the versions are the same,
// - row_offsets, read whole, are equal, and
// - 64 evenly spaced cache lines of col_indices, or all of them if there are no more, are equal.
// A write that no version counts (a collective, `.data`) is so noticed if it changes the number of
// non-zeros of any row or meets a line of the sample: a pattern replaced by another one always is,
// a single column moved inside its row may not be. Where nobody counts versions (tensors made in
// inference mode), all indices are hashed by each call.
class Witness {
 public:
  bool recognises(const Csr& w);

  // Learns a snapshot of w. Returns whether it holds what was learnt before.
  bool learn(const Csr& w, const Snapshot& snapshot);

 private:
  bool has_seen_ = false;
  int64_t row_version_ = -1, col_version_ = -1;
  uint64_t hash_ = 0;
  std::vector<int32_t> row_offsets_, sample_;
};

}  // namespace sk
