// Between the values of a CSR matrix and a part of the dense one, for the sizes at which the dense
// product is the faster one.
#pragma once

#include "kernels.h"

namespace sk {

// Some neighbouring rows or columns of W.
struct Span {
  int64_t first, count;
};

// dense[rows.count, cols.count] = W there. Elements are moved, not read: element_bytes is 2, 4 or
// 8. cols.first is a multiple of 64. std::invalid_argument for a part that W does not have.
void to_dense(Pattern& pattern, const Csr& w, int element_bytes, const void* values, Span rows,
              Span cols, void* dense, int threads);

// values = dense[rows.count, k] at the non-zeros of those rows of W; `values` are all of W's.
void from_dense(Pattern& pattern, const Csr& w, int element_bytes, const void* dense, Span rows,
                void* values, int threads);

}  // namespace sk
