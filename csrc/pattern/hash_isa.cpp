// The NH hash of Black et al., "UMAC" (1999): a sum of 32 x 32 bit products of keyed words, which
// the compiler turns into vector instructions. The keys move on with the position. Compiled once
// per ISA, with SK_ISA naming it.
#include <cstdint>

namespace sk::SK_ISA {
namespace {

uint64_t mix(uint64_t h) {
  h = (h ^ h >> 31) * 0x9e3779b97f4a7c15;
  return h ^ h >> 29;
}

}  // namespace

uint64_t hash(const int32_t* words, int64_t size) {
  constexpr int kPairs = 16, kWords = 2 * kPairs;
  uint32_t key[kWords];
  for (int j = 0; j < kWords; j++) key[j] = static_cast<uint32_t>(mix(j + 1));
  uint64_t sum[kPairs] = {};
  auto add = [&](const int32_t* w) {
    for (int j = 0; j < kPairs; j++) {
      const uint32_t a = static_cast<uint32_t>(w[j]) + key[j];
      const uint32_t b = static_cast<uint32_t>(w[j + kPairs]) + key[j + kPairs];
      sum[j] += uint64_t{a} * b;
    }
    for (int j = 0; j < kWords; j++) key[j] += 0x9e3779b9;
  };
  int64_t i = 0;
  for (; i + kWords <= size; i += kWords) add(words + i);
  int32_t rest[kWords] = {};
  for (int j = 0; i + j < size; j++) rest[j] = words[i + j];
  add(rest);
  uint64_t all = static_cast<uint64_t>(size);
  for (int j = 0; j < kPairs; j++) all = mix(all ^ sum[j]);
  return all;
}

}  // namespace sk::SK_ISA
