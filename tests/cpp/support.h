// What the programs of this folder share: arrays of the exact size, and a process for each
// instruction set.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "cpu/kernels.h"

namespace test {

[[noreturn]] inline void fail(const char* what) {
  std::printf("%s\n", what);
  std::fflush(stdout);
  std::exit(1);
}

inline float as_float(uint16_t b) {
  const uint32_t bits = uint32_t{b} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// To the nearest, a tie to the even one; a NaN keeps its upper bits and becomes quiet.
inline uint16_t to_bfloat16(uint32_t bits) {
  const uint32_t upper = bits >> 16, rest = bits & 0xffff;
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(upper | 0x40);
  return static_cast<uint16_t>(upper + (rest > 0x8000 || (rest == 0x8000 && upper % 2 == 1)));
}

inline uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

// An array of floats, bfloat16 or doubles, of the exact size: random, or NaN.
struct Array {
  sk::Type type;
  std::vector<float> f;
  std::vector<uint16_t> h;
  std::vector<double> d;

  Array(sk::Type type, int64_t size, std::mt19937* random) : type(type) {
    if (type == sk::Type::kFloat) f.resize(size);
    if (type == sk::Type::kBfloat16) h.resize(size);
    if (type == sk::Type::kDouble) d.resize(size);
    std::normal_distribution<float> normal;
    for (float& v : f) v = random ? normal(*random) : NAN;
    for (double& v : d) v = random ? normal(*random) : NAN;
    for (uint16_t& v : h) v = static_cast<uint16_t>(bits_of(random ? normal(*random) : NAN) >> 16);
  }
  int64_t size() const { return static_cast<int64_t>(f.size() + h.size() + d.size()); }
  const void* data() const {
    if (type == sk::Type::kDouble) return d.data();
    return type == sk::Type::kFloat ? static_cast<const void*>(f.data()) : h.data();
  }
  void* data() { return const_cast<void*>(static_cast<const Array*>(this)->data()); }
  double operator[](int64_t i) const {
    if (type == sk::Type::kDouble) return d[i];
    return type == sk::Type::kFloat ? f[i] : as_float(h[i]);
  }
  void set(int64_t i, float v) {
    if (type == sk::Type::kFloat) f[i] = v;
    if (type == sk::Type::kBfloat16) h[i] = to_bfloat16(bits_of(v));
    if (type == sk::Type::kDouble) d[i] = v;
  }
};

// Runs f(isa) in a process for each of these instruction sets, since one is chosen once a process;
// one after the other, or all at once. Returns how many failed. after(isa, status) is called here
// when one has ended.
template <class Run, class After>
int for_isas(const std::vector<const char*>& isas, bool at_once, const Run& run,
             const After& after) {
  std::vector<pid_t> children;
  int failed = 0;
  auto wait_for = [&](size_t i) {
    int status = 0;
    waitpid(children[i], &status, 0);
    failed += status != 0;
    after(isas[i], status);
  };
  for (size_t i = 0; i < isas.size(); i++) {
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
      setenv("SPARSEKERN_ISA", isas[i], 1);
      try {
        sk::kernels();
      } catch (const std::invalid_argument&) {
        std::printf("%s is not built or does not run here\n", isas[i]);
        std::exit(0);
      }
      run(isas[i]);
      std::exit(0);
    }
    children.push_back(child);
    if (!at_once) wait_for(i);
  }
  for (size_t i = 0; at_once && i < isas.size(); i++) wait_for(i);
  return failed;
}

}  // namespace test
