// Loops that measure what this machine can do at most; the caller takes the time. No kernel calls
// them: sparsekern/kernels/cpu/machine.py does, for plans, and sparsekern/bench/ceilings.py.
#pragma once

#include <cstdint>

namespace sk {

// Multiply-adds on registers by each of the threads. Returns the FLOPs of all.
int64_t multiply_adds(int64_t rounds, int threads);

// Each thread reads its part of size floats, which are aligned to 64 bytes, `rounds` times. Parts
// are multiples of 128 floats; what is left over is not read.
void read_memory(const float* p, int64_t size, int64_t rounds, int threads);

// The inner steps of the panel kernels: multiply-adds with floats, with pairs of bfloat16
// (Type::kPairs), and dot products of these, by one instruction where has_bf16_dots().
enum class Step { kFloats, kPairs, kDots };

// A step with all that stands at p, `rounds` times; p is aligned to 64 bytes, `bytes` a multiple of
// 1024. Returns the FLOPs.
int64_t multiply_panel(Step, const void* p, int64_t bytes, int64_t rounds);

// Integer additions that wait for each other, one a cycle. Returns their number.
int64_t add_chain(int64_t rounds);

}  // namespace sk
