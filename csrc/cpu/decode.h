// SpMM for few tokens, as in decoding: W is read once from memory, its indices compressed.
#pragma once

#include "kernels.h"

namespace sk {

// y[tokens, n] = x[tokens, k] W^T + bias[n], for at most kBitmapTokens tokens in kBitmap; in
// kColumns for at most kStreamTokens, and k <= 65536. bias may be null.
void spmm_stream(Pattern& pattern, const Csr& csr, Format format, Type type, const void* values,
                 const void* bias, Matrix x, Matrix y, int64_t tokens, int threads);

}  // namespace sk
