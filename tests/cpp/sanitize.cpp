// The C++ core under AddressSanitizer and UndefinedBehaviorSanitizer: each product on each
// instruction set, on sizes that meet every tail, with exactly as much memory as the interface asks
// for, against a plain loop in double; pack and unpack to the bit; and changes.cpp.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "bench/bench_loops.h"
#include "changes.h"
#include "cpu/dense.h"
#include "cpu/few_tokens.h"
#include "cpu/kernels.h"
#include "cpu/lanes_layout.h"
#include "cpu/packed.h"
#include "cpu/products.h"
#include "packing/cover.h"
#include "packing/order.h"
#include "support.h"

namespace {

using test::Array;
using test::to_bfloat16;

constexpr sk::Type kTypes[] = {sk::Type::kFloat, sk::Type::kBfloat16, sk::Type::kDouble};

struct Problem {
  int64_t tokens, n, k;
  double density;
  int64_t gap = 0;  // elements between two rows of an activation
};

const Problem kProblems[] = {{0, 5, 7, .5},        {1, 1, 1, 1},        {1, 37, 101, .3},
                             {7, 37, 101, .3},     {33, 37, 101, 1, 3}, {64, 37, 101, 0, 1},
                             {129, 300, 1, .9},    {65, 1, 300, .2},    {33, 3300, 20, .1},
                             {100, 230, 700, .03}, {70, 120, 330, .5},  {40, 5, 9000, .2},
                             {5000, 3, 5, .5}};

void expect(double got, double want, double scale, sk::Type type, const char* what) {
  const double tolerance = (type == sk::Type::kDouble  ? 1e-14
                            : type == sk::Type::kFloat ? 2e-6
                                                       : 8e-3) *
                           scale;
  if (std::abs(got - want) <= tolerance) return;
  std::printf("%s: expected %g, got %g\n", what, want, got);
  std::exit(1);
}

void expect_same(const Array& got, const Array& want, const char* what) {
  const size_t bytes = want.f.size() * sizeof(float) + want.h.size() * sizeof(uint16_t) +
                       want.d.size() * sizeof(double);
  if (bytes == 0 || std::memcmp(got.data(), want.data(), bytes) == 0) return;
  std::printf("%s: expected the same bits\n", what);
  std::exit(1);
}

// The places of a random mask.
void draw(const Problem& p, std::mt19937& random, std::vector<int32_t>& offsets,
          std::vector<int32_t>& cols) {
  std::uniform_real_distribution<double> uniform;
  offsets = {0};
  for (int64_t i = 0; i < p.n; i++) {
    for (int64_t c = 0; c < p.k; c++)
      if (uniform(random) < p.density) cols.push_back(static_cast<int32_t>(c));
    offsets.push_back(static_cast<int32_t>(cols.size()));
  }
  offsets.shrink_to_fit();
  cols.shrink_to_fit();
}

// Each number of vectors, of a tile, with several plans.
void check(const Problem& p, sk::Type type, std::initializer_list<int> all_vecs,
           bool pairs = false) {
  std::mt19937 random(1);
  std::vector<int32_t> offsets, cols;
  draw(p, random, offsets, cols);
  const int64_t nnz = static_cast<int64_t>(cols.size());
  const sk::Csr w{offsets.data(), cols.data(), p.n, p.k, nnz, 0};
  sk::Pattern pattern(p.n, p.k, nnz);
  const int64_t in_row = p.k + p.gap, out_row = p.n + p.gap;
  const int64_t in_size = std::max<int64_t>(0, p.tokens * in_row - p.gap);
  const int64_t out_size = std::max<int64_t>(0, p.tokens * out_row - p.gap);
  Array values(type, nnz, &random), x(type, in_size, &random), dy(type, out_size, &random);
  Array bias(type, p.n, &random);

  std::vector<double> want_y(out_size), scale_y(out_size), want_dx(in_size), scale_dx(in_size);
  std::vector<double> want_dvalues(nnz), scale_dvalues(nnz);
  for (int64_t i = 0; i < p.n; i++) {
    for (int64_t m = 0; m < p.tokens; m++) {
      want_y[m * out_row + i] = bias[i];
      scale_y[m * out_row + i] = std::abs(bias[i]);
    }
    for (int32_t q = offsets[i]; q < offsets[i + 1]; q++) {
      const double v = values[q];
      for (int64_t m = 0; m < p.tokens; m++) {
        const int64_t at_y = m * out_row + i, at_x = m * in_row + cols[q];
        const double in = x[at_x], grad = dy[at_y];
        want_y[at_y] += v * in;
        scale_y[at_y] += std::abs(v * in);
        want_dx[at_x] += v * grad;
        scale_dx[at_x] += std::abs(v * grad);
        want_dvalues[q] += grad * in;
        scale_dvalues[q] += std::abs(grad * in);
      }
    }
  }
  auto expect_rows = [&](const Array& got, const std::vector<double>& want,
                         const std::vector<double>& scale, int64_t features, const char* what) {
    for (int64_t j = 0; j < static_cast<int64_t>(want.size()); j++)
      if (j % (features + p.gap) < features)
        expect(got[j], want[j], scale[j], type, what);
      else if (got[j] == got[j])
        expect(got[j], NAN, 0, type, "between two rows");
  };

  // With one thread against the truth. Threads, and what a plan does for their sake, change no bit.
  for (int vecs : all_vecs) {
    Array y(type, out_size, nullptr), dx(type, in_size, nullptr), dvalues(type, nnz, nullptr);
    for (int threads : {1, 2, 3}) {
      sk::Plan plan{threads, vecs, 1, 65536, 37 * vecs, 1, 1, pairs};
      plan.two_sums = p.tokens % 2;
      if (threads > 1) plan.rows = 11, plan.row_parts = 2, plan.col_parts = threads;
      sk::Plan spmm_plan = plan;
      if (threads == 3) spmm_plan.tile_parts = 2, spmm_plan.in_place = true;
      Array y2(type, out_size, nullptr), dx2(type, in_size, nullptr), dvalues2(type, nnz, nullptr);
      sk::spmm(pattern, w, false, type, values.data(), bias.data(), {x.data(), in_row},
               {y2.data(), out_row}, p.tokens, spmm_plan);
      sk::spmm(pattern, w, true, type, values.data(), nullptr, {dy.data(), out_row},
               {dx2.data(), in_row}, p.tokens, spmm_plan);
      sk::sddmm(pattern, w, type, {dy.data(), out_row}, {x.data(), in_row}, dvalues2.data(),
                p.tokens, plan);
      if (threads == 1) {
        expect_rows(y2, want_y, scale_y, p.n, "spmm");
        expect_rows(dx2, want_dx, scale_dx, p.k, "spmm transposed");
        for (int64_t q = 0; q < nnz; q++)
          expect(dvalues2[q], want_dvalues[q], scale_dvalues[q], type, "sddmm");
        y = y2, dx = dx2, dvalues = dvalues2;
      } else {
        expect_same(y2, y, "spmm of several threads");
        expect_same(dx2, dx, "spmm transposed of several threads");
        expect_same(dvalues2, dvalues, "sddmm of several threads");
      }
    }
  }

  const int64_t few_rows = std::min(sk::kFewTokensT, p.tokens);
  Array few_dx(type, std::max<int64_t>(0, few_rows * in_row - p.gap), nullptr);
  sk::spmm_t_few_tokens(pattern, w, type, values.data(), nullptr, {dy.data(), out_row},
                        {few_dx.data(), in_row}, few_rows, 2);
  for (int64_t j = 0; j < few_dx.size(); j++)
    if (j % in_row < p.k) expect(few_dx[j], want_dx[j], scale_dx[j], type, "few transposed");

  if (type != sk::Type::kDouble) {
    const sk::LanesPack pack(w);
    Array packed(type, static_cast<int64_t>(pack.cols.size()), nullptr);
    for (int64_t i = 0; i < packed.size(); i++) packed.set(i, 0);
    for (int64_t q = 0; q < nnz; q++) packed.set(pack.places[q], static_cast<float>(values[q]));
    for (int64_t most : {1, 3, 5000}) {
      const int64_t tokens = std::min(most, p.tokens);
      Array y(type, std::max<int64_t>(0, tokens * out_row - p.gap), nullptr);
      sk::spmm_lanes(pack.shape, pack.part_steps.data(), pack.heads.data(), pack.part_steps.back(),
                     pack.cols.data(), type, packed.data(), bias.data(), {x.data(), in_row},
                     {y.data(), out_row}, tokens, 1 + tokens % 3);
      for (int64_t j = 0; j < y.size(); j++)
        if (j % out_row < p.n) expect(y[j], want_y[j], scale_y[j], type, "spmm of lanes");
    }
    Array dense(type, p.n * p.k, nullptr);
    for (int64_t i = 0; i < dense.size(); i++) dense.set(i, 0);
    sk::lanes_to_dense(pack.shape, pack.part_steps.data(), pack.heads.data(),
                       pack.part_steps.back(), pack.cols.data(), packed.data(),
                       static_cast<int>(sk::size_of(type)), dense.data(), 2);
    for (int64_t i = 0; i < p.n; i++)
      for (int32_t q = offsets[i]; q < offsets[i + 1]; q++)
        expect(dense[i * p.k + cols[q]], values[q], 1, type, "dense of lanes");
  }

  for (sk::Format format : {sk::Format::kBitmap, sk::Format::kColumns, sk::Format::kColumns32,
                            sk::Format::kWindow64, sk::Format::kWindow128}) {
    const int64_t most = sk::most_tokens(format);
    for (int64_t tokens = 0; tokens <= std::min(most, p.tokens); tokens++) {
      if (type == sk::Type::kDouble) continue;
      Array few(type, tokens * p.k, &random), out(type, tokens * p.n, nullptr);
      sk::spmm_few_tokens(pattern, {offsets.data(), cols.data(), p.n, p.k, nnz, tokens % 3 - 1},
                          format, type, values.data(), tokens % 2 ? bias.data() : nullptr,
                          {few.data(), p.k}, {out.data(), p.n}, tokens, 1 + tokens % 3);
      for (int64_t m = 0; m < tokens; m++)
        for (int64_t i = 0; i < p.n; i++) {
          double want = tokens % 2 ? bias[i] : 0, scale = std::abs(want);
          for (int32_t q = offsets[i]; q < offsets[i + 1]; q++) {
            want += values[q] * few[m * p.k + cols[q]];
            scale += std::abs(values[q] * few[m * p.k + cols[q]]);
          }
          expect(out[m * p.n + i], want, scale, type, "spmm of few tokens");
        }
    }
  }

  Array dense(type, p.n * p.k, nullptr), back(type, nnz, nullptr);
  const int bytes = static_cast<int>(sk::size_of(type));
  sk::to_dense(pattern, w, bytes, values.data(), {0, p.n}, {0, p.k}, dense.data(), 2);
  for (const auto& [first, end] : {std::pair{int64_t{0}, p.n / 3}, {p.n / 3, p.n}}) {
    const char* from = static_cast<const char*>(dense.data()) + first * p.k * bytes;
    sk::from_dense(pattern, w, bytes, from, {first, end - first}, back.data(), 2);
  }
  expect_same(back, values, "to_dense, from_dense");
  // A part of W, and no write beyond it.
  const int64_t row = p.n / 4, rows = p.n / 2, col = p.k / 128 * 64;
  const int64_t width = std::max<int64_t>(0, p.k - col - 1);
  Array part(type, rows * width, nullptr);
  sk::to_dense(pattern, w, bytes, values.data(), {row, rows}, {col, width}, part.data(), 2);
  for (int64_t i = 0; i < rows * width; i++)
    expect(part[i], dense[(row + i / width) * p.k + col + i % width], 0, type, "a part of W");
}

// pack and unpack, to the bit, with every width and number of tokens: ties, infinities, NaNs and
// subnormals meet every lane.
void check_panels() {
  constexpr int64_t kFeatures = 37, kGap = 3, kRow = kFeatures + kGap;
  constexpr uint32_t kUpper[] = {0x0000, 0x0001, 0x3f80, 0x3f81, 0x7f7f, 0x7f80, 0xff7f, 0xffbf};
  constexpr uint32_t kRest[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
  const sk::Kernels& kern = sk::kernels();
  std::mt19937 random(1);
  for (int vecs : {1, 2, 4, 8})
    for (int64_t tokens = 1; tokens <= vecs * kern.lanes; tokens++) {
      const int64_t width = vecs * kern.lanes, size = tokens * kRow - kGap;
      // A panel is aligned to 64 bytes; 16 floats are the most by which a vector falls short.
      std::vector<float> memory(kFeatures * width + 16);
      float* panel = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) / 4;
      Array x(sk::Type::kFloat, size, &random), f(x.type, size, nullptr);
      Array h(sk::Type::kBfloat16, size, nullptr), again(h.type, size, nullptr);
      for (float& v : x.f) {
        const uint32_t bits = kUpper[random() % 8] << 16 | kRest[random() % 6];
        std::memcpy(&v, &bits, 4);
      }
      std::fill(memory.begin(), memory.end(), NAN);
      kern.pack(x.type, {x.data(), kRow}, tokens, kFeatures, vecs, panel);
      for (int64_t c = 0; c < kFeatures; c++)
        for (int64_t m = tokens; m < width; m++)
          expect(panel[c * width + m], 0, 0, x.type, "padding of a panel");
      kern.unpack(f.type, panel, vecs, tokens, kFeatures, {f.data(), kRow});
      kern.unpack(h.type, panel, vecs, tokens, kFeatures, {h.data(), kRow});
      kern.pack(h.type, {h.data(), kRow}, tokens, kFeatures, vecs, panel);
      kern.unpack(again.type, panel, vecs, tokens, kFeatures, {again.data(), kRow});

      Array want_f(f.type, size, nullptr), want_h(h.type, size, nullptr);
      for (int64_t j = 0; j < size; j++)
        if (j % kRow < kFeatures) {
          uint32_t bits;
          std::memcpy(&bits, &x.f[j], 4);
          want_f.f[j] = x.f[j];
          want_h.h[j] = to_bfloat16(bits);
        }
      expect_same(f, want_f, "a panel in fp32");
      expect_same(h, want_h, "a panel in bfloat16");
      expect_same(again, want_h, "a panel in bfloat16, again");
    }
}

// The same for panels of pairs, which no result is unpacked from.
void check_pairs() {
  constexpr int64_t kFeatures = 69, kGap = 3, kRow = kFeatures + kGap;
  const sk::Kernels& kern = sk::kernels();
  std::mt19937 random(1);
  for (int vecs : {1, 2, 4, 8}) {
    const int64_t lanes = kern.lanes, width = vecs * 2 * lanes;
    for (int64_t tokens = 1; tokens <= width; tokens += 1 + width / 40) {
      std::vector<uint16_t> memory(kFeatures * width + 32);
      uint16_t* panel = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) / 2;
      Array h(sk::Type::kBfloat16, tokens * kRow - kGap, &random);
      for (uint16_t& bits : h.h)
        if (random() % 4 == 0) bits = static_cast<uint16_t>(random());
      kern.pack(sk::Type::kPairs, {h.data(), kRow}, tokens, kFeatures, vecs, panel);
      for (int64_t c = 0; c < kFeatures; c++)
        for (int64_t m = 0; m < width; m++) {
          const int64_t group = m / (2 * lanes), in_group = m % (2 * lanes);
          const int64_t pair = group * lanes + in_group % lanes;
          const uint16_t want = m < tokens ? h.h[m * kRow + c] : 0;
          if (panel[c * width + 2 * pair + in_group / lanes] == want) continue;
          std::printf("a panel of pairs: expected the same bits\n");
          std::exit(1);
        }
    }
  }
}

// The loops of bench_loops.h, on exactly the memory that they are given.
void check_bench_loops() {
  std::vector<float> memory(3 * 128 + 16);
  const size_t begin = (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) / 4 % 16;
  memory.resize(begin + 3 * 128);
  sk::read_memory(memory.data() + begin, 3 * 128, 2, 2);
  if (sk::multiply_adds(3, 2) <= 0 || sk::add_chain(3) <= 0) std::exit(1);
  for (sk::Step step : {sk::Step::kFloats, sk::Step::kPairs, sk::Step::kDots})
    if (sk::multiply_panel(step, memory.data() + begin, 1024, 2) <= 0) std::exit(1);
}

// Each value of a cover has a place of its own among the values of the records.
void check_cover(const Problem& p) {
  std::mt19937 random(1);
  std::vector<int32_t> offsets, cols;
  draw(p, random, offsets, cols);
  const int64_t nnz = static_cast<int64_t>(cols.size());
  const int64_t slices = (p.n + sk::kCoverRows - 1) / sk::kCoverRows;
  std::vector<int32_t> row_order(slices * sk::kCoverRows, -1);
  for (int64_t i = 0; i < p.n; i++) row_order[i] = static_cast<int32_t>(p.n - 1 - i);
  const sk::Csr w{offsets.data(), cols.data(), p.n, p.k, nnz, 0};
  const sk::Cover cover(w, row_order.data(), slices, 2);
  const int64_t windows = (p.k + sk::kCoverWindow - 1) / sk::kCoverWindow;
  std::vector<int32_t> step_offsets(slices * windows + 1);
  for (int value_bytes : {1, 2}) {
    const int64_t elements = sk::cover_record_bytes(value_bytes) / value_bytes;
    std::vector<uint8_t> records(cover.steps() * elements * value_bytes);
    std::vector<int64_t> places(nnz, -1);
    cover.write(step_offsets.data(), records.data(), places.data(), value_bytes);
    std::vector<bool> taken(cover.steps() * elements);
    for (int64_t place : places) {
      if (place < 0 || place % elements >= sk::kCoverValues || taken.at(place)) std::exit(1);
      taken[place] = true;
    }
    if (step_offsets.back() != cover.steps()) std::exit(1);
  }
}

// Each value has a slot of its column, and no row more than two in a group.
void check_order(const Problem& p) {
  std::mt19937 random(1);
  std::vector<int32_t> offsets, cols;
  draw(p, random, offsets, cols);
  const int64_t nnz = static_cast<int64_t>(cols.size());
  const sk::Order order({offsets.data(), cols.data(), p.n, p.k, nnz, 0}, 4 * p.k + 4);
  std::vector<int32_t> columns(order.slots()), places(nnz, -1);
  order.write(columns.data(), places.data());
  for (int64_t row = 0; row < p.n; row++) {
    std::vector<int> counts(order.slots() / 4);
    for (int32_t i = offsets[row]; i < offsets[row + 1]; i++) {
      if (columns.at(places[i]) != cols[i] || ++counts.at(places[i] / 4) > 2) std::exit(1);
    }
  }
}

}  // namespace

// Usage: sk_sanitize [isa...]; without names, all that run here.
int main(int argc, char** argv) {
  std::vector<const char*> isas{"portable", "avx2", "avx512", "neon"};
  if (argc > 1) isas.assign(argv + 1, argv + argc);
  auto run = [](const char* isa) {
    test::check_changes();
    check_panels();
    check_pairs();
    check_bench_loops();
    for (const Problem& p : kProblems) check_cover(p), check_order(p);
    for (sk::Type type : kTypes) {
      for (const Problem& p : kProblems) check(p, type, {1, 2, 4, 8});
      for (int64_t tokens = 1; tokens <= 130; tokens++) check({tokens, 9, 19, .4}, type, {8});
    }
    for (const Problem& p : kProblems) check(p, sk::Type::kBfloat16, {1, 2, 4, 8}, true);
    for (int64_t tokens = 1; tokens <= 260; tokens += 7)
      check({tokens, 9, 40, .4}, sk::Type::kBfloat16, {8}, true);
    std::printf("sanitize: %s ok\n", isa);
  };
  return test::for_isas(isas, false, run, [](const char*, int) {});
}
