// The C++ core under AddressSanitizer and UndefinedBehaviorSanitizer: each product on each
// instruction set, on sizes that meet every tail, with exactly as much memory as the interface asks
// for, against a plain loop in double.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "cpu/products.h"
#include "pattern/dense.h"

namespace {

struct Problem {
  int64_t tokens, n, k;
  double density;
};

const Problem kProblems[] = {{0, 5, 7, .5},     {1, 1, 1, 1},     {1, 37, 101, .3},
                             {7, 37, 101, .3},  {33, 37, 101, 1}, {64, 37, 101, 0},
                             {129, 300, 1, .9}, {65, 1, 300, .2}, {100, 530, 700, .02},
                             {70, 400, 650, .5}};

float as_float(uint16_t b) {
  const uint32_t bits = uint32_t{b} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// An array of floats or bfloat16, of the exact size.
struct Array {
  sk::Type type;
  std::vector<float> f;
  std::vector<uint16_t> h;

  Array(sk::Type type, int64_t size, std::mt19937* random) : type(type) {
    (type == sk::Type::kFloat ? f.resize(size) : h.resize(size));
    std::normal_distribution<float> normal;
    for (float& v : f) v = random ? normal(*random) : NAN;
    for (uint16_t& v : h) {
      const float x = random ? normal(*random) : NAN;
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      v = static_cast<uint16_t>(bits >> 16);
    }
  }
  void* data() { return type == sk::Type::kFloat ? static_cast<void*>(f.data()) : h.data(); }
  double operator[](int64_t i) const { return type == sk::Type::kFloat ? f[i] : as_float(h[i]); }
};

void expect(double got, double want, double scale, sk::Type type, const char* what) {
  const double tolerance = (type == sk::Type::kFloat ? 2e-6 : 8e-3) * scale;
  if (std::abs(got - want) <= tolerance) return;
  std::printf("%s: expected %g, got %g\n", what, want, got);
  std::exit(1);
}

void check(const Problem& p, sk::Type type, int threads) {
  std::mt19937 random(1);
  std::vector<int32_t> offsets{0}, cols;
  std::uniform_real_distribution<double> uniform;
  for (int64_t i = 0; i < p.n; i++) {
    for (int64_t c = 0; c < p.k; c++)
      if (uniform(random) < p.density) cols.push_back(static_cast<int32_t>(c));
    offsets.push_back(static_cast<int32_t>(cols.size()));
  }
  offsets.shrink_to_fit();
  cols.shrink_to_fit();
  const int64_t nnz = static_cast<int64_t>(cols.size());
  const sk::Csr w{offsets.data(), cols.data(), p.n, p.k, nnz};
  sk::Pattern pattern(p.n, p.k, nnz);
  Array values(type, nnz, &random), x(type, p.tokens * p.k, &random);
  Array dy(type, p.tokens * p.n, &random);
  Array y(type, p.tokens * p.n, nullptr), dx(type, p.tokens * p.k, nullptr);
  Array dvalues(type, nnz, nullptr);

  sk::spmm(pattern, w, false, type, values.data(), {x.data(), p.k}, {y.data(), p.n}, p.tokens,
           threads);
  sk::spmm(pattern, w, true, type, values.data(), {dy.data(), p.n}, {dx.data(), p.k}, p.tokens,
           threads);
  sk::sddmm(pattern, w, type, {dy.data(), p.n}, {x.data(), p.k}, dvalues.data(), p.tokens, threads);

  std::vector<double> want_y(p.tokens * p.n), scale_y(p.tokens * p.n);
  std::vector<double> want_dx(p.tokens * p.k), scale_dx(p.tokens * p.k);
  for (int64_t i = 0; i < p.n; i++)
    for (int32_t q = offsets[i]; q < offsets[i + 1]; q++) {
      double want = 0, scale = 0;
      for (int64_t m = 0; m < p.tokens; m++) {
        const int64_t at_y = m * p.n + i, at_x = m * p.k + cols[q];
        want_y[at_y] += values[q] * x[at_x];
        scale_y[at_y] += std::abs(values[q] * x[at_x]);
        want_dx[at_x] += values[q] * dy[at_y];
        scale_dx[at_x] += std::abs(values[q] * dy[at_y]);
        want += dy[at_y] * x[at_x];
        scale += std::abs(dy[at_y] * x[at_x]);
      }
      expect(dvalues[q], want, scale, type, "sddmm");
    }
  for (int64_t j = 0; j < p.tokens * p.n; j++) expect(y[j], want_y[j], scale_y[j], type, "spmm");
  for (int64_t j = 0; j < p.tokens * p.k; j++)
    expect(dx[j], want_dx[j], scale_dx[j], type, "spmm transposed");

  Array dense(type, p.n * p.k, nullptr), back(type, nnz, nullptr);
  const int bytes = static_cast<int>(sk::size_of(type));
  sk::to_dense(w, bytes, values.data(), dense.data(), threads);
  sk::from_dense(w, bytes, dense.data(), back.data(), threads);
  for (int64_t q = 0; q < nnz; q++) expect(back[q], values[q], 0, type, "to_dense, from_dense");
}

}  // namespace

// The instruction set is chosen once a process, so each one gets its own.
int main() {
  for (const char* isa : {"portable", "avx2", "avx512", "neon"}) {
    if (const pid_t child = fork()) {
      int status = 0;
      waitpid(child, &status, 0);
      if (status != 0) return 1;
      continue;
    }
    setenv("SPARSEKERN_ISA", isa, 1);
    try {
      sk::kernels();
    } catch (const std::invalid_argument&) {
      std::printf("sanitize: %s is not built or does not run here\n", isa);
      return 0;
    }
    for (const Problem& p : kProblems)
      for (sk::Type type : {sk::Type::kFloat, sk::Type::kBfloat16})
        for (int threads : {1, 2}) check(p, type, threads);
    std::printf("sanitize: %s ok\n", isa);
    return 0;
  }
}
