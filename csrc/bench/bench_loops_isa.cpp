// The loops for one instruction set: compiled once per ISA, with SK_ISA naming it.
#include "bench_loops_isa.h"

#include "../common/machine.h"
#include "../cpu/dots.h"

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

// Two sets of kVecs sums, which hide the latency of a multiply-add.
constexpr int kVecs = kLanes == 16 ? 8 : 4, kSets = 2;

struct AddRow {
  template <class Element>
  static SK_INLINE void step(Vec (&sums)[kVecs], Vec w, const Element* in) {
    add_row(sums, w, in);
  }
};
struct MultiplyPairs {
  static SK_INLINE void step(Vec (&sums)[kVecs], Vec w, const Pair* in) {
    Pairs d;
    memcpy(&d, &w, sizeof d);
    SK_FOR(j, kVecs / 2) sums[j] = dot(d, load(in + j * kLanes), sums[j]);
  }
};
#ifdef SK_DOTS
struct DotPairs {
  static SK_INLINE void step(Vec (&sums)[kVecs], Vec w, const Pair* in) {
    SK_FOR(j, kVecs / 2) sums[j] = dot_bf16(_mm512_castps_si512(w), in + j * kLanes, sums[j]);
  }
};
#endif

template <class F, class Element>
int64_t for_panel(const Element* p, int64_t bytes, int64_t rounds) {
  constexpr int64_t kStep = int64_t{kVecs} / Simd<Element>::kTokens * kLanes;
  const int64_t count = bytes / static_cast<int64_t>(sizeof(Element));
  const float one = 1;
  const Vec w = splat(in_register(&one));
  Vec sums[kSets][kVecs];
  SK_FOR(s, kSets)
    SK_FOR(j, kVecs) sums[s][j] = zero();
  for (int64_t r = 0; r < rounds; r++)
    for (int64_t at = 0; at < count; at += kSets * kStep)
      SK_FOR(s, kSets) F::step(sums[s], w, in_register(p + at + s * kStep));
  Vec all = zero();
  SK_FOR(s, kSets)
    SK_FOR(j, kVecs) all = add(all, sums[s][j]);
  use(all);
  return rounds * count * Simd<Element>::kTokens * 2;
}

int64_t multiply_panel(Step step, const void* p, int64_t bytes, int64_t rounds) {
  if (step == Step::kFloats) return for_panel<AddRow>(static_cast<const float*>(p), bytes, rounds);
  const auto* pairs = static_cast<const Pair*>(p);
  if (step == Step::kPairs) return for_panel<AddRow>(pairs, bytes, rounds);
#ifdef SK_DOTS
  if (has_bf16_dots()) return for_panel<DotPairs>(pairs, bytes, rounds);
#endif
  return for_panel<MultiplyPairs>(pairs, bytes, rounds);
}

}  // namespace

extern const IsaLoops kIsaLoops;
const IsaLoops kIsaLoops = {multiply_adds, read, multiply_panel};

}  // namespace sk::SK_ISA
