#include "pattern.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sk {
namespace {

template <class T>
int64_t bytes_of(const std::vector<T>& v) {
  return static_cast<int64_t>(v.size() * sizeof(T));
}

int64_t bytes_of(const Schedule& s) {
  return bytes_of(s.runs) + bytes_of(s.run_offsets) + bytes_of(s.nnz_offsets) + bytes_of(s.row) +
         bytes_of(s.start) + bytes_of(s.cols) + bytes_of(s.source);
}

int64_t bytes_of(const Compressed& c) {
  return bytes_of(c.row_offsets) + bytes_of(c.bits) + bytes_of(c.cols) + bytes_of(c.cols32) +
         bytes_of(c.chunk_offsets) + bytes_of(c.chunks);
}

int64_t checked(const char* name, int64_t size) {
  if (size < 0 || size >> 31)
    throw std::invalid_argument(std::string(name) + ": expected 0 <= " + name +
                                " < 2**31 (int32 indices), got " + std::to_string(size));
  return size;
}

}  // namespace

Pattern::Pattern(int64_t n, int64_t k, int64_t nnz)
    : n(checked("n", n)), k(checked("k", k)), nnz(checked("nnz", nnz)) {}

template <class T, class Make>
std::shared_ptr<const T> Pattern::find(const Csr& w, int kind, int64_t rows, int64_t cols,
                                       const Make& make) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!witness_.recognises(w)) entries_.clear();
  const auto found = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) {
    return e.kind == kind && e.rows == rows && e.cols == cols;
  });
  if (found != entries_.end()) {
    entries_.splice(entries_.begin(), entries_, found);
  } else {
    const Snapshot snapshot(w);
    if (!witness_.learn(w, snapshot)) entries_.clear();
    auto made = std::make_shared<const T>(make(snapshot.csr()));
    entries_.push_front({kind, rows, cols, bytes_of(*made), made});
    const int64_t most = kMostBytes * 4 * (n + nnz);
    int64_t bytes = 0;
    for (const Entry& e : entries_) bytes += e.bytes;
    for (; entries_.size() > kAlways && bytes > most; entries_.pop_back())
      bytes -= entries_.back().bytes;
  }
  return std::static_pointer_cast<const T>(entries_.front().made);
}

std::shared_ptr<const Schedule> Pattern::schedule(const Csr& w, bool transposed,
                                                  int64_t rows_per_block, int64_t cols_per_block) {
  return find<Schedule>(w, transposed, rows_per_block, cols_per_block, [&](const Csr& checked) {
    auto make = transposed ? make_schedule_t : make_schedule;
    return make(checked, rows_per_block, cols_per_block);
  });
}

std::shared_ptr<const Compressed> Pattern::compressed(const Csr& w, Format format) {
  return find<Compressed>(w, 2 + static_cast<int>(format), 0, 0,
                          [&](const Csr& checked) { return compress(checked, format); });
}

int64_t Pattern::kept_bytes() {
  std::lock_guard<std::mutex> lock(mutex_);
  int64_t bytes = 0;
  for (const Entry& e : entries_) bytes += e.bytes;
  return bytes;
}

}  // namespace sk
