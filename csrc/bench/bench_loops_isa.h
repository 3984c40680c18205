// What bench_loops.h needs of each instruction set.
#pragma once

#include <cstdint>

#include "bench_loops.h"

namespace sk {

struct IsaLoops {
  // Multiply-adds on registers alone. Returns the FLOPs.
  int64_t (*multiply_adds)(int64_t rounds);
  // Reads size floats from p, which is aligned to 64 bytes; size is a multiple of 128.
  void (*read)(const float* p, int64_t size);
  // As the function of this name in bench_loops.h.
  int64_t (*multiply_panel)(Step, const void* p, int64_t bytes, int64_t rounds);
};

}  // namespace sk
