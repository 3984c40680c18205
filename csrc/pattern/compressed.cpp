#include "compressed.h"

#include <stdexcept>

namespace sk {

namespace {

void append_chunks(const Csr& w, int64_t row, int32_t window, std::vector<Chunk>& chunks) {
  const int32_t end = w.row_offsets[row + 1];
  for (int32_t p = w.row_offsets[row]; p < end;) {
    Chunk c{static_cast<uint16_t>(w.col_indices[p] / kChunk), 0, {}};
    const int32_t first = c.base * kChunk;
    int count = 0;
    for (; count < kChunk && p < end && w.col_indices[p] < first + window; count++, p++) {
      const int32_t col = w.col_indices[p] - first;
      c.cols[count] = static_cast<uint8_t>((col & 0x1f) | (col & 0x20) << 2 | (col & 0x40));
    }
    c.mask = static_cast<uint16_t>((1u << count) - 1);
    chunks.push_back(c);
  }
}

}  // namespace

Compressed compress(const Csr& w, Format format) {
  Compressed c{};
  c.row_offsets.assign(w.row_offsets, w.row_offsets + w.n + 1);
  c.words = (w.k + 63) / 64;
  if (format == Format::kBitmap) {
    c.bits.resize(w.n * c.words);
    for (int64_t i = 0; i < w.n; i++)
      for (int32_t p = w.row_offsets[i]; p < w.row_offsets[i + 1]; p++)
        c.bits[i * c.words + w.col_indices[p] / 64] |= uint64_t{1} << w.col_indices[p] % 64;
    return c;
  }
  if (format == Format::kColumns32) {
    c.cols32.assign(w.col_indices, w.col_indices + w.nnz);
    return c;
  }
  if (w.k > 65536) throw std::invalid_argument("k: expected at most 65536 for 16-bit columns");
  if (format == Format::kColumns) {
    c.cols.reserve(w.nnz + kColumnPadding);
    c.cols.assign(w.col_indices, w.col_indices + w.nnz);
    c.cols.resize(w.nnz + kColumnPadding);
    return c;
  }
  c.chunk_offsets.push_back(0);
  for (int64_t i = 0; i < w.n; i++) {
    append_chunks(w, i, format == Format::kWindow64 ? 64 : 128, c.chunks);
    c.chunk_offsets.push_back(static_cast<int32_t>(c.chunks.size()));
  }
  c.chunks.shrink_to_fit();
  return c;
}

}  // namespace sk
