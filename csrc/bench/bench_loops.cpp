#include "bench_loops.h"

#include <stdexcept>
#include <string>
#include <string_view>

#include "../common/threads.h"
#include "../cpu/kernels.h"
#include "isa_loops.h"

namespace sk {

namespace portable { extern const IsaLoops kIsaLoops; }
namespace avx2 { extern const IsaLoops kIsaLoops; }
namespace avx512 { extern const IsaLoops kIsaLoops; }
namespace neon { extern const IsaLoops kIsaLoops; }

namespace {

struct Named {
  std::string_view isa;
  const IsaLoops* loops;
};

const Named kAll[] = {
    {"portable", &portable::kIsaLoops},
#ifdef SK_HAVE_NEON
    {"neon", &neon::kIsaLoops},
#endif
#ifdef SK_HAVE_AVX2
    {"avx2", &avx2::kIsaLoops},
#endif
#ifdef SK_HAVE_AVX512
    {"avx512", &avx512::kIsaLoops},
#endif
};

// Those of the instruction set that the kernels use.
const IsaLoops& loops() {
  const std::string isa = kernels().isa;
  for (const Named& named : kAll)
    if (named.isa == isa) return *named.loops;
  throw std::logic_error("bench loops: none were built for " + isa);
}

}  // namespace

int64_t multiply_adds(int64_t rounds, int threads) {
  int64_t flop = 0;
  const IsaLoops& isa = loops();
  parallel_for(threads, threads, [&](int64_t task) {
    const int64_t done = isa.multiply_adds(rounds);
    if (task == 0) flop = done * threads;
  });
  return flop;
}

void read_memory(const float* p, int64_t size, int64_t rounds, int threads) {
  const IsaLoops& isa = loops();
  const int64_t part = size / threads / 128 * 128;
  parallel_for(threads, threads, [&](int64_t task) {
    for (int64_t r = 0; r < rounds; r++) isa.read(p + task * part, part);
  });
}

int64_t add_chain(int64_t rounds) {
  constexpr int kAdds = 16;
  uint64_t x = 1, y = 3;
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 16
    for (int i = 0; i < kAdds; i++) {
      x += y;
      asm volatile("" : "+r"(x), "+r"(y));
    }
  }
  return rounds * kAdds;
}

}  // namespace sk
