#include "dense.h"

#include <algorithm>
#include <cstring>

#include "../cpu/threads.h"

namespace sk {
namespace {

template <class F>
void with_element(int bytes, F f) {
  if (bytes == 2) f(uint16_t{});
  if (bytes == 4) f(uint32_t{});
  if (bytes == 8) f(uint64_t{});
}

template <class F>
void for_rows(const Csr& w, int threads, F f) {
  constexpr int64_t kRows = 64;
  parallel_for(threads, (w.n + kRows - 1) / kRows, [&](int64_t block) {
    for (int64_t i = block * kRows; i < std::min(w.n, (block + 1) * kRows); i++) f(i);
  });
}

}  // namespace

void to_dense(const Csr& w, int element_bytes, const void* values, void* dense, int threads) {
  with_element(element_bytes, [&](auto element) {
    using T = decltype(element);
    for_rows(w, threads, [&](int64_t i) {
      T* row = static_cast<T*>(dense) + i * w.k;
      std::memset(row, 0, w.k * sizeof(T));
      for (int32_t p = w.row_offsets[i]; p < w.row_offsets[i + 1]; p++)
        row[w.col_indices[p]] = static_cast<const T*>(values)[p];
    });
  });
}

void from_dense(const Csr& w, int element_bytes, const void* dense, void* values, int threads) {
  with_element(element_bytes, [&](auto element) {
    using T = decltype(element);
    for_rows(w, threads, [&](int64_t i) {
      const T* row = static_cast<const T*>(dense) + i * w.k;
      for (int32_t p = w.row_offsets[i]; p < w.row_offsets[i + 1]; p++)
        static_cast<T*>(values)[p] = row[w.col_indices[p]];
    });
  });
}

}  // namespace sk
