// The leaf loops of the CPU kernels that each instruction set offers, over raw pointers.
// A panel is a feature-major slice of activations, [features][width] numbers with
// width = vecs * lanes tokens, aligned to 64 bytes. It is what makes the inner loop fast: each
// non-zero of W meets a whole panel row, contiguous, in registers' width. The numbers of panels and
// of arrays in walking order are float, for float64 double. Panels that are read, of kPairs, stay
// bfloat16: lanes is twice as many, and of 2 * L tokens, L the floats in a register, the first L
// stand in the low halves of 32 bits and the others in the high ones.
#pragma once

#include <cstdint>

#include "../pattern/pattern.h"
#include "lanes_layout.h"

namespace sk {

// How many sums are added up before they are moved to a total, so that rounding errors stay small:
// those of SpMM's column blocks (spmm.h), of SDDMM's tiles of tokens (products.cpp).
constexpr int64_t kSumBlocks = 32;
constexpr int64_t kFewTokens = 16;  // the most that `spmm_few` takes in any format
inline int64_t most_tokens(Format f) {
  return f == Format::kColumns     ? kFewTokens
         : f == Format::kBitmap    ? 8
         : f == Format::kColumns32 ? 4
                                   : 1;
}
constexpr int64_t kBeforeFew = 16;
constexpr int64_t kFewTokensT = 8;  // the most that `spmm_t_few` takes
// How one token meets x in kColumns (lanes.h, few_tokens_scalar.h).
enum class Lookup { kGather, kPick, kScalar };
constexpr int64_t kLanesTokens = 4;  // the most that `spmm_lanes` takes

// kPairs: bfloat16, in panels too. kDots: the same, and values stay so in walking order; for SpMM
// where has_bf16_dots().
enum class Type { kFloat, kBfloat16, kDouble, kPairs, kDots };
inline int64_t size_of(Type t) { return t == Type::kDouble ? 8 : t == Type::kFloat ? 4 : 2; }
// Bytes of the type that it is computed in.
inline int64_t real_size_of(Type t) { return t == Type::kDouble ? 8 : 4; }
// Bytes of a token in a panel that is read.
inline int64_t panel_size_of(Type t) {
  return t == Type::kPairs || t == Type::kDots ? 2 : real_size_of(t);
}
// Bytes of a value in walking order, as SpMM reads it.
inline int64_t walked_size_of(Type t) { return t == Type::kDots ? 2 : real_size_of(t); }

// A token-major matrix: element (m, c) at data + (m * stride + c) elements.
struct Matrix {
  void* data;
  int64_t stride;
};

// One row block of a schedule. Walking order is the order of its runs, their segments, and the
// non-zeros in a segment; arrays in walking order begin at the block's first non-zero.
struct Walk {
  const Run* runs;
  const int64_t* run_offsets;  // [col_blocks + 1]
  int64_t col_blocks, cols_per_block;
  int64_t nnz;
  const uint16_t* row;    // by segment
  const uint32_t* start;  // by segment
  const uint16_t* cols;   // in walking order, inside the column block
  const int32_t* source;  // in walking order; null for W itself, where start says it
};

// Rows of W as few_tokens.h streams them: see pattern/compressed.h.
struct CompressedRows {
  const int32_t* row_offsets;  // of the first row on; positions in all values of W
  int64_t rows;
  int64_t nnz;           // of all W, where the values end
  const uint64_t* bits;  // kBitmap: of the first row on, [rows][words]
  int64_t words;
  const uint16_t* cols;          // kColumns: [nnz], all of W
  const int32_t* cols32;         // kColumns32: [nnz], all of W
  const int32_t* chunk_offsets;  // kWindow*: of the first row on
  const Chunk* chunks;           // kWindow*: all of W
  const float* start;            // of the first row on: what the sums are added to
};

// A part of W in lanes: see lanes_layout.h.
struct LanesPart {
  const LanesHead* heads;
  int64_t blocks, groups, rows;
  const uint8_t* cols;
  const float* start;  // [rows]: what the sums are added to
};

struct Kernels {
  int lanes;  // floats; half as many doubles, twice as many tokens of pairs

  // panel[c][m] = x[m][c] for c < features, m < tokens; 0 for tokens <= m < width.
  void (*pack)(Type, Matrix x, int64_t tokens, int64_t features, int vecs, void* panel);
  // y[m][c] = panel[c][m], rounded to the type. The panel is one of results: real numbers.
  void (*unpack)(Type, const void* panel, int vecs, int64_t tokens, int64_t features, Matrix y);

  // The block's values, from CSR order into walking order.
  void (*gather)(Type, const Walk&, const void* values, void* walked);
  // The reverse, rounded to the type. Not for W^T.
  void (*scatter)(Type, const Walk&, const void* walked, void* values);

  // wide[i] = values[i].
  void (*widen)(Type, const void* values, int64_t size, void* wide);
  // y[row][:] = start[row] + the sum over the row's non-zeros of value * x[col][:]; start and y are
  // local to the block, of `rows` rows. With more than kSumBlocks column blocks as much memory
  // again is used behind y.
  // values: the block's in walking order, or in_place all of W's in CSR order. In place not for W^T
  // and not for 16-bit types.
  // two_sums: with 4 vectors, and not of kPairs and kDots, a row's sum is that of two.
  void (*spmm)(Type, int vecs, bool two_sums, const Walk&, int64_t rows, bool in_place,
               const void* values, const void* start, const void* x, void* y);
  // walked (+)= sum_m dy[row][m] * x[col][m] for each non-zero; dy is local to the block.
  void (*sddmm)(Type, int vecs, const Walk&, const void* dy, const void* x, bool add, void* walked);

  // total[i] = part[i], or with !is_first total[i] + part[i].
  void (*add)(Type, bool is_first, int64_t size, const void* part, void* total);

  // x as `spmm_few` wants it: packed has 64 floats for each 64 features or less and token, of
  // kFewTokens tokens, and is memory from kBeforeFew floats before on. Not for kDouble, which
  // `spmm_few` does not take.
  void (*pack_few)(Type, Format, Matrix x, int64_t tokens, int64_t features, float* packed);
  // y[m][row] = start[row] + the sum over the row's non-zeros of value * x[m][col]. Whether x is
  // gathered or picked makes no difference to y.
  void (*spmm_few)(Type, Format, const CompressedRows&, const void* values, const float* packed,
                   int64_t tokens, Lookup, Matrix y);
  // wide[c][m] = x[m][c], and y[m][c] = bias[c] + wide[c][m]; bias may be null.
  void (*widen_t)(Type, Matrix x, int64_t tokens, int64_t features, int width, double* wide);
  void (*narrow_t)(Type, const double* wide, int width, const void* bias, int64_t tokens,
                   int64_t features, Matrix y);
  // y[col][m] += the sum over the rows' non-zeros of value * dy[row][m], for `width` tokens: 1,
  // 2, 4 or 8. Of kColumns and kColumns32, and of any type.
  void (*spmm_t_few)(Type, const CompressedRows&, const void* values, const double* dy, int width,
                     double* y);

  // x as `spmm_lanes` wants it: [rows][blocks][64] floats. Neither takes kDouble.
  void (*pack_lanes)(Type, Matrix x, int64_t tokens, int64_t features, int64_t rows, float* packed);
  // y[m][row] = start[row] + the sum over the row's non-zeros of value * x[m][col].
  void (*spmm_lanes)(Type, const LanesPart&, const void* values, const float* packed,
                     int64_t tokens, Matrix y);

  // dense[rows of w][cols] = W from column first_col on, a multiple of 64, whose bits w has; and
  // values = dense at the non-zeros of those rows, of all columns. Of elements of 2, 4 or 8 bytes.
  void (*expand)(int bytes, const CompressedRows& w, int64_t first_col, int64_t cols,
                 const void* values, void* dense);
  void (*collect)(int bytes, const CompressedRows& w, int64_t cols, const void* dense,
                  void* values);
};

// Those of the chosen instruction set; throws as sk::isa() does.
const Kernels& kernels();

}  // namespace sk
