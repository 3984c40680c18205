// Between the values of a CSR matrix and a dense row-major one, for the sizes at which the dense
// product is the faster one.
#pragma once

#include "../pattern/csr.h"

namespace sk {

// Both read the caller's indices and check each one before it is used: std::invalid_argument if
// they are not valid CSR, and no access out of bounds whoever writes to them meanwhile.

// dense[n, k] = W. Elements are moved, not read: element_bytes is 2, 4 or 8.
void to_dense(const Csr& w, int element_bytes, const void* values, void* dense, int threads);

// values[nnz] = dense at the non-zeros.
void from_dense(const Csr& w, int element_bytes, const void* dense, void* values, int threads);

}  // namespace sk
