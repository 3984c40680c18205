#include "changes.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <limits>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/threads.h"
#include "cpu/dense.h"
#include "cpu/few_tokens.h"
#include "cpu/lanes_layout.h"
#include "cpu/products.h"
#include "cpu/scratch.h"
#include "packing/cover.h"
#include "packing/order.h"
#include "support.h"

namespace {
std::atomic<int64_t> allocations_left{-1};  // before one fails; below 0 none does
}

void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  const bool fails = allocations_left >= 0 && allocations_left-- == 0;
  return fails ? nullptr : std::malloc(bytes ? bytes : 1);
}
void* operator new(size_t bytes) {
  void* made = operator new(bytes, std::nothrow);
  if (!made) throw std::bad_alloc();
  return made;
}
void operator delete(void* made) noexcept { std::free(made); }
void operator delete(void* made, size_t) noexcept { std::free(made); }

namespace test {
namespace {

constexpr int64_t kRows = 120, kCols = 200;

void expect(bool holds, const std::string& what) {
  if (!holds) fail(("changes: expected " + what).c_str());
}

// W [kRows, kCols] of about 7 columns in a row, so that there are more than the sample has.
struct Weight {
  std::vector<int32_t> offsets{0}, cols;
  int64_t row_version = 0, col_version = 0;

  Weight() {
    std::mt19937 random(1);
    for (int64_t i = 0; i < kRows; i++) {
      for (int64_t c = 0; c < kCols; c++)
        if (random() % 15 == 0) cols.push_back(static_cast<int32_t>(c));
      offsets.push_back(static_cast<int32_t>(cols.size()));
    }
    offsets.shrink_to_fit();
    cols.shrink_to_fit();
  }
  int64_t nnz() const { return static_cast<int64_t>(cols.size()); }
  sk::Csr csr() const {
    return {offsets.data(), cols.data(), kRows, kCols, nnz(), row_version, col_version};
  }
  // A place outside of the sample whose column may move by one.
  size_t movable() const {
    for (size_t p = 17; p + 1 < cols.size(); p++)
      if (std::find(offsets.begin(), offsets.end(), p + 1) == offsets.end() &&
          cols[p] + 1 < cols[p + 1] && !is_sampled(p))
        return p;
    fail("changes: no column can move");
  }
  bool is_sampled(size_t p) const {
    for (int64_t i = 0; i < 64; i++) {
      const size_t first = i * (nnz() - 16) / 63;
      if (first <= p && p < first + 16) return true;
    }
    return false;
  }
};

std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "none";
}

// All that reads the caller's indices, with the pattern that it may use.
using Use = void (*)(sk::Pattern&, const sk::Csr&);
const Use kUses[] = {
    [](sk::Pattern& p, const sk::Csr& w) { p.schedule(w, false, 50, 60); },
    [](sk::Pattern& p, const sk::Csr& w) { p.schedule(w, true, 50, 60); },
    [](sk::Pattern& p, const sk::Csr& w) { p.compressed(w, sk::Format::kBitmap); },
    [](sk::Pattern& p, const sk::Csr& w) { p.compressed(w, sk::Format::kColumns); },
    [](sk::Pattern& p, const sk::Csr& w) { p.compressed(w, sk::Format::kWindow64); },
    [](sk::Pattern& p, const sk::Csr& w) { p.compressed(w, sk::Format::kWindow128); },
    [](sk::Pattern&, const sk::Csr& w) { sk::LanesPack pack(w); },
    [](sk::Pattern& p, const sk::Csr& w) {
      std::vector<float> values(w.nnz), dense(w.n * w.k);
      sk::to_dense(p, w, 4, values.data(), {0, w.n}, {0, w.k}, dense.data(), 2);
    },
    [](sk::Pattern& p, const sk::Csr& w) {
      std::vector<float> values(w.nnz), dense(w.n * w.k);
      sk::from_dense(p, w, 4, dense.data(), {0, w.n}, values.data(), 2);
    },
    [](sk::Pattern&, const sk::Csr& w) {
      const int64_t slices = (w.n + sk::kCoverRows - 1) / sk::kCoverRows;
      std::vector<int32_t> order(slices * sk::kCoverRows, -1);
      for (int64_t i = 0; i < w.n; i++) order[i] = static_cast<int32_t>(i);
      sk::Cover(w, order.data(), slices, 2);
    },
    [](sk::Pattern&, const sk::Csr& w) { sk::Order(w, 4 * w.k); },
};

struct Damage {
  const char* array;
  std::function<void(Weight&)> apply;
};

std::vector<Damage> all_damage() {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  constexpr int32_t kLeast = std::numeric_limits<int32_t>::min();
  std::vector<Damage> all;
  for (int32_t bad : {-1, -5, -1000000000, kLeast, int32_t{kCols}, 1000000000, kMost})
    for (int at : {0, 5, 400, -1})
      all.push_back({"col_indices", [=](Weight& w) { w.cols[at < 0 ? w.nnz() - 1 : at] = bad; }});
  all.push_back({"col_indices", [](Weight& w) { w.cols[1] = w.cols[0]; }});
  all.push_back({"col_indices", [](Weight& w) { std::swap(w.cols[0], w.cols[1]); }});
  for (int32_t bad : {kLeast, -1, 1000000, kMost})
    for (int64_t at : {int64_t{0}, int64_t{3}, int64_t{64}, kRows})
      all.push_back({"row_offsets", [=](Weight& w) { w.offsets[at] = bad; }});
  all.push_back({"row_offsets", [](Weight& w) { w.offsets[0] = 1; }});
  all.push_back({"row_offsets", [](Weight& w) { w.offsets[kRows]--; }});
  all.push_back({"row_offsets", [](Weight& w) { std::swap(w.offsets[3], w.offsets[90]); }});
  return all;
}

// Each damage is refused by name: in a first use, after a use of the same kind and after one of
// another kind, with counted writes and with such as nobody counts. Then W is whole again.
void check_damage() {
  const Weight whole;
  for (const Damage& damage : all_damage())
    for (const Use& use : kUses) {
      auto expect_refused = [&](sk::Pattern& pattern, const Weight& w) {
        const std::string error = error_of([&] { use(pattern, w.csr()); });
        expect(error.rfind(damage.array, 0) == 0, std::string(damage.array) + ", got " + error);
      };
      for (const Use first : {Use{nullptr}, use, kUses[0], kUses[3]})
        for (bool is_counted : {true, false}) {
          Weight w = whole;
          sk::Pattern pattern(kRows, kCols, w.nnz());
          if (!is_counted) w.row_version = w.col_version = -1;
          if (first) first(pattern, w.csr());
          damage.apply(w);
          if (is_counted) w.row_version++, w.col_version++;
          expect_refused(pattern, w);
          expect_refused(pattern, w);
          w.offsets = whole.offsets, w.cols = whole.cols;
          if (is_counted) w.row_version++;
          use(pattern, w.csr());
        }
    }
}

// A write that no version counts, outside of the sample: what is there may stay as it was, what is
// made anew is made of indices that were checked.
void check_missed_writes() {
  const Weight whole;
  for (int32_t bad : {-1, -5, -1000000000, int32_t{kCols}, 40000, 1000000000})
    for (size_t first = 0; first < 4; first++)
      for (size_t second = 0; second < 4; second++) {
        Weight w = whole;
        sk::Pattern pattern(kRows, kCols, w.nnz());
        kUses[first](pattern, w.csr());
        w.cols[w.movable()] = bad;
        const std::string error = error_of([&] { kUses[second](pattern, w.csr()); });
        expect(first == second || error.rfind("col_indices", 0) == 0, "col_indices, got " + error);
      }
}

void check_witness() {
  Weight w;
  sk::Witness witness;
  auto learn = [&] { return witness.learn(w.csr(), sk::Snapshot(w.csr())); };
  expect(!witness.recognises(w.csr()), "nothing to be known at first");
  expect(!learn() && witness.recognises(w.csr()) && learn(), "W to be known once it was learnt");
  w.row_version = 7;
  expect(witness.recognises(w.csr()), "the same indices to be known in another version");

  const size_t p = w.movable();
  w.cols[p]++;
  expect(witness.recognises(w.csr()), "the sample to miss this column");
  w.col_version++;
  expect(!witness.recognises(w.csr()), "a counted write to be seen");
  expect(!learn() && witness.recognises(w.csr()), "the new indices to be learnt");

  // The sum of both versions is as before: row_offsets replaced, a column written.
  w.cols[p]--;
  w.row_version--, w.col_version++;
  expect(!witness.recognises(w.csr()), "both versions to be looked at");
  learn();

  w.cols[0] = 1 - w.cols[0];
  expect(!witness.recognises(w.csr()), "a write to the sample to be seen");
  w.cols[0] = 1 - w.cols[0];
  w.offsets[50]--;
  expect(!witness.recognises(w.csr()), "a write to row_offsets to be seen");
  w.offsets[50]++;
  expect(witness.recognises(w.csr()), "W to be known again");

  for (int64_t* version : {&w.row_version, &w.col_version}) {
    const int64_t before = *version;
    *version = -1;
    w.cols[p]++;
    expect(!witness.recognises(w.csr()), "all indices to be read where nobody counts");
    w.cols[p]--;
    expect(witness.recognises(w.csr()), "W to be known where nobody counts");
    *version = before;
  }
}

void check_snapshot() {
  Weight w;
  const Weight whole = w;
  const sk::Snapshot snapshot(w.csr());
  const uint64_t hash = snapshot.hash();
  std::fill(w.offsets.begin(), w.offsets.end(), -7);
  std::fill(w.cols.begin(), w.cols.end(), -7);
  const sk::Csr own = snapshot.csr();
  expect(std::equal(whole.offsets.begin(), whole.offsets.end(), own.row_offsets) &&
             std::equal(whole.cols.begin(), whole.cols.end(), own.col_indices) &&
             own.nnz == whole.nnz() && snapshot.hash() == hash,
         "a snapshot not to change");
}

// What is kept stays bounded over 50 plans; what a caller holds lives on.
void check_eviction() {
  const Weight w;
  sk::Pattern pattern(kRows, kCols, w.nnz());
  const int64_t most = 6 * 4 * (kRows + w.nnz());
  const auto first = pattern.schedule(w.csr(), true, 1, 1);
  const std::vector<int32_t> source = first->source;
  for (int64_t plan = 0; plan < 50; plan++) {
    const auto s = pattern.schedule(w.csr(), plan % 2 == 1, 30 + plan, 40 + plan);
    expect(pattern.schedule(w.csr(), plan % 2 == 1, 30 + plan, 40 + plan) == s,
           "the last schedule to be kept");
    expect(
        plan < 4 || pattern.kept_bytes() <= most,
        "at most " + std::to_string(most) + " bytes, got " + std::to_string(pattern.kept_bytes()));
  }
  expect(first->source == source, "a schedule in use to live on");
  expect(pattern.schedule(w.csr(), true, 1, 1) != first, "the first schedule to have gone");
}

template <class Error>
void check_error_in_threads(const Error& error, int threads, int64_t at) {
  std::atomic<int64_t> done{0};
  bool is_caught = false;
  try {
    sk::parallel_for(threads, 100, [&](int64_t task) {
      if (task >= at) throw error;
      done++;
    });
  } catch (const Error&) {
    is_caught = true;
  }
  expect(is_caught && done == at, "the error of a task, and all tasks before it done");
  done = 0;
  sk::parallel_for(threads, 100, [&](int64_t) { done++; });
  expect(done == 100, "the threads to go on after an error");
}

void check_errors_in_threads() {
  for (int threads : {1, 2, 3, 8})
    for (int64_t at : {0, 1, 50, 99}) {
      check_error_in_threads(std::bad_alloc(), threads, at);
      check_error_in_threads(std::invalid_argument("x"), threads, at);
      check_error_in_threads(7, threads, at);
    }
}

// Sizes that no memory can hold, and such as are none.
void check_sizes() {
  auto is_refused = [](const std::function<void()>& f) {
    try {
      f();
    } catch (const std::bad_alloc&) {
      return true;
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  sk::Scratch scratch;
  expect(is_refused([&] { scratch.floats(kHuge); }), "no scratch of 2^65 bytes");
  expect(is_refused([&] { scratch.floats(kHuge / 4 - 100); }), "no scratch of 2^63 bytes");
  expect(scratch.floats(10) != nullptr, "scratch after an error");
  for (auto [n, k, nnz] : {std::array<int64_t, 3>{-1, 1, 0}, {1, -1, 0}, {1, 1, -1}})
    expect(is_refused([n = n, k = k, nnz = nnz] { sk::Pattern pattern(n, k, nnz); }),
           "no negative size");
  // Without rows there is nothing to read, but columns that no row has are wrong.
  const std::vector<int32_t> offsets{0}, cols{0};
  const sk::Csr w{offsets.data(), cols.data(), 0, 5, 1};
  float value = 0;
  sk::Pattern none(0, 5, 1);
  expect(is_refused([&] { sk::from_dense(none, w, 4, nullptr, {0, 0}, &value, 1); }),
         "no column without a row");
  expect(is_refused([&] { sk::to_dense(none, w, 4, &value, {0, 0}, {0, 5}, nullptr, 1); }),
         "no column without a row");
  for (const sk::Span part : {sk::Span{-1, 1}, {0, -1}, {0, 6}, {64, 1}, {1, 1}})
    expect(is_refused([&] { sk::to_dense(none, w, 4, &value, {0, 0}, part, nullptr, 1); }),
           "no columns that W does not have");
  // 16 bits hold no more.
  const std::vector<int32_t> two{0, 1}, last{65536};
  const sk::Csr wide{two.data(), last.data(), 1, 65537, 1};
  sk::Pattern pattern(1, 65537, 1);
  expect(is_refused([&] { pattern.compressed(wide, sk::Format::kColumns); }), "columns in 16 bits");
}

// Wherever memory lacks, the same call succeeds once there is some, with the pattern of then.
void check_lack_of_memory() {
  for (int64_t left = 0, failed = 1; failed; left++) {
    Weight w;
    sk::Pattern pattern(kRows, kCols, w.nnz());
    auto make = [&] {
      pattern.schedule(w.csr(), false, 16, 16);
      return pattern.compressed(w.csr(), sk::Format::kColumns);
    };
    for (int turn = failed = 0; turn < 2; turn++) {
      allocations_left = left;
      try {
        make();
      } catch (const std::bad_alloc&) {
        failed++;
      }
      allocations_left = -1;
      expect(std::equal(w.cols.begin(), w.cols.end(), make()->cols.begin()), "the columns of now");
      w.cols[w.movable()]++;
      w.col_version++;
    }
  }
}

}  // namespace

void check_changes() {
  check_witness();
  check_snapshot();
  check_damage();
  check_missed_writes();
  check_eviction();
  check_errors_in_threads();
  check_sizes();
  check_lack_of_memory();
}

}  // namespace test
