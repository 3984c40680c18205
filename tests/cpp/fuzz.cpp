// Patterns at random, and writes to them between the calls and during them, under
// AddressSanitizer and UndefinedBehaviorSanitizer. Each call must give the right product or throw
// std::invalid_argument if the indices are no pattern; only after a write that no version counts
// may it give the product of an earlier pattern. Nothing leaves its bounds.
//
// Usage: sk_fuzz [--seconds N] [--seed S] [--case C] [isa...]
// The instruction sets run at once, each for N seconds, half of them on the threads of libgomp.
// A case depends on its number alone; the number of one that fails is printed.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cinttypes>
#include <climits>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "cpu/dense.h"
#include "cpu/few_tokens.h"
#include "cpu/products.h"
#include "packing/cover.h"
#include "support.h"

namespace {

using test::Array;

struct Random {
  std::mt19937_64 bits;
  int64_t below(int64_t size) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(size)); }
  int64_t range(int64_t first, int64_t last) { return first + below(last - first + 1); }
  bool chance(int percent) { return below(100) < percent; }
  template <class T>
  T pick(std::initializer_list<T> all) {
    return all.begin()[below(static_cast<int64_t>(all.size()))];
  }
};

struct Indices {
  std::vector<int32_t> offsets, cols;
  bool operator==(const Indices& other) const {
    return offsets == other.offsets && cols == other.cols;
  }
};

// A pattern with nnz places anywhere, or in some of the rows alone.
Indices draw(Random& random, int64_t n, int64_t k, int64_t nnz) {
  std::vector<int64_t> places;
  if (n * k > 100000) {
    std::set<int64_t> chosen;
    while (static_cast<int64_t>(chosen.size()) < nnz) chosen.insert(random.below(n * k));
    places.assign(chosen.begin(), chosen.end());
  } else {
    const int64_t rows = n > 0 && k > 0 ? random.range((nnz + k - 1) / k, n) : 0;
    const int64_t first = random.below(n - rows + 1);
    for (int64_t at = first * k, left = rows * k; left > 0; at++, left--)
      if (random.below(left) < nnz - static_cast<int64_t>(places.size())) places.push_back(at);
  }
  Indices made{std::vector<int32_t>(n + 1), std::vector<int32_t>(nnz)};
  for (size_t p = 0; p < places.size(); p++) {
    made.offsets[places[p] / k + 1]++;
    made.cols[p] = static_cast<int32_t>(places[p] % k);
  }
  for (int64_t i = 0; i < n; i++) made.offsets[i + 1] += made.offsets[i];
  return made;
}

bool is_valid(const Indices& w, int64_t k) {
  const int64_t n = static_cast<int64_t>(w.offsets.size()) - 1, nnz = w.cols.size();
  if (w.offsets[0] != 0 || w.offsets[n] != nnz) return false;
  for (int64_t i = 0; i < n; i++)
    if (w.offsets[i + 1] < w.offsets[i]) return false;
  for (int64_t i = 0; i < n; i++)
    for (int64_t p = w.offsets[i]; p < w.offsets[i + 1]; p++)
      if (w.cols[p] < 0 || w.cols[p] >= k || (p > w.offsets[i] && w.cols[p] <= w.cols[p - 1]))
        return false;
  return true;
}

// One index, mostly to something that is wrong.
void damage(Random& random, int64_t k, Indices& w) {
  const int64_t nnz = w.cols.size();
  const int32_t odd = random.pick({INT_MIN, INT_MAX, -1, -2, 1 << 30, 0});
  const int64_t row = random.below(static_cast<int64_t>(w.offsets.size()));
  const int64_t p = nnz ? random.below(nnz) : 0;
  switch (random.below(nnz ? 8 : 2)) {
    case 0: w.offsets[row] = random.chance(50) ? odd : static_cast<int32_t>(random.bits()); break;
    case 1: w.offsets[row] = static_cast<int32_t>(random.below(nnz + 3) - 1); break;
    case 2: w.cols[p] = random.chance(50) ? odd : static_cast<int32_t>(random.bits()); break;
    case 3: w.cols[p] = static_cast<int32_t>(random.below(k + 3) - 1); break;
    case 4: std::swap(w.cols[p], w.cols[random.below(nnz)]); break;
    case 5: w.cols[p] = static_cast<int32_t>(uint32_t(w.cols[p]) + random.range(-1, 1)); break;
    case 6: w.cols[p] = static_cast<int32_t>(k); break;
    case 7: w.offsets[row] = static_cast<int32_t>(uint32_t(w.offsets[row]) + random.range(-1, 1));
  }
}

// A column moves inside its row, as an edit that is right does.
void move_column(Random& random, int64_t k, Indices& w) {
  if (w.cols.empty() || !is_valid(w, k)) return;
  const int64_t p = random.below(static_cast<int64_t>(w.cols.size()));
  const auto above = std::upper_bound(w.offsets.begin(), w.offsets.end(), p);
  const int64_t least = p == above[-1] ? 0 : w.cols[p - 1] + 1;
  const int64_t most = p + 1 == *above ? k - 1 : w.cols[p + 1] - 1;
  w.cols[p] = static_cast<int32_t>(random.range(least, most));
}

enum class Op {
  kSpmm,
  kSpmmT,
  kSddmm,
  kColumns,
  kBitmap,
  kWindow64,
  kWindow128,
  kColumns32,
  kSpmmTFew,
  kToDense,
  kFromDense,
  kCover
};
constexpr Op kOps[] = {Op::kSpmm,     Op::kSpmmT,    Op::kSddmm,     Op::kColumns,
                       Op::kBitmap,   Op::kWindow64, Op::kWindow128, Op::kColumns32,
                       Op::kSpmmTFew, Op::kToDense,  Op::kFromDense, Op::kCover};

bool is_few(Op op) { return Op::kColumns <= op && op <= Op::kColumns32; }

sk::Format format_of(Op op) {
  if (op == Op::kColumns) return sk::Format::kColumns;
  if (op == Op::kColumns32) return sk::Format::kColumns32;
  if (op == Op::kBitmap) return sk::Format::kBitmap;
  return op == Op::kWindow64 ? sk::Format::kWindow64 : sk::Format::kWindow128;
}

// A call's operands. Numbers are small and whole, so all sums are exact.
struct Call {
  Op op;
  sk::Type type;
  int64_t n, k, tokens, gap;
  sk::Plan plan;
  Array values, bias, x, dy, out;
  bool has_bias;

  int64_t x_row() const { return k + gap; }
  int64_t y_row() const { return n + gap; }
};

Array whole_numbers(Random& random, sk::Type type, int64_t size) {
  Array made(type, size, nullptr);
  for (int64_t i = 0; i < size; i++) made.set(i, static_cast<float>(random.range(-2, 2)));
  return made;
}

// At most 50 blocks each way.
sk::Plan draw_plan(Random& random, int64_t n, int64_t k) {
  auto block = [&](int64_t size) {
    return std::min<int64_t>(65536, size / 50 + 1 + random.below(size + 10));
  };
  const int vecs = 1 << random.below(4), tile_parts = vecs == 8 && random.chance(50) ? 2 : 1;
  return {static_cast<int>(random.range(1, 3)),
          vecs,
          tile_parts,
          block(n),
          block(k),
          random.range(1, 3),
          random.range(1, 3),
          random.chance(50),
          random.chance(50),
          random.chance(50)};
}

Op draw_op(Random& random, int64_t k) {
  return k > 65536 ? random.pick({Op::kSpmm, Op::kSpmmT, Op::kSddmm, Op::kToDense, Op::kColumns32,
                                  Op::kSpmmTFew})
                   : kOps[random.below(12)];
}

Call draw_call(Random& random, Op op, sk::Plan plan, int64_t n, int64_t k, int64_t nnz) {
  const auto type = random.pick(
      {sk::Type::kFloat, sk::Type::kBfloat16, is_few(op) ? sk::Type::kFloat : sk::Type::kDouble});
  int64_t tokens = random.range(1, random.chance(10) ? 140 : 40);
  if (random.chance(5)) tokens = 0;
  if (is_few(op)) tokens = std::min(tokens, random.range(0, sk::most_tokens(format_of(op))));
  if (op == Op::kSpmmTFew) tokens = std::min(tokens, random.range(0, sk::kFewTokensT));
  tokens = std::min(tokens, 60000 / (nnz + n + k + 1));
  const int64_t gap = random.below(3);
  auto rows = [&](int64_t features) {
    return std::max<int64_t>(0, tokens * (features + gap) - gap);
  };
  const bool transposed = op == Op::kSpmmT || op == Op::kSpmmTFew;
  int64_t size = rows(n);
  if (transposed) size = rows(k);
  if (op == Op::kSddmm || op == Op::kFromDense) size = nnz;
  if (op == Op::kToDense) size = n * k;
  if (op == Op::kCover) size = 0;
  return {op,
          type,
          n,
          k,
          tokens,
          gap,
          plan,
          whole_numbers(random, type, nnz),
          whole_numbers(random, type, transposed ? k : n),
          whole_numbers(random, type, rows(k)),
          whole_numbers(random, type, rows(n)),
          Array(type, size, nullptr),
          random.chance(50)};
}

// Each value of a cover has a place of its own, if the pattern is valid.
void cover(const sk::Csr& w, int threads) {
  const int64_t slices = (w.n + sk::kCoverRows - 1) / sk::kCoverRows;
  std::vector<int32_t> order(slices * sk::kCoverRows, -1);
  for (int64_t i = 0; i < w.n; i++) order[i] = static_cast<int32_t>(w.n - 1 - i);
  const sk::Cover made(w, order.data(), slices, threads);
  const int64_t windows = (w.k + sk::kCoverWindow - 1) / sk::kCoverWindow;
  std::vector<int32_t> steps(slices * windows + 1);
  const int value_bytes = 1 + w.n % 2;
  const int64_t elements = sk::cover_record_bytes(value_bytes) / value_bytes;
  std::vector<uint8_t> records(made.steps() * elements * value_bytes);
  std::vector<int64_t> places(w.nnz, -1);
  made.write(steps.data(), records.data(), places.data(), value_bytes);
  std::vector<bool> taken(made.steps() * elements);
  for (int64_t place : places) {
    if (place < 0 || place % elements >= sk::kCoverValues || taken.at(place))
      test::fail("fuzz: a value of the cover has no place of its own");
    taken[place] = true;
  }
}

void run(sk::Pattern& pattern, const sk::Csr& w, Call& c) {
  const sk::Matrix x{c.x.data(), c.x_row()}, dy{c.dy.data(), c.y_row()};
  const sk::Matrix y{c.out.data(), c.y_row()}, dx{c.out.data(), c.x_row()};
  const void* bias = c.has_bias ? c.bias.data() : nullptr;
  const int bytes = static_cast<int>(sk::size_of(c.type));
  auto spmm = [&](bool transposed) {
    sk::spmm(pattern, w, transposed, c.type, c.values.data(), bias, transposed ? dy : x,
             transposed ? dx : y, c.tokens, c.plan);
  };
  switch (c.op) {
    case Op::kSpmm: return spmm(false);
    case Op::kSpmmT: return spmm(true);
    case Op::kSddmm: return sk::sddmm(pattern, w, c.type, dy, x, c.out.data(), c.tokens, c.plan);
    case Op::kColumns:
    case Op::kBitmap:
    case Op::kWindow64:
    case Op::kWindow128:
    case Op::kColumns32:
      return sk::spmm_few_tokens(pattern, w, format_of(c.op), c.type, c.values.data(), bias, x, y,
                                 c.tokens, c.plan.threads);
    case Op::kSpmmTFew:
      return sk::spmm_t_few_tokens(pattern, w, c.type, c.values.data(), bias, dy, dx, c.tokens,
                                   c.plan.threads);
    case Op::kToDense:
      return sk::to_dense(pattern, w, bytes, c.values.data(), {0, c.n}, {0, c.k}, c.out.data(),
                          c.plan.threads);
    case Op::kFromDense: {
      Array dense(c.type, c.n * c.k, nullptr);
      for (int64_t i = 0; i < c.n * c.k; i++) dense.set(i, static_cast<float>(i % 251));
      return sk::from_dense(pattern, w, bytes, dense.data(), {0, c.n}, c.out.data(),
                            c.plan.threads);
    }
    case Op::kCover: return cover(w, c.plan.threads);
  }
}

// What `out` is for this pattern, by a plain loop; NaN where nothing is written.
Array product(const Indices& w, const Call& c) {
  std::vector<double> sum(c.out.size(), NAN);
  const bool transposed = c.op == Op::kSpmmT || c.op == Op::kSpmmTFew;
  const int64_t features = transposed ? c.k : c.n;
  if (c.op == Op::kToDense || c.op == Op::kSddmm) std::fill(sum.begin(), sum.end(), 0);
  if (c.op == Op::kSpmm || transposed || is_few(c.op))
    for (int64_t m = 0; m < c.tokens; m++)
      for (int64_t i = 0; i < features; i++)
        sum[m * (features + c.gap) + i] = c.has_bias ? c.bias[i] : 0;
  for (int64_t i = 0; i < c.n; i++)
    for (int64_t p = w.offsets[i]; p < w.offsets[i + 1]; p++) {
      const int64_t col = w.cols[p];
      if (c.op == Op::kToDense) sum[i * c.k + col] = c.values[p];
      if (c.op == Op::kFromDense) sum[p] = static_cast<double>((i * c.k + col) % 251);
      if (c.op == Op::kToDense || c.op == Op::kFromDense) continue;
      for (int64_t m = 0; m < c.tokens; m++) {
        const int64_t at_x = m * c.x_row() + col, at_y = m * c.y_row() + i;
        if (transposed)
          sum[at_x] += c.values[p] * c.dy[at_y];
        else if (c.op == Op::kSddmm)
          sum[p] += c.dy[at_y] * c.x[at_x];
        else
          sum[at_y] += c.values[p] * c.x[at_x];
      }
    }
  Array made(c.type, c.out.size(), nullptr);
  for (size_t i = 0; i < sum.size(); i++) made.set(i, static_cast<float>(sum[i]));
  return made;
}

bool is_same(const Array& a, const Array& b) {
  for (int64_t i = 0; i < a.size(); i++)
    if (a[i] != b[i] && (a[i] == a[i] || b[i] == b[i])) return false;
  return true;
}

struct Counts {
  uint64_t number;  // of the case that runs
  int64_t cases, right, refused, stale, disturbed;
};

struct Size {
  int64_t n, k, nnz;
};

Size draw_size(Random& random) {
  int64_t n = random.range(1, 70), k = random.range(1, 300);
  switch (random.below(30)) {
    case 0: (random.chance(50) ? n : k) = 0; break;
    case 1: n = 1; break;
    case 2: k = 1; break;
    case 3: n = random.range(1, 4), k = random.range(300, 9000); break;
    case 4: n = random.range(70, 9000), k = random.range(1, 4); break;
    case 5: n = random.range(1, 4), k = random.range(65535, 70000); break;
    case 6: n = random.range(1, 4), k = random.range(1, 130); break;
    case 7: n = random.range(65535, 66000), k = random.range(1, 3); break;
  }
  if (random.chance(20)) n = random.range(50, 70), k = random.range(200, 300);
  const int64_t places = n * k, most = std::min<int64_t>(places, 20000);
  const int64_t density = random.pick<int64_t>({0, 1, 3, 10, 20, 30, 50, 60, 90, 97, 100});
  return {n, k, n * k > 100000 ? random.below(3000) : std::min(most, places * density / 100)};
}

// The caller's arrays, and what their versions tell.
class Caller {
 public:
  Caller(Random& random, Size size)
      : random_(random),
        size_(size),
        now_(draw(random, size.n, size.k, size.nnz)),
        favourite_(draw_op(random, size.k)),
        plan_(draw_plan(random, size.n, size.k)),
        plan_t_(draw_plan(random, size.k, size.n)) {}

  void change() {
    const Indices before = now_;
    const int64_t times = is_quiet_ ? 1 : random_.range(1, 12);
    switch (is_quiet_ ? random_.pick({0, 1, 2, 2, 2}) : random_.below(6)) {
      case 0: break;
      case 1:
        for (int64_t i = 0; i < times; i++) damage(random_, size_.k, now_);
        break;
      case 2:
        for (int64_t i = 0; i < times; i++) move_column(random_, size_.k, now_);
        break;
      case 3: move_column(random_, size_.k, now_); break;
      case 4: now_ = draw(random_, size_.n, size_.k, size_.nnz); break;
      case 5:
        if (!seen_.empty()) now_ = seen_[random_.below(static_cast<int64_t>(seen_.size()))];
    }
    if (random_.chance(30)) now_ = Indices(now_);  // elsewhere in memory
    is_unknown_ = random_.chance(15);
    if (random_.chance(60))
      count();
    else if (!(now_ == before))
      is_certain_ = false;
  }

  sk::Csr csr() {
    const int64_t kind = is_unknown_ ? random_.below(3) : 3;
    return {now_.offsets.data(),
            now_.cols.data(),
            size_.n,
            size_.k,
            size_.nnz,
            kind == 0 || kind == 2 ? -1 : row_version_,
            kind == 1 || kind == 2 ? -1 : col_version_};
  }

  void run_and_check(sk::Pattern& pattern, Counts& counts) {
    Call call = draw_call();
    const bool valid = is_valid(now_, size_.k);
    const bool reads_all = call.op == Op::kCover;  // each time
    const bool certain = is_certain_ || is_unknown_ || reads_all;
    try {
      run(pattern, csr(), call);
    } catch (const std::invalid_argument& error) {
      if (valid) test::fail((std::string("fuzz: a pattern was refused: ") + error.what()).c_str());
      counts.refused++;
      return;
    }
    if (!valid && certain) test::fail("fuzz: indices that are no pattern were accepted");
    if (is_unknown_ && !reads_all) is_certain_ = true;
    if (call.op == Op::kCover) return;
    if (valid && is_same(call.out, product(now_, call))) {
      counts.right++;
      if (std::find(seen_.begin(), seen_.end(), now_) == seen_.end()) seen_.push_back(now_);
      return;
    }
    if (certain) test::fail("fuzz: a wrong product");
    for (const Indices& earlier : seen_)
      if (is_same(call.out, product(earlier, call))) {
        counts.stale++;
        return;
      }
    test::fail("fuzz: a product of no pattern that there was");
  }

  // Another thread writes to the indices while calls read them. Any result will do.
  void run_disturbed(sk::Pattern& pattern, Counts& counts) {
    std::atomic<bool> is_done{false};
    Random other{std::mt19937_64(random_.bits())};
    std::thread writer([&] {
      Indices copy = now_;
      while (!is_done) {
        if (other.chance(50)) copy = draw(other, size_.n, size_.k, size_.nnz);
        for (int64_t i = other.below(4); i > 0; i--) damage(other, size_.k, copy);
        std::copy(copy.offsets.begin(), copy.offsets.end(), now_.offsets.begin());
        std::copy(copy.cols.begin(), copy.cols.end(), now_.cols.begin());
      }
    });
    for (int64_t i = random_.range(1, 8); i > 0; i--) {
      Call call = draw_call();
      if (call.op == Op::kCover) continue;  // checks more than it may find here
      try {
        if (random_.chance(50)) count();
        run(pattern, csr(), call);
      } catch (const std::invalid_argument&) {
      }
      counts.disturbed++;
    }
    is_done = true;
    writer.join();
  }

 private:
  // A pair of versions that was not there before; not always a greater one, nor another sum:
  // a tensor may be replaced by one with fewer writes.
  void count() {
    row_version_ = random_.range(std::max<int64_t>(0, row_version_ - 2), row_version_ + 1);
    do col_version_++;
    while (!pairs_.insert({row_version_, col_version_}).second);
    is_certain_ = true;
  }

  // Often as before, so that what was derived is met again.
  Call draw_call() {
    const Op op = random_.chance(50) ? favourite_ : draw_op(random_, size_.k);
    const bool is_transposed = op == Op::kSpmmT;
    sk::Plan plan = is_transposed ? plan_t_ : plan_;
    if (random_.chance(30))
      plan =
          draw_plan(random_, is_transposed ? size_.k : size_.n, is_transposed ? size_.n : size_.k);
    return ::draw_call(random_, op, plan, size_.n, size_.k, size_.nnz);
  }

  Random& random_;
  const Size size_;
  Indices now_;
  const Op favourite_;
  const sk::Plan plan_, plan_t_;
  std::vector<Indices> seen_;  // of which there were products
  std::set<std::pair<int64_t, int64_t>> pairs_{{0, 0}};
  int64_t row_version_ = 0, col_version_ = 0;
  // Single writes, which the sample of a large pattern misses, so that what was derived before one
  // and after it meet.
  const bool is_quiet_ = size_.nnz > 1500 && random_.chance(60);
  bool is_unknown_ = false;  // whether a version is
  bool is_certain_ = true;   // no write went uncounted since the last that was counted
};

void run_case(Counts& counts) {
  Random random{std::mt19937_64(counts.number)};
  const Size size = draw_size(random);
  Caller caller(random, size);
  sk::Pattern pattern(size.n, size.k, size.nnz);
  if (random.chance(20)) caller.change();  // damaged from the first call on
  const int64_t steps = random.range(1, 8);
  if (random.chance(5)) return caller.run_disturbed(pattern, counts);
  for (int64_t step = 0; step < steps; step++) {
    caller.run_and_check(pattern, counts);
    caller.change();
  }
  counts.cases++;
}

uint64_t mix(uint64_t h) {
  h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9;
  h = (h ^ h >> 27) * 0x94d049bb133111eb;
  return h ^ h >> 31;
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 10;
  uint64_t seed = 1, only = 0;
  bool has_case = false;
  std::vector<const char*> isas;
  for (int i = 1; i < argc; i++) {
    const std::string name = argv[i];
    if (name[0] != '-') {
      isas.push_back(argv[i]);
      continue;
    }
    if (i + 1 == argc) test::fail("fuzz: expected a value after an option");
    const char* value = argv[++i];
    if (name == "--seconds")
      seconds = std::atof(value);
    else if (name == "--seed")
      seed = std::strtoull(value, nullptr, 0);
    else if (name == "--case")
      only = std::strtoull(value, nullptr, 0), has_case = true;
    else
      test::fail("fuzz: expected --seconds, --seed or --case");
  }
  if (isas.empty()) isas = {"portable", "avx2", "avx512", "neon"};
  std::printf("fuzz: seed %" PRIu64 "\n", seed);

  // Shared, so that the number of a case outlives a process that was ended.
  auto* all = static_cast<Counts*>(mmap(nullptr, isas.size() * sizeof(Counts),
                                        PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  if (all == MAP_FAILED) test::fail("fuzz: no memory to share");
  auto counts_of = [&](const char* isa) -> Counts& {
    return all[std::find(isas.begin(), isas.end(), isa) - isas.begin()];
  };
  auto run = [&](const char* isa) {
    Counts& counts = counts_of(isa);
    const int64_t at = &counts - all;
    setenv("OMP_WAIT_POLICY", "passive", 0);
    if ((seed + at) % 2 == 1) dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL);
    const auto begin = std::chrono::steady_clock::now();
    auto is_over = [&] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() >
             seconds;
    };
    for (uint64_t i = 0; i == 0 || (!has_case && !is_over()); i++) {
      counts.number = has_case ? only : mix(seed + mix(at + 1) + i);
      alarm(100);  // a case takes milliseconds
      run_case(counts);
    }
  };
  return test::for_isas(isas, true, run, [&](const char* isa, int status) {
    const Counts& c = counts_of(isa);
    std::printf("fuzz: %s: %" PRId64 " cases, %" PRId64 " products right, %" PRId64
                " refused, %" PRId64 " stale, %" PRId64 " disturbed\n",
                isa, c.cases, c.right, c.refused, c.stale, c.disturbed);
    if (status)
      std::printf("fuzz: failed in %s; again: sk_fuzz --case %" PRIu64 " %s\n", isa, c.number, isa);
  });
}
