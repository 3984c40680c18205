#include "schedule.h"

#include <algorithm>

namespace sk {
namespace {

// Appends the segments of a block, given how many non-zeros each row has there.
void append_segments(Schedule& s, const std::vector<int32_t>& count, int64_t rows) {
  // Counting sort, stable: rows of equal count stay in order, so reads keep moving forward.
  const int32_t most = *std::max_element(count.begin(), count.begin() + rows);
  const bool keeps_empty = (s.run_offsets.size() - 1) % s.col_blocks == 0;
  std::vector<int32_t> first_of(most + 2, 0);
  for (int64_t i = 0; i < rows; i++) first_of[count[i] + 1]++;
  if (!keeps_empty) first_of[1] = 0;
  const int64_t base = static_cast<int64_t>(s.row.size());
  for (int32_t c = 0; c <= most; c++) {
    if (first_of[c + 1] > 0) s.runs.push_back({c, first_of[c + 1], base + first_of[c]});
    first_of[c + 1] += first_of[c];
  }
  s.row.resize(base + first_of[most + 1]);
  for (int64_t i = 0; i < rows; i++)
    if (count[i] > 0 || keeps_empty) s.row[base + first_of[count[i]]++] = static_cast<uint16_t>(i);
  s.run_offsets.push_back(static_cast<int64_t>(s.runs.size()));
}

Schedule empty_schedule(int64_t n, int64_t k, int64_t nnz, int64_t rows, int64_t cols) {
  Schedule s;
  s.rows_per_block = rows;
  s.cols_per_block = cols;
  s.row_blocks = (n + rows - 1) / rows;
  s.col_blocks = std::max<int64_t>(1, (k + cols - 1) / cols);
  s.run_offsets.push_back(0);
  s.nnz_offsets.push_back(0);
  s.cols.resize(nnz);
  return s;
}

}  // namespace

Schedule make_schedule(const Csr& w, int64_t rows_per_block, int64_t cols_per_block) {
  Schedule s = empty_schedule(w.n, w.k, w.nnz, rows_per_block, cols_per_block);
  std::vector<int32_t> next(w.row_offsets, w.row_offsets + w.n), count(rows_per_block);
  int64_t at = 0;
  for (int64_t r0 = 0; r0 < w.n; r0 += rows_per_block) {
    const int64_t rows = std::min(rows_per_block, w.n - r0);
    for (int64_t b = 0; b < s.col_blocks; b++) {
      const int64_t c0 = b * cols_per_block, c1 = std::min(w.k, c0 + cols_per_block);
      for (int64_t i = 0; i < rows; i++) {
        int32_t p = next[r0 + i];
        while (p < w.row_offsets[r0 + i + 1] && w.col_indices[p] < c1) p++;
        count[i] = p - next[r0 + i];
      }
      append_segments(s, count, rows);
      for (size_t q = s.start.size(); q < s.row.size(); q++) {
        const int32_t i = s.row[q];
        int32_t& p = next[r0 + i];
        s.start.push_back(static_cast<uint32_t>(p));
        for (int32_t end = p + count[i]; p < end; p++)
          s.cols[at++] = static_cast<uint16_t>(w.col_indices[p] - c0);
      }
      s.nnz_offsets.push_back(at);
    }
  }
  s.start.resize(s.start.size() + Schedule::kAhead);
  return s;
}

// A block is transposed while it is in cache.
Schedule make_schedule_t(const Csr& w, int64_t rows_per_block, int64_t cols_per_block) {
  Schedule s = empty_schedule(w.k, w.n, w.nnz, rows_per_block, cols_per_block);
  s.source.resize(w.nnz + Schedule::kAhead);
  std::vector<int32_t> next(w.row_offsets, w.row_offsets + w.n), count(rows_per_block);
  std::vector<int64_t> place(rows_per_block);
  int64_t at = 0;
  for (int64_t c0 = 0; c0 < w.k; c0 += rows_per_block) {
    const int64_t cols = std::min(rows_per_block, w.k - c0);
    for (int64_t b = 0; b < s.col_blocks; b++) {
      const int64_t r0 = b * cols_per_block, r1 = std::min(w.n, r0 + cols_per_block);
      // Calls f(row of W, position in CSR) for what W has in this block.
      auto for_entries = [&](auto f) {
        for (int64_t i = r0; i < r1; i++) {
          int32_t p = next[i];
          while (p < w.row_offsets[i + 1] && w.col_indices[p] < c0 + cols) f(i, p++);
        }
      };
      std::fill_n(count.begin(), cols, 0);
      for_entries([&](int64_t, int32_t p) { count[w.col_indices[p] - c0]++; });
      const size_t before = s.row.size();
      append_segments(s, count, cols);
      for (size_t q = before; q < s.row.size(); at += count[s.row[q++]]) place[s.row[q]] = at;
      for_entries([&](int64_t i, int32_t p) {
        const int64_t to = place[w.col_indices[p] - c0]++;
        s.cols[to] = static_cast<uint16_t>(i - r0);
        s.source[to] = p;
        next[i] = p + 1;
      });
      s.nnz_offsets.push_back(at);
    }
  }
  return s;
}

}  // namespace sk
