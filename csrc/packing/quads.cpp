#include "quads.h"

namespace sk {

bool choose(const std::vector<Quad>& quads, const Quad& left, int* steps,
            std::vector<Quad>* chosen) {
  if (!left.low && !left.high) return true;
  if (--*steps < 0) return false;
  std::vector<Quad> usable;
  int counts[kMostLast] = {};
  for (const Quad& quad : quads) {
    if (!quad.is_in(left)) continue;
    usable.push_back(quad);
    for (uint64_t bits = quad.low; bits; bits &= bits - 1) ++counts[__builtin_ctzll(bits)];
    for (uint64_t bits = quad.high; bits; bits &= bits - 1) ++counts[64 + __builtin_ctzll(bits)];
  }
  int rarest = -1;
  for (int i = 0; i < kMostLast; ++i) {
    if (left.has(i) && (rarest < 0 || counts[i] < counts[rarest])) rarest = i;
  }
  for (const Quad& quad : usable) {
    if (!quad.has(rarest)) continue;
    chosen->push_back(quad);
    if (choose(usable, left.without(quad), steps, chosen)) return true;
    chosen->pop_back();
  }
  return false;
}

}  // namespace sk
