// SpMM for few tokens, as in decoding: y[m][n] = sum over the non-zeros of row n of
// W[n, k] * x[m][k].
//
// W is read once from memory, as a stream: values in CSR order where they are, indices compressed
// (pattern/compressed.h). What differs is how a non-zero meets its x:
//
//   bitmap   The values of a vector's width of columns are expanded to their places in a register,
//            which then meets those columns of each token. One expansion serves all tokens; missing
//            places cost as much as stored ones.
//   window   One token: up to 16 non-zeros that lie in 64 or 128 columns meet x looked up among
//            those, which on AVX-512 are 2 or 4 shuffles of two registers each.
//   columns  A non-zero is a splat times a row of x, feature-major. The row is the tokens; indices
//            are fetched four at a time to leave the load ports to data. On AVX-512 a register has
//            as many rows of x as it holds: 2, 4 or 8 of 8, 4 or 2 tokens, and with one token 16
//            elements, gathered or loaded one by one.
//
//   scalar   One token, where rows have few non-zeros or k > 65536: one by one.
//
// Those whose lanes are columns are in few_tokens_rows.h, those whose lanes are tokens in
// few_tokens_columns.h. A long row is summed in parts, each from 0, so that rounding errors stay
// small.
#pragma once

#include "kernels.h"

namespace sk {

// y[tokens, n] = x[tokens, k] W^T + bias[n], for at most most_tokens(format); k <= 65536 but in
// kBitmap and kColumns32. bias may be null.
void spmm_few_tokens(Pattern& pattern, const Csr& csr, Format format, Type type, const void* values,
                     const void* bias, Matrix x, Matrix y, int64_t tokens, int threads);

// y[tokens, k] = dy[tokens, n] W + bias[k], for at most kFewTokensT tokens, any type and any k. A
// non-zero adds to the sum of its column in memory; nothing is transposed. bias may be null.
void spmm_t_few_tokens(Pattern& pattern, const Csr& csr, Type type, const void* values,
                       const void* bias, Matrix dy, Matrix y, int64_t tokens, int threads);

}  // namespace sk
