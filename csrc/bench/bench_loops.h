// Loops that measure what this machine can do at most; the caller takes the time. They are no part
// of the kernel library: no kernel calls them, sparsekern/bench/ceilings.py does.
#pragma once

#include <cstdint>

namespace sk {

// Multiply-adds on registers by each of the threads. Returns the FLOPs of all.
int64_t multiply_adds(int64_t rounds, int threads);

// Each thread reads its part of size floats, which are aligned to 64 bytes, `rounds` times. Parts
// are multiples of 128 floats; what is left over is not read.
void read_memory(const float* p, int64_t size, int64_t rounds, int threads);

// Integer additions that wait for each other, one a cycle. Returns their number.
int64_t add_chain(int64_t rounds);

}  // namespace sk
