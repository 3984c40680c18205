#include "dense.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../common/threads.h"

namespace sk {
namespace {

constexpr int64_t kRows = 32;  // of a task

void check(const char* name, Span span, int64_t size) {
  if (span.first < 0 || span.count < 0 || span.first > size - span.count)
    throw std::invalid_argument(std::string(name) + ": expected some of " + std::to_string(size) +
                                ", got " + std::to_string(span.count) + " from " +
                                std::to_string(span.first) + " on");
}

// Calls f(some of the rows, how many rows come before them).
template <class F>
void for_rows(Pattern& pattern, const Csr& csr, Span rows, int threads, const F& f) {
  check("rows", rows, csr.n);
  const auto compressed = pattern.compressed(csr, Format::kBitmap);
  const Compressed& c = *compressed;
  parallel_for(threads, (rows.count + kRows - 1) / kRows, [&](int64_t task) {
    const int64_t before = task * kRows, first = rows.first + before;
    CompressedRows w{};
    w.row_offsets = c.row_offsets.data() + first;
    w.rows = std::min(kRows, rows.count - before);
    w.nnz = csr.nnz;
    w.bits = c.bits.data() + first * c.words;
    w.words = c.words;
    f(w, before);
  });
}

}  // namespace

void to_dense(Pattern& pattern, const Csr& w, int element_bytes, const void* values, Span rows,
              Span cols, void* dense, int threads) {
  check("cols", cols, w.k);
  if (cols.first % 64)
    throw std::invalid_argument("cols: expected to begin at a multiple of 64, got " +
                                std::to_string(cols.first));
  for_rows(pattern, w, rows, threads, [&](const CompressedRows& some, int64_t before) {
    kernels().expand(element_bytes, some, cols.first, cols.count, values,
                     static_cast<char*>(dense) + before * cols.count * element_bytes);
  });
}

void from_dense(Pattern& pattern, const Csr& w, int element_bytes, const void* dense, Span rows,
                void* values, int threads) {
  for_rows(pattern, w, rows, threads, [&](const CompressedRows& some, int64_t before) {
    kernels().collect(element_bytes, some, w.k,
                      static_cast<const char*>(dense) + before * w.k * element_bytes, values);
  });
}

}  // namespace sk
