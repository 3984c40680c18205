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

}  // namespace

Schedule make_schedule(const Csr& w, int64_t rows_per_block, int64_t cols_per_block) {
  Schedule s;
  s.rows_per_block = rows_per_block;
  s.cols_per_block = cols_per_block;
  s.row_blocks = (w.n + rows_per_block - 1) / rows_per_block;
  s.col_blocks = std::max<int64_t>(1, (w.k + cols_per_block - 1) / cols_per_block);
  s.run_offsets.push_back(0);
  s.nnz_offsets.push_back(0);
  s.cols.reserve(w.nnz);

  std::vector<int32_t> next(rows_per_block), count(rows_per_block), first_of;
  for (int64_t r0 = 0; r0 < w.n; r0 += rows_per_block) {
    const int64_t rows = std::min(rows_per_block, w.n - r0);
    std::copy_n(w.row_offsets + r0, rows, next.begin());
    for (int64_t b = 0; b < s.col_blocks; b++) {
      const int64_t end_col = std::min(w.k, (b + 1) * cols_per_block);
      int32_t most = 0;
      for (int64_t i = 0; i < rows; i++) {
        const int32_t end = w.row_offsets[r0 + i + 1];
        int32_t p = next[i];
        while (p < end && w.col_indices[p] < end_col) p++;
        count[i] = p - next[i];
        most = std::max(most, count[i]);
      }
      // Counting sort, stable: rows of equal count stay in order, so reads keep moving forward.
      first_of.assign(most + 2, 0);
      for (int64_t i = 0; i < rows; i++) first_of[count[i] + 1]++;
      if (b > 0) first_of[1] = 0;
      const int64_t base = static_cast<int64_t>(s.row.size());
      for (int32_t c = 0; c <= most; c++) {
        if (first_of[c + 1] > 0) s.runs.push_back({c, first_of[c + 1], base + first_of[c]});
        first_of[c + 1] += first_of[c];
      }
      s.row.resize(base + first_of[most + 1]);
      s.start.resize(s.row.size());
      for (int64_t i = 0; i < rows; i++) {
        if (count[i] == 0 && b > 0) continue;
        const int64_t at = base + first_of[count[i]]++;
        s.row[at] = static_cast<uint16_t>(i);
        s.start[at] = static_cast<uint32_t>(next[i]);
        next[i] += count[i];
      }
      for (size_t r = s.run_offsets.back(); r < s.runs.size(); r++)
        for (int64_t q = 0; q < s.runs[r].segments; q++) {
          const int32_t* cols = w.col_indices + s.start[s.runs[r].first + q];
          for (int32_t p = 0; p < s.runs[r].count; p++)
            s.cols.push_back(static_cast<uint16_t>(cols[p] - b * cols_per_block));
        }
      s.run_offsets.push_back(static_cast<int64_t>(s.runs.size()));
      s.nnz_offsets.push_back(static_cast<int64_t>(s.cols.size()));
    }
  }
  s.start.resize(s.start.size() + Schedule::kAhead);
  return s;
}

namespace {

// W^T as CSR; its position p holds the value that W holds at position source[p].
struct Transposed {
  std::vector<int32_t> row_offsets, col_indices, source;

  explicit Transposed(const Csr& w) : row_offsets(w.k + 1, 0), col_indices(w.nnz), source(w.nnz) {
    for (int64_t p = 0; p < w.nnz; p++) row_offsets[w.col_indices[p] + 1]++;
    for (int64_t c = 0; c < w.k; c++) row_offsets[c + 1] += row_offsets[c];
    std::vector<int32_t> next(row_offsets.begin(), row_offsets.end() - 1);
    for (int64_t i = 0; i < w.n; i++)
      for (int32_t p = w.row_offsets[i]; p < w.row_offsets[i + 1]; p++) {
        const int32_t at = next[w.col_indices[p]]++;
        col_indices[at] = static_cast<int32_t>(i);
        source[at] = p;
      }
  }
};

Schedule make_schedule_t(const Csr& w, int64_t rows_per_block, int64_t cols_per_block) {
  const Transposed t(w);
  Schedule s = make_schedule({t.row_offsets.data(), t.col_indices.data(), w.k, w.n, w.nnz, 0},
                             rows_per_block, cols_per_block);
  s.source.reserve(w.nnz + Schedule::kAhead);
  for (const Run& run : s.runs)
    for (int64_t q = run.first; q < run.first + run.segments; q++)
      s.source.insert(s.source.end(), t.source.begin() + s.start[q],
                      t.source.begin() + s.start[q] + run.count);
  s.source.resize(w.nnz + Schedule::kAhead);
  return s;
}

}  // namespace

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
