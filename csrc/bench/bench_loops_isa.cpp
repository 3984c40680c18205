// The loops for one instruction set: compiled once per ISA, with SK_ISA naming it.
#include "bench_loops_isa.h"

#include "../cpu/simd.h"

namespace sk::SK_ISA {
namespace {

// Makes the compiler believe that v is needed.
SK_INLINE void use(Vec v) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  float sum = 0;
  for (float lane : lanes) sum += lane;
  volatile float sink = sum;
  static_cast<void>(sink);
}

// Multiply-adds on registers alone: enough chains to hide their latency, and few enough for the
// registers of each instruction set. Returns the FLOPs.
int64_t multiply_adds(int64_t rounds) {
  constexpr int kChains = kLanes == 8 ? 12 : 16;
  alignas(64) float numbers[kChains * kLanes];
  for (int i = 0; i < kChains * kLanes; i++) numbers[i] = 1e-3f * static_cast<float>(i);
  const float* unknown = in_register(numbers);  // or chains known to be alike would be merged
  const Vec a = splat(unknown), b = splat(unknown + 1);
  Vec sums[kChains];
  SK_FOR(i, kChains) sums[i] = load(unknown + i * kLanes);
  for (int64_t r = 0; r < rounds; r++)
    SK_FOR(i, kChains) sums[i] = fma(sums[i], a, b);
  Vec all = zero();
  SK_FOR(i, kChains) all = add(all, sums[i]);
  use(all);
  return rounds * kChains * kLanes * 2;
}

// Reads size floats from p, which is aligned to 64 bytes; size is a multiple of 128.
void read(const float* p, int64_t size) {
  constexpr int kVecs = 8;
  Vec sums[kVecs];
  SK_FOR(i, kVecs) sums[i] = zero();
  for (int64_t at = 0; at < size; at += kVecs * kLanes)
    SK_FOR(i, kVecs) sums[i] = add(sums[i], load(p + at + i * kLanes));
  Vec all = zero();
  SK_FOR(i, kVecs) all = add(all, sums[i]);
  use(all);
}

}  // namespace

extern const IsaLoops kIsaLoops;
const IsaLoops kIsaLoops = {multiply_adds, read};

}  // namespace sk::SK_ISA
