// Shares the rows of W out to threads. A row is summed by one thread in one order, so the result
// depends neither on the number of threads nor on their timing.
#include "few_tokens.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "../common/threads.h"
#include "scratch.h"

namespace sk {
namespace {

constexpr int64_t kSmallNnz = 200000;  // below, a second thread costs more than it brings
constexpr int64_t kRowGroup = 16;      // a task has whole groups, so a leaf loop cuts rows alike

thread_local Scratch x_scratch;

// Whether x is picked faster than it is gathered (lanes.h): AMD's gathers are slow, not Intel's.
// Measured once, in 0.2 ms, on a weight of zeros.
bool picks() {
  static const bool is_faster = [] {
    constexpr int64_t kRows = 16, kNnz = 256;  // of a row
    std::vector<int32_t> offsets(kRows + 1);
    std::vector<uint16_t> cols(kRows * kNnz + kColumnPadding);
    for (int64_t i = 0; i <= kRows; i++) offsets[i] = static_cast<int32_t>(i * kNnz);
    for (int64_t p = 0; p < kRows * kNnz; p++) cols[p] = static_cast<uint16_t>(p * 37 % 1024);
    std::vector<float> zeros(kRows * kNnz + kRows), x(kBeforeFew + 1024), y(kRows);
    CompressedRows w{};
    w.row_offsets = offsets.data(), w.rows = kRows, w.nnz = kRows * kNnz, w.cols = cols.data();
    w.start = zeros.data();
    std::chrono::nanoseconds best[2] = {std::chrono::hours(1), std::chrono::hours(1)};
    for (int turn = 0; turn < 40; turn++) {
      const auto begin = std::chrono::steady_clock::now();
      kernels().spmm_few(Type::kFloat, Format::kColumns, w, zeros.data(), x.data() + kBeforeFew, 1,
                         turn % 2, {y.data(), 0});
      best[turn % 2] = std::min(best[turn % 2],
                                std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin));
    }
    return best[1] < best[0];
  }();
  return is_faster;
}

}  // namespace

void spmm_few_tokens(Pattern& pattern, const Csr& csr, Format format, Type type, const void* values,
                     const void* bias, Matrix x, Matrix y, int64_t tokens, int threads) {
  const auto compressed = pattern.compressed(csr, format);
  if (tokens == 0 || csr.n == 0) return;
  const Kernels& kern = kernels();
  const Compressed& c = *compressed;
  const int64_t x_floats = 64 * c.words * kFewTokens;
  float* packed = x_scratch.floats(kBeforeFew + x_floats + csr.n) + kBeforeFew;
  float* start = packed + x_floats;
  bias ? kern.widen(type, bias, csr.n, start) : void(std::fill_n(start, csr.n, 0.0f));
  kern.pack_few(type, format, x, tokens, csr.k, packed);

  const bool is_picked = format == Format::kColumns && tokens == 1 && picks();
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
                           c.chunk_offsets.data() + (c.chunk_offsets.empty() ? 0 : first),
                           c.chunks.data(),
                           start + first};
    Matrix out = y;
    out.data = static_cast<char*>(y.data) + first * size_of(type);
    kern.spmm_few(type, format, w, values, packed, tokens, is_picked, out);
  });
}

}  // namespace sk
