// Data that the CPU kernels derive from a sparsity pattern, once. No values are kept here: a call
// reads them where they are, so a changed value is seen by the next call, whoever changed it and
// however.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>

#include "compressed.h"
#include "csr.h"
#include "schedule.h"

namespace sk {

// The schedules and compressed indices of one W, made when first asked for, and anew when W's
// indices have changed (as far as csr.h notices), always from a snapshot that was checked. Safe
// between threads. Both look-ups throw std::invalid_argument if w is not valid CSR with nnz
// non-zeros.
//
// The latest are kept, up to kMostBytes times the bytes of W's indices: numbers of tokens
// and of threads that change from call to call ask for a schedule each.
class Pattern {
 public:
  // Throws std::invalid_argument unless all three are in [0, 2^31).
  Pattern(int64_t n, int64_t k, int64_t nnz);

  // The schedule of W, or of W^T, for these blocks.
  std::shared_ptr<const Schedule> schedule(const Csr& w, bool transposed, int64_t rows_per_block,
                                           int64_t cols_per_block);
  std::shared_ptr<const Compressed> compressed(const Csr& w, Format format);

  int64_t kept_bytes();

  const int64_t n, k, nnz;

 private:
  static constexpr int64_t kMostBytes = 6;  // times those of the indices
  static constexpr size_t kAlways = 3;      // of a training step: W, W^T and SDDMM

  struct Entry {
    int kind;  // of a schedule 0 or, transposed, 1; of a format 2 or more
    int64_t rows, cols;
    int64_t bytes;
    std::shared_ptr<const void> made;
  };

  template <class T, class Make>
  std::shared_ptr<const T> find(const Csr& w, int kind, int64_t rows, int64_t cols,
                                const Make& make);

  std::mutex mutex_;
  Witness witness_;
  std::list<Entry> entries_;  // the last used first
};

}  // namespace sk
