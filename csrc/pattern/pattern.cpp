#include "pattern.h"

#include <algorithm>
#include <stdexcept>

#include "../cpu/kernels.h"

namespace sk {

namespace {

// Null if w is valid, else what is wrong with it.
const char* find_error(const Csr& w) {
  if (w.row_offsets[0] != 0) return "row_offsets: expected to begin with 0";
  for (int64_t i = 0; i < w.n; i++)
    if (w.row_offsets[i + 1] < w.row_offsets[i]) return "row_offsets: expected never to decrease";
  if (w.row_offsets[w.n] != w.nnz) return "row_offsets: expected to end with the number of columns";
  for (int64_t i = 0; i < w.n; i++) {
    int32_t previous = -1;
    for (int32_t p = w.row_offsets[i]; p < w.row_offsets[i + 1]; p++) {
      const int32_t col = w.col_indices[p];
      if (col <= previous) return "col_indices: expected >= 0 and strictly increasing in each row";
      previous = col;
    }
    if (previous >= w.k) return "col_indices: expected to lie below in_features";
  }
  return nullptr;
}

uint64_t fingerprint(const Csr& w) {
  const auto hash = kernels().hash;
  const uint64_t parts[] = {hash(w.row_offsets, w.n + 1), hash(w.col_indices, w.nnz)};
  return hash(reinterpret_cast<const int32_t*>(parts), 4);
}

// A fingerprint of cache lines evenly spread over both arrays.
uint64_t fingerprint_samples(const Csr& w) {
  constexpr int64_t kLines = 64, kWords = 16;
  int32_t words[2 * kLines * kWords];
  int64_t size = 0;
  auto sample = [&](const int32_t* from, int64_t count) {
    const int64_t step = std::max(kWords, count / kLines);
    for (int64_t i = 0; i < count; i += step) {
      const int64_t most = std::min(kWords, std::min(count - i, 2 * kLines * kWords - size));
      std::copy_n(from + i, most, words + size);
      size += most;
    }
  };
  sample(w.row_offsets, w.n + 1);
  sample(w.col_indices, w.nnz);
  return kernels().hash(words, size);
}

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

// The same for W^T, whose rows are columns of W. A block is transposed while it is in cache.
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

void Pattern::forget_if_changed(const Csr& w) {
  const uint64_t samples = fingerprint_samples(w);
  if (is_known_ && w.version >= 0 && w.version == version_ && samples == samples_) return;
  const uint64_t now = fingerprint(w);
  if (!is_known_ || now != fingerprint_) {
    is_known_ = false;
    schedules_.clear();
    if (const char* error = find_error(w)) throw std::invalid_argument(error);
  }
  is_known_ = true;
  version_ = w.version;
  samples_ = samples;
  fingerprint_ = now;
}

std::shared_ptr<const Schedule> Pattern::schedule(const Csr& w, bool transposed,
                                                  int64_t rows_per_block, int64_t cols_per_block) {
  std::lock_guard<std::mutex> lock(mutex_);
  forget_if_changed(w);
  auto& schedule = schedules_[{transposed, rows_per_block, cols_per_block}];
  if (!schedule) {
    auto make = transposed ? make_schedule_t : make_schedule;
    schedule = std::make_shared<const Schedule>(make(w, rows_per_block, cols_per_block));
  }
  return schedule;
}

}  // namespace sk
