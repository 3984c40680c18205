#include "dense.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../common/threads.h"

namespace sk {
namespace {

[[noreturn]] void fail(const char* what) { throw std::invalid_argument(what); }

template <class F>
void with_element(int bytes, F f) {
  if (bytes == 2) f(uint16_t{});
  if (bytes == 4) f(uint32_t{});
  if (bytes == 8) f(uint64_t{});
}

// Once, whoever writes to it meanwhile: what was checked is what is used.
int64_t read(const int32_t* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }

// Calls f(row, first, columns, count) for each row, whose entries are the ones from `first` on.
// Its columns are copied before they are checked: what f sees cannot change any more.
template <class F>
void for_rows(const Csr& w, int threads, F f) {
  constexpr int64_t kRows = 64;
  if (read(w.row_offsets) != 0) fail("row_offsets: expected to begin with 0");
  if (w.n == 0 && w.nnz != 0) fail("row_offsets: expected to end with the number of columns");
  parallel_for(threads, (w.n + kRows - 1) / kRows, [&](int64_t block) {
    const int64_t end = std::min(w.n, (block + 1) * kRows);
    std::vector<int32_t> columns;
    int64_t first = read(w.row_offsets + block * kRows);
    for (int64_t i = block * kRows; i < end; i++) {
      const int64_t last = read(w.row_offsets + i + 1);
      if (first < 0 || last < first || last > w.nnz)
        fail("row_offsets: expected never to decrease, and to end with the number of columns");
      columns.assign(w.col_indices + first, w.col_indices + last);
      const size_t count = columns.size();
      // Four or more at a time, which a chain from one column to the next would not be.
      bool is_rising = count == 0 || (columns[0] >= 0 && columns[count - 1] < w.k);
      for (size_t p = 1; p < count; p++) is_rising &= columns[p] > columns[p - 1];
      if (!is_rising) {
        const Snapshot all(w);  // says what is wrong; the fault may be that of a row offset
        fail("col_indices: expected to stay as they are during a product");
      }
      f(i, first, columns.data(), last - first);
      first = last;
    }
    if (end == w.n && first != w.nnz)
      fail("row_offsets: expected to end with the number of columns");
  });
}

}  // namespace

void to_dense(const Csr& w, int element_bytes, const void* values, void* dense, int threads) {
  with_element(element_bytes, [&](auto element) {
    using T = decltype(element);
    for_rows(w, threads, [&](int64_t i, int64_t first, const int32_t* columns, int64_t count) {
      T* row = static_cast<T*>(dense) + i * w.k;
      const T* stored = static_cast<const T*>(values) + first;
      std::fill_n(row, w.k, T{0});
      for (int64_t p = 0; p < count; p++) row[columns[p]] = stored[p];
    });
  });
}

void from_dense(const Csr& w, int element_bytes, const void* dense, void* values, int threads) {
  with_element(element_bytes, [&](auto element) {
    using T = decltype(element);
    for_rows(w, threads, [&](int64_t i, int64_t first, const int32_t* columns, int64_t count) {
      const T* row = static_cast<const T*>(dense) + i * w.k;
      T* stored = static_cast<T*>(values) + first;
      for (int64_t p = 0; p < count; p++) stored[p] = row[columns[p]];
    });
  });
}

}  // namespace sk
