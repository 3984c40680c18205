#include "bench_loops.h"

#include "../common/machine.h"
#include "../common/threads.h"
#include "bench_loops_isa.h"

namespace sk {

SK_DECLARE(extern const IsaLoops kIsaLoops)

int64_t multiply_adds(int64_t rounds, int threads) {
  int64_t flop = 0;
  const IsaLoops& loops = SK_CHOSEN(kIsaLoops);
  parallel_for(threads, threads, [&](int64_t task) {
    const int64_t done = loops.multiply_adds(rounds);
    if (task == 0) flop = done * threads;
  });
  return flop;
}

void read_memory(const float* p, int64_t size, int64_t rounds, int threads) {
  const IsaLoops& loops = SK_CHOSEN(kIsaLoops);
  const int64_t part = size / threads / 128 * 128;
  parallel_for(threads, threads, [&](int64_t task) {
    for (int64_t r = 0; r < rounds; r++) loops.read(p + task * part, part);
  });
}

int64_t multiply_panel(Step step, const void* p, int64_t bytes, int64_t rounds) {
  return SK_CHOSEN(kIsaLoops).multiply_panel(step, p, bytes, rounds);
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
