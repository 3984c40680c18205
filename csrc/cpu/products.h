// The three products over token-major matrices, on the CPU.
#pragma once

#include "kernels.h"

namespace sk {

// y[M, n] = x[M, k] W^T, or with `transposed` y[M, k] = x[M, n] W. values are W's, in CSR order.
void spmm(Pattern&, const Csr& w, bool transposed, Type, const void* values, Matrix x, Matrix y,
          int64_t tokens, int threads);

// dvalues[nnz] = (dy[M, n]^T x[M, k]) at the non-zeros of W, in CSR order.
void sddmm(Pattern&, const Csr& w, Type, Matrix dy, Matrix x, void* dvalues, int64_t tokens,
           int threads);

}  // namespace sk
