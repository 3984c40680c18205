// An exact cover by quads: the last columns of an order (order.h), of which each has to be in one.
#pragma once

#include <cstdint>
#include <vector>

namespace sk {

constexpr int kMostLast = 128;  // columns

// Some of the last columns, four of them or all that are left.
struct Quad {
  uint64_t low = 0, high = 0;

  bool has(int i) const { return (i < 64 ? low >> i : high >> (i - 64)) & 1; }
  void add(int64_t i) { (i < 64 ? low : high) |= uint64_t{1} << i % 64; }
  bool is_in(const Quad& other) const { return !(low & ~other.low) && !(high & ~other.high); }
  Quad without(const Quad& other) const { return {low & ~other.low, high & ~other.high}; }
};

// Quads that hold each column of `left` once, to `chosen`; the column that is in the fewest comes
// first. False if there are none, or none were found within so many steps.
bool choose(const std::vector<Quad>& quads, const Quad& left, int* steps,
            std::vector<Quad>* chosen);

}  // namespace sk
