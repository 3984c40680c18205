// SpMM for few tokens, as in decoding: y[m][n] = sum over the non-zeros of row n of
// W[n, k] * x[m][k].
//
// W is read once from memory, as a stream: values in CSR order where they are, indices compressed
// (pattern/compressed.h). What differs is how a non-zero meets its x:
//
//   bitmap   The values of a vector's width of columns are expanded to their places in a register,
//            which then meets those columns of each token. One expansion serves all tokens; missing
//            places cost as much as stored ones.
//   gather   One token: a vector of non-zeros meets as many elements of x, gathered by their
//            columns.
//   columns  More tokens: a non-zero is a splat times a row of x, feature-major. The row is the
//            tokens; indices are fetched four at a time to leave the load ports to data.
//
// The first two are in few_tokens_rows.h, the third is in few_tokens_columns.h. A long row is
// summed in parts, each from 0, so that rounding errors stay small.
#pragma once

#include "kernels.h"

namespace sk {

// y[tokens, n] = x[tokens, k] W^T + bias[n], for at most kBitmapTokens tokens in kBitmap; in
// kColumns for at most kFewTokens, and k <= 65536. bias may be null.
void spmm_few_tokens(Pattern& pattern, const Csr& csr, Format format, Type type, const void* values,
                     const void* bias, Matrix x, Matrix y, int64_t tokens, int threads);

}  // namespace sk
