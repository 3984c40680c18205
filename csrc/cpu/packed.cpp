// Shares the parts of W out to threads: each row is summed by one, in one order.
#include "packed.h"

#include <algorithm>

#include "../common/threads.h"
#include "scratch.h"

namespace sk {
namespace { thread_local Scratch x_scratch; }  // namespace

void spmm_lanes(const LanesShape& shape, const int64_t* part_steps, const LanesHead* heads,
                int64_t steps, const uint8_t* cols, Type type, const void* values, const void* bias,
                Matrix x, Matrix y, int64_t tokens, int threads) {
  if (tokens == 0 || shape.n == 0) return;
  const Kernels& kern = kernels();
  const int64_t x_rows = tokens % 4 == 3 ? tokens + 1 : tokens;  // three are taken as four
  const int64_t x_floats = x_rows * shape.blocks() * 64;
  float* packed = x_scratch.floats(x_floats + shape.n);
  float* start = packed + x_floats;
  bias ? kern.widen(type, bias, shape.n, start) : void(std::fill_n(start, shape.n, 0.0f));
  kern.pack_lanes(type, x, tokens, shape.k, x_rows, packed);
  parallel_for(threads, shape.parts(), [&](int64_t part) {
    check_lanes(shape, part_steps, heads, steps, part);
    const int64_t first = part_steps[part] * kLanesGroup;
    const LanesPart w{heads + shape.heads_before(part),
                      shape.blocks(),
                      shape.groups_in(part),
                      shape.rows_in(part),
                      cols + first,
                      start + part * kLanesRows};
    const void* v = static_cast<const char*>(values) + first * size_of(type);
    for (int64_t m = 0; m < tokens; m += kLanesTokens) {
      Matrix out = y;
      out.data = static_cast<char*>(y.data) + (m * y.stride + part * kLanesRows) * size_of(type);
      kern.spmm_lanes(type, w, v, packed + m * shape.blocks() * 64,
                      std::min(kLanesTokens, tokens - m), out);
    }
  });
}

}  // namespace sk
