#include "csr.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "hash.h"

namespace sk {
namespace {

// Empty if w is valid, else what is wrong with it: as indices.py says it.
std::string find_error(const Csr& w) {
  const int64_t first = w.row_offsets[0], last = w.row_offsets[w.n];
  if (first != 0 || last != w.nnz)
    return "row_offsets: expected to start at 0 and end at nnz = " + std::to_string(w.nnz) +
           ", got " + std::to_string(first) + " and " + std::to_string(last);
  for (int64_t i = 0; i < w.n; i++)
    if (w.row_offsets[i + 1] < w.row_offsets[i])
      return "row_offsets: expected not to decrease, got " + std::to_string(w.row_offsets[i]) +
             " before " + std::to_string(w.row_offsets[i + 1]) + " at row " + std::to_string(i);
  for (int64_t i = 0; i < w.n; i++) {
    int32_t previous = -1;
    for (int32_t p = w.row_offsets[i]; p < w.row_offsets[i + 1]; p++) {
      const int32_t col = w.col_indices[p];
      if (col < 0 || col >= w.k)
        return "col_indices: expected to lie in [0, " + std::to_string(w.k) + "), got " +
               std::to_string(col) + " in row " + std::to_string(i);
      if (col <= previous)
        return "col_indices: expected to increase strictly in each row, got " +
               std::to_string(previous) + " before " + std::to_string(col) + " in row " +
               std::to_string(i) + (col == previous ? ": a duplicate" : ": not sorted");
      previous = col;
    }
  }
  return {};
}

constexpr int64_t kLines = 64, kLineWords = 16;

// Calls f(words of col_indices, their number) for each line of the sample, while it returns true.
template <class F>
bool for_sample(const Csr& w, const F& f) {
  if (w.nnz <= kLines * kLineWords) return f(w.col_indices, w.nnz);
  for (int64_t i = 0; i < kLines; i++)
    if (!f(w.col_indices + i * (w.nnz - kLineWords) / (kLines - 1), kLineWords)) return false;
  return true;
}

std::vector<int32_t> take_sample(const Csr& w) {
  std::vector<int32_t> sample;
  for_sample(w, [&](const int32_t* words, int64_t size) {
    sample.insert(sample.end(), words, words + size);
    return true;
  });
  return sample;
}

bool has_sample(const Csr& w, const std::vector<int32_t>& sample) {
  const int32_t* seen = sample.data();
  return for_sample(w, [&](const int32_t* words, int64_t size) {
    const bool equal = std::equal(words, words + size, seen);
    seen += size;
    return equal;
  });
}

uint64_t hash_all(const Csr& w) {
  const uint64_t parts[] = {hash(w.row_offsets, w.n + 1), hash(w.col_indices, w.nnz)};
  return hash(reinterpret_cast<const int32_t*>(parts), 4);
}

}  // namespace

void check(const Csr& w) {
  const std::string error = find_error(w);
  if (!error.empty()) throw std::invalid_argument(error);
}

Snapshot::Snapshot(const Csr& w)
    : row_offsets_(w.row_offsets, w.row_offsets + w.n + 1),
      col_indices_(w.col_indices, w.col_indices + w.nnz),
      n_(w.n),
      k_(w.k) {
  check(csr());
}

Csr Snapshot::csr() const {
  return {row_offsets_.data(), col_indices_.data(), n_, k_,
          static_cast<int64_t>(col_indices_.size())};
}

uint64_t Snapshot::hash() const { return hash_all(csr()); }

bool Witness::recognises(const Csr& w) {
  if (!has_seen_ || !std::equal(row_offsets_.begin(), row_offsets_.end(), w.row_offsets))
    return false;
  const bool is_counted = w.row_version >= 0 && w.col_version >= 0;
  const bool is_same = is_counted && w.row_version == row_version_ && w.col_version == col_version_
                           ? has_sample(w, sample_)
                           : hash_all(w) == hash_;
  if (is_same) row_version_ = w.row_version, col_version_ = w.col_version;
  return is_same;
}

bool Witness::learn(const Csr& w, const Snapshot& snapshot) {
  const uint64_t hash = snapshot.hash();
  const Csr own = snapshot.csr();
  // First what memory may lack for: nothing recognises half of a pattern.
  std::vector<int32_t> row_offsets(own.row_offsets, own.row_offsets + own.n + 1);
  std::vector<int32_t> sample = take_sample(own);
  const bool is_same = has_seen_ && hash == hash_;
  has_seen_ = true;
  hash_ = hash;
  row_version_ = w.row_version, col_version_ = w.col_version;
  row_offsets_.swap(row_offsets);
  sample_.swap(sample);
  return is_same;
}

}  // namespace sk
