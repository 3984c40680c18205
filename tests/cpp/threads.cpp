// Several threads and one Pattern, under ThreadSanitizer: each product of each kind, with plans
// that come and go; indices in two versions, each of which throws out what was derived from the
// other; values that are written between the products.
#include <atomic>
#include <mutex>
#include <shared_mutex>
#include <thread>

#include "cpu/dense.h"
#include "cpu/few_tokens.h"
#include "cpu/products.h"
#include "packing/cover.h"
#include "support.h"

namespace {

constexpr int64_t kRows = 96, kCols = 130, kRounds = 400;
constexpr int kReaders = 3;

// kCols / 2 ones in each row, so a product of ones is known: of even columns, or of odd ones.
struct Weight {
  std::vector<int32_t> offsets{0}, cols;
  int64_t version;

  explicit Weight(int64_t version) : version(version) {
    for (int64_t i = 0; i < kRows; i++) {
      for (int64_t c = version; c < kCols; c += 2) cols.push_back(static_cast<int32_t>(c));
      offsets.push_back(static_cast<int32_t>(cols.size()));
    }
  }
  int64_t nnz() const { return static_cast<int64_t>(cols.size()); }
  sk::Csr csr() const {
    return {offsets.data(), cols.data(), kRows, kCols, nnz(), version, version};
  }
};

void expect(const std::vector<float>& got, float want, const char* what) {
  for (float v : got)
    if (v != want) test::fail(what);
}

class Readers {
 public:
  void run() {
    std::vector<std::thread> readers;
    for (int i = 0; i < kReaders; i++) readers.emplace_back([this, i] { read(i); });
    std::thread writer([this] {
      for (float v = 1; !is_done_; v = v == 1 ? 2 : 1) {
        const std::unique_lock lock(mutex_);
        std::fill(values_.begin(), values_.end(), v);
      }
    });
    for (std::thread& reader : readers) reader.join();
    is_done_ = true;
    writer.join();
  }

 private:
  void read(int id) {
    std::mt19937 random(id);
    for (int64_t round = 0; round < kRounds; round++) {
      const Weight& w = weights_[random() % 8 == 0];
      const int64_t tokens = 1 + random() % 24;
      const int64_t rows = 11 + random() % 4 * 20, cols = 16 + random() % 4 * 30;
      const sk::Plan plan{2, 1 << random() % 4, 1, rows, cols, 2, 2};
      // 1 where W has a column.
      std::vector<float> x(tokens * kCols, 0.f), dy(tokens * kRows, 1.f);
      for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<int64_t>(i % kCols) % 2 == w.version;
      product(random() % 6, w, tokens, plan, x, dy);
    }
  }

  void product(unsigned kind, const Weight& w, int64_t tokens, const sk::Plan& plan,
               std::vector<float>& x, std::vector<float>& dy) {
    const std::shared_lock lock(mutex_);
    const float value = values_[0], sum = value * (kCols / 2);
    const sk::Csr csr = w.csr();
    const auto type = sk::Type::kFloat;
    std::vector<float> y(tokens * kRows), dx(tokens * kCols), dvalues(w.nnz());
    std::vector<float> dense(kRows * kCols), bias(kRows, 1.f);
    const sk::Matrix in{x.data(), kCols}, out{y.data(), kRows};
    switch (kind) {
      case 0:
        sk::spmm(pattern_, csr, false, type, values_.data(), bias.data(), in, out, tokens, plan);
        return expect(y, sum + 1, "threads: spmm");
      case 1:
        sk::spmm(pattern_, csr, true, type, values_.data(), nullptr, {dy.data(), kRows},
                 {dx.data(), kCols}, tokens, plan);
        for (size_t i = 0; i < dx.size(); i++) dx[i] -= x[i] * value * kRows;
        return expect(dx, 0, "threads: spmm transposed");
      case 2:
        sk::sddmm(pattern_, csr, type, {dy.data(), kRows}, in, dvalues.data(), tokens, plan);
        return expect(dvalues, static_cast<float>(tokens), "threads: sddmm");
      case 3:
        sk::spmm_few_tokens(pattern_, csr, sk::Format::kColumns, type, values_.data(), bias.data(),
                            in, out, std::min<int64_t>(tokens, sk::kFewTokens), 2);
        y.resize(std::min<int64_t>(tokens, sk::kFewTokens) * kRows);
        return expect(y, sum + 1, "threads: stream of columns");
      case 4:
        sk::spmm_few_tokens(pattern_, csr, sk::Format::kBitmap, type, values_.data(), nullptr, in,
                            out, std::min<int64_t>(tokens, sk::most_tokens(sk::Format::kBitmap)),
                            2);
        y.resize(std::min<int64_t>(tokens, sk::most_tokens(sk::Format::kBitmap)) * kRows);
        return expect(y, sum, "threads: stream of bits");
      default:
        sk::to_dense(pattern_, csr, 4, values_.data(), {0, kRows}, {0, kCols}, dense.data(), 2);
        sk::from_dense(pattern_, csr, 4, dense.data(), {0, kRows}, dvalues.data(), 2);
        return expect(dvalues, value, "threads: to_dense, from_dense");
    }
  }

  const Weight weights_[2] = {Weight(0), Weight(1)};
  sk::Pattern pattern_{kRows, kCols, kRows * kCols / 2};
  std::vector<float> values_ = std::vector<float>(kRows * kCols / 2, 1.f);
  std::shared_mutex mutex_;  // of values_
  std::atomic<bool> is_done_{false};
};

void make_cover() {
  const Weight w(0);
  std::vector<int32_t> order(kRows);
  for (int64_t i = 0; i < kRows; i++) order[i] = static_cast<int32_t>(i);
  const int64_t slices = kRows / sk::kCoverRows;
  const sk::Cover cover(w.csr(), order.data(), slices, 3);
  std::vector<int32_t> steps(slices + 1);
  std::vector<uint8_t> records(cover.steps() * sk::cover_record_bytes(2));
  std::vector<int64_t> places(w.nnz());
  cover.write(steps.data(), records.data(), places.data(), 2);
}

}  // namespace

int main() {
  Readers().run();
  make_cover();
  std::printf("threads: ok\n");
}
