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

constexpr int64_t kShortRow = 2;  // non-zeros of a row, on average, that are taken one by one
constexpr int64_t kPartsT = 8;    // that rows are cut into, each with sums of its own

thread_local Scratch x_scratch, y_scratch;

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
                         turn % 2 ? Lookup::kPick : Lookup::kGather, {y.data(), 0});
      best[turn % 2] = std::min(best[turn % 2],
                                std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin));
    }
    return best[1] < best[0];
  }();
  return is_faster;
}

Lookup lookup_of(const Csr& csr) {
  if (csr.nnz < kShortRow * csr.n) return Lookup::kScalar;
  return picks() ? Lookup::kPick : Lookup::kGather;
}

// Rows from `first` on.
CompressedRows rows_of(const Compressed& c, int64_t nnz, int64_t first, int64_t rows,
                       const float* start) {
  const int64_t words = c.bits.empty() ? 0 : c.words;
  return {c.row_offsets.data() + first,
          rows,
          nnz,
          c.bits.data() + first * words,
          c.words,
          c.cols.empty() ? nullptr : c.cols.data(),
          c.cols32.empty() ? nullptr : c.cols32.data(),
          c.chunk_offsets.empty() ? nullptr : c.chunk_offsets.data() + first,
          c.chunks.data(),
          start};
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

  const bool looks_up = format == Format::kColumns && tokens == 1;
  const Lookup lookup = looks_up ? lookup_of(csr) : Lookup::kGather;
  const int64_t groups = (csr.n + kRowGroup - 1) / kRowGroup;
  const int64_t most_tasks = csr.nnz < kSmallNnz ? 1 : 4 * std::max(1, threads);
  const int64_t rows = (groups + most_tasks - 1) / most_tasks * kRowGroup;
  parallel_for(threads, (csr.n + rows - 1) / rows, [&](int64_t task) {
    const int64_t first = task * rows;
    const CompressedRows w =
        rows_of(c, csr.nnz, first, std::min(rows, csr.n - first), start + first);
    Matrix out = y;
    out.data = static_cast<char*>(y.data) + first * size_of(type);
    kern.spmm_few(type, format, w, values, packed, tokens, lookup, out);
  });
}

// Each part of the rows has sums of its own, which are added up in order: as many parts as W makes
// worth it, whatever the threads.
void spmm_t_few_tokens(Pattern& pattern, const Csr& csr, Type type, const void* values,
                       const void* bias, Matrix dy, Matrix y, int64_t tokens, int threads) {
  const auto compressed =
      pattern.compressed(csr, csr.k <= 65536 ? Format::kColumns : Format::kColumns32);
  if (tokens == 0 || csr.k == 0) return;
  const Kernels& kern = kernels();
  const int width = tokens <= 2 ? static_cast<int>(tokens) : tokens <= 4 ? 4 : 8;
  const int64_t most = std::min(kPartsT, csr.nnz / std::max(kSmallNnz, 8 * csr.k));
  const int64_t parts = std::max<int64_t>(1, most), rows = (csr.n + parts - 1) / parts;
  const int64_t in = csr.n * width, out = csr.k * width;
  double* wide_dy = reinterpret_cast<double*>(x_scratch.floats(2 * in));
  double* sums = reinterpret_cast<double*>(y_scratch.floats(2 * parts * out));
  kern.widen_t(type, dy, tokens, csr.n, width, wide_dy);
  parallel_for(threads, parts, [&](int64_t part) {
    const int64_t first = std::min(csr.n, part * rows);
    std::fill_n(sums + part * out, out, 0.0);
    const CompressedRows w =
        rows_of(*compressed, csr.nnz, first, std::min(rows, csr.n - first), nullptr);
    kern.spmm_t_few(type, w, values, wide_dy + first * width, width, sums + part * out);
  });
  for (int64_t part = 1; part < parts; part++)
    for (int64_t i = 0; i < out; i++) sums[i] += sums[part * out + i];
  kern.narrow_t(type, sums, width, bias, tokens, csr.k, y);
}

}  // namespace sk
