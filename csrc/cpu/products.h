// The three products over token-major matrices, on the CPU.
#pragma once

#include "kernels.h"

namespace sk {

// How a product is cut; chosen by sparsekern/kernels/cpu/plan.py.
struct Plan {
  int threads;
  int vecs;            // vectors in a panel's row: a tile is vecs * lanes tokens; 1, 2, 4 or 8
  int tile_parts;      // 2: tiles of 8 vectors are halved
  int64_t rows, cols;  // of a block of W, or of W^T; at most 65536
  // The part of W of a task. SpMM: the tiles that threads share evenly are taken whole, of the
  // others a task takes one of row_parts. SDDMM: a cell of a grid of row_parts x col_parts.
  int64_t row_parts, col_parts;
  bool pairs = false;     // bfloat16 stays so in panels that are read (Type::kPairs, kDots)
  bool in_place = false;  // y = x W^T of 32 or 64 bits reads values where CSR has them
  bool two_sums = false;  // SpMM in tiles of 4 vectors: every other non-zero has a sum of its own
};

// y[M, n] = x[M, k] W^T + bias[n], or with `transposed` y[M, k] = x[M, n] W + bias[k]. values are
// W's, in CSR order; bias may be null.
void spmm(Pattern&, const Csr& w, bool transposed, Type, const void* values, const void* bias,
          Matrix x, Matrix y, int64_t tokens, const Plan&);

// dvalues[nnz] = (dy[M, n]^T x[M, k]) at the non-zeros of W, in CSR order.
void sddmm(Pattern&, const Csr& w, Type, Matrix dy, Matrix x, void* dvalues, int64_t tokens,
           const Plan&);

}  // namespace sk
