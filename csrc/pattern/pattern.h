// What the CPU kernels derive from a sparsity pattern, once: schedules, i.e. the order in which a
// kernel walks the non-zeros. Values are never kept here: a call reads them where they are, so a
// changed value is seen by the next call, whoever changed it and however.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

namespace sk {

struct Csr {
  const int32_t* row_offsets;  // [n + 1]
  const int32_t* col_indices;  // [nnz], strictly increasing inside a row
  int64_t n, k, nnz;
  int64_t version;  // grows with every write to the two arrays; below 0: nobody counted
};

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

// The schedules of one W and its transpose. Row offsets and columns belong to the caller, who may
// change them. A look-up trusts the version that comes with them as far as it is known, and always
// compares samples: collectives and `.data` write whole patterns without counting. Where nobody
// counts (tensors made in inference mode), a fingerprint of all indices is compared.
class Pattern {
 public:
  Pattern(int64_t n, int64_t k, int64_t nnz) : n(n), k(k), nnz(nnz) {}

  // The schedule of W, or of W^T, for these blocks; made when first asked for. Safe between
  // threads. Throws std::invalid_argument if w is not valid CSR with nnz non-zeros.
  std::shared_ptr<const Schedule> schedule(const Csr& w, bool transposed, int64_t rows_per_block,
                                           int64_t cols_per_block);

  const int64_t n, k, nnz;

 private:
  void forget_if_changed(const Csr& w);

  std::mutex mutex_;
  bool is_known_ = false;
  int64_t version_ = 0;
  uint64_t samples_ = 0, fingerprint_ = 0;
  std::map<std::tuple<bool, int64_t, int64_t>, std::shared_ptr<const Schedule>> schedules_;
};

}  // namespace sk
