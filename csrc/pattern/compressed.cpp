#include "compressed.h"

#include <stdexcept>

namespace sk {

Compressed compress(const Csr& w, Format format) {
  Compressed c{{w.row_offsets, w.row_offsets + w.n + 1}, (w.k + 63) / 64, {}, {}};
  if (format == Format::kColumns) {
    if (w.k > 65536) throw std::invalid_argument("k: expected at most 65536 for 16-bit columns");
    c.cols.reserve(w.nnz + kColumnPadding);
    c.cols.assign(w.col_indices, w.col_indices + w.nnz);
    c.cols.resize(w.nnz + kColumnPadding);
    return c;
  }
  c.bits.resize(w.n * c.words);
  for (int64_t i = 0; i < w.n; i++)
    for (int32_t p = w.row_offsets[i]; p < w.row_offsets[i + 1]; p++)
      c.bits[i * c.words + w.col_indices[p] / 64] |= uint64_t{1} << w.col_indices[p] % 64;
  return c;
}

}  // namespace sk
