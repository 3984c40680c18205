// What bench_loops.h needs of each instruction set.
#pragma once

#include <cstdint>

namespace sk {

struct IsaLoops {
  // Multiply-adds on registers alone. Returns the FLOPs.
  int64_t (*multiply_adds)(int64_t rounds);
  // Reads size floats from p, which is aligned to 64 bytes; size is a multiple of 128.
  void (*read)(const float* p, int64_t size);
};

}  // namespace sk
