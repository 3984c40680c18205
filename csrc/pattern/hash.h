#pragma once

#include <cstdint>

namespace sk {

// A 64-bit hash, the same on every instruction set.
uint64_t hash(const int32_t* words, int64_t size);

}  // namespace sk
