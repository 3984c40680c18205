// What the CPU kernels derive from a sparsity pattern, once. Values are never kept here: a call
// reads them where they are, so a changed value is seen by the next call, whoever changed it and
// however.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "compressed.h"
#include "csr.h"
#include "schedule.h"

namespace sk {

// The schedules and compressed indices of one W, made when first asked for, and anew when W's
// indices have changed (as far as csr.h notices). Safe between threads. Both look-ups throw
// std::invalid_argument if w is not valid CSR with nnz non-zeros.
class Pattern {
 public:
  Pattern(int64_t n, int64_t k, int64_t nnz) : n(n), k(k), nnz(nnz) {}

  // The schedule of W, or of W^T, for these blocks.
  std::shared_ptr<const Schedule> schedule(const Csr& w, bool transposed, int64_t rows_per_block,
                                           int64_t cols_per_block);
  std::shared_ptr<const Compressed> compressed(const Csr& w, Format format);

  const int64_t n, k, nnz;

 private:
  void forget_if_changed(const Csr& w);

  std::mutex mutex_;
  Witness witness_;
  std::map<std::tuple<bool, int64_t, int64_t>, std::shared_ptr<const Schedule>> schedules_;
  std::map<Format, std::shared_ptr<const Compressed>> compressed_;
};

}  // namespace sk
