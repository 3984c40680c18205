// SpMM of packed weights on a CPU, for inference.
#pragma once

#include "kernels.h"

namespace sk {

// y[tokens, n] = x[tokens, k] W^T + bias[n] of W in lanes (lanes_layout.h); kFloat and kBfloat16.
// bias may be null.
void spmm_lanes(const LanesShape& shape, const int64_t* part_steps, const LanesHead* heads,
                int64_t steps, const uint8_t* cols, Type type, const void* values, const void* bias,
                Matrix x, Matrix y, int64_t tokens, int threads);

}  // namespace sk
