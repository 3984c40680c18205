// Shares the rows of W out to threads. A row is summed by one thread in one order, so the result
// depends neither on the number of threads nor on their timing.
#include "few_tokens.h"

#include <algorithm>

#include "../common/threads.h"
#include "scratch.h"

namespace sk {
namespace {

constexpr int64_t kSmallNnz = 200000;  // below, a second thread costs more than it brings
constexpr int64_t kRowGroup = 16;      // a task has whole groups, so a leaf loop cuts rows alike

thread_local Scratch x_scratch;

}  // namespace

void spmm_few_tokens(Pattern& pattern, const Csr& csr, Format format, Type type, const void* values,
                     const void* bias, Matrix x, Matrix y, int64_t tokens, int threads) {
  const auto compressed = pattern.compressed(csr, format);
  if (tokens == 0 || csr.n == 0) return;
  const Kernels& kern = kernels();
  const Compressed& c = *compressed;
  const int64_t x_floats = 64 * c.words * kFewTokens;
  float* packed = x_scratch.floats(x_floats + csr.n);
  float* start = packed + x_floats;
  bias ? kern.widen(type, bias, csr.n, start) : void(std::fill_n(start, csr.n, 0.0f));
  kern.pack_few(type, format, x, tokens, csr.k, packed);

  const int64_t groups = (csr.n + kRowGroup - 1) / kRowGroup;
  const int64_t most_tasks = csr.nnz < kSmallNnz ? 1 : 4 * std::max(1, threads);
  const int64_t rows = (groups + most_tasks - 1) / most_tasks * kRowGroup;
  parallel_for(threads, (csr.n + rows - 1) / rows, [&](int64_t task) {
    const int64_t first = task * rows;
    const CompressedRows w{c.row_offsets.data() + first,
                           std::min(rows, csr.n - first),
                           csr.nnz,
                           c.bits.data() + first * (format == Format::kBitmap ? c.words : 0),
                           c.words,
                           c.cols.data(),
                           start + first};
    Matrix out = y;
    out.data = static_cast<char*>(y.data) + first * size_of(type);
    kern.spmm_few(type, format, w, values, packed, tokens, out);
  });
}

}  // namespace sk
