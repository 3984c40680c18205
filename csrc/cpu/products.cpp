// Cuts the tokens into tiles and W into blocks, shares them out to threads, and calls the leaf
// loops. Every output element is summed by one thread in one order, so the result depends neither
// on the number of threads nor on their timing.
#include "products.h"

#include <algorithm>
#include <vector>

#include "../common/machine.h"
#include "../common/threads.h"
#include "scratch.h"

namespace sk {
namespace {

constexpr int64_t kCacheLine = 64;

thread_local Scratch x_scratch, y_scratch, w_scratch;

// Up to a panel's width of tokens.
struct Tile {
  int64_t first, tokens;
  int vecs;
};

// The tiles; a rest takes half as wide a tile if that holds it. No narrower: it would sum in
// another order than its neighbours (spmm.h).
std::vector<Tile> cut_tokens(int64_t tokens, int64_t lanes, const Plan& plan) {
  std::vector<Tile> tiles;
  for (int64_t first = 0, vecs; first < tokens; first += vecs * lanes) {
    vecs = plan.vecs == 8 && tokens - first <= 4 * lanes ? 4 : plan.vecs;
    const int64_t parts = vecs == 8 ? plan.tile_parts : 1, width = vecs * lanes / parts;
    for (int64_t at = first; at < std::min(first + parts * width, tokens); at += width)
      tiles.push_back({at, std::min(tokens - at, width), static_cast<int>(vecs / parts)});
  }
  return tiles;
}

// The walk through what a row block holds in the column blocks [first, end).
Walk walk(const Schedule& s, int64_t row_block, int64_t first, int64_t end) {
  const int64_t at = row_block * s.col_blocks + first, nnz = s.nnz_offsets[at];
  return {s.runs.data(),
          s.run_offsets.data() + at,
          end - first,
          s.cols_per_block,
          s.nnz_offsets[at + end - first] - nnz,
          s.row.data(),
          s.start.data(),
          s.cols.data() + nnz,
          s.source.empty() ? nullptr : s.source.data() + nnz};
}

Walk walk(const Schedule& s, int64_t row_block) { return walk(s, row_block, 0, s.col_blocks); }

// Where in an array in walking order a row block begins.
int64_t nnz_before(const Schedule& s, int64_t row_block, int64_t col_block = 0) {
  return s.nnz_offsets[row_block * s.col_blocks + col_block];
}

// Memory for `count` numbers.
char* numbers(Scratch& scratch, Type type, int64_t count) {
  return reinterpret_cast<char*>(scratch.floats(count * real_size_of(type) / 4));
}
// The same for `count` elements of a panel that is read; whole registers of them.
char* elements(Scratch& scratch, Type type, int64_t count) {
  return reinterpret_cast<char*>(scratch.floats(count * panel_size_of(type) / 4));
}

// What panels hold under this plan, and how many tokens of it a register.
Type in_panels(Type type, const Plan& plan) {
  return type == Type::kBfloat16 && plan.pairs ? Type::kPairs : type;
}
int64_t lanes_of(const Kernels& kern, Type type) { return kern.lanes * 4 / panel_size_of(type); }

Matrix at(Matrix m, Type type, int64_t row, int64_t col) {
  m.data = static_cast<char*>(m.data) + (row * m.stride + col) * size_of(type);
  return m;
}

struct Range {
  int64_t first, end;
};
// The `part`-th of `parts` nearly equal ranges of [0, size).
Range part_of(int64_t size, int64_t part, int64_t parts) {
  return {size * part / parts, size * (part + 1) / parts};
}

// Bytes [first, end) of the values of some rows of W, of so many bytes each.
Range bytes_of_rows(const Csr& w, int64_t first, int64_t rows, int64_t bytes) {
  const auto at = [&](int64_t row) {
    return std::clamp<int64_t>(w.row_offsets[std::min(row, w.n)], 0, w.nnz) * bytes;
  };
  return {at(first), at(first + rows)};
}

// Reads values in order, for who is about to read them in another one.
void read_values(Range bytes, const void* values) {
  for (int64_t p = bytes.first; p < bytes.end; p += kCacheLine)
    static_cast<void>(*(static_cast<const volatile char*>(values) + p));
}

// Fetches values in order, for who is about to write them in another one. Memory that nobody has
// touched yet is left alone.
void fetch_values(Range bytes, void* values) {
  for (int64_t p = bytes.first; p < bytes.end; p += kCacheLine)
    __builtin_prefetch(static_cast<char*>(values) + p, 1);
}

}  // namespace

void spmm(Pattern& pattern, const Csr& csr, bool transposed, Type given, const void* values,
          const void* bias, Matrix x, Matrix y, int64_t tokens, const Plan& plan) {
  const Kernels& kern = kernels();
  const Type panels = in_panels(given, plan);
  const Type type = panels == Type::kPairs && has_bf16_dots() ? Type::kDots : panels;
  const int64_t n = transposed ? csr.k : csr.n, k = transposed ? csr.n : csr.k;
  const auto schedule = pattern.schedule(csr, transposed, plan.rows, plan.cols);
  const Schedule& s = *schedule;
  const int64_t real = real_size_of(type), lanes = lanes_of(kern, type);
  const int64_t value = walked_size_of(type);
  char* walked = numbers(w_scratch, type, csr.nnz + n);
  char* start = walked + csr.nnz * real;
  bias ? kern.widen(type, bias, n, start) : void(std::fill_n(start, n * real, char{0}));
  advise_huge_pages(y.data, tokens * n * size_of(type));
  const std::vector<Tile> tiles = cut_tokens(tokens, lanes, plan);
  // Not in half a tile of 8, whose sums must not depend on where it is cut.
  const bool two_sums = plan.two_sums && plan.vecs == 4;
  const bool in_place = plan.in_place && value == size_of(type) && !transposed;
  parallel_for(plan.threads, in_place ? 0 : s.row_blocks * s.col_blocks, [&](int64_t i) {
    // The blocks that have the same rows of W one behind the other.
    const int64_t blocks = transposed ? s.row_blocks : s.col_blocks, outer = i / blocks;
    const int64_t b = transposed ? i % blocks : outer, c = transposed ? outer : i % blocks;
    const int64_t some = transposed ? plan.cols : plan.rows;  // rows of W
    if (i % blocks == 0) read_values(bytes_of_rows(csr, outer * some, some, size_of(type)), values);
    const int64_t at = s.nnz_offsets[b * s.col_blocks + c];
    kern.gather(type, walk(s, b, c, c + 1), values, walked + at * value);
  });

  const int64_t count = static_cast<int64_t>(tiles.size()), whole = count - count % plan.threads;
  parallel_for(plan.threads, whole + (count - whole) * plan.row_parts, [&](int64_t task) {
    const int64_t parts = task < whole ? 1 : plan.row_parts;
    const int64_t i = task < whole ? task : whole + (task - whole) / parts;
    const Range blocks = part_of(s.row_blocks, task < whole ? 0 : (task - whole) % parts, parts);
    const Tile& t = tiles[i];
    char* x_panel = elements(x_scratch, type, k * t.vecs * lanes);
    kern.pack(type, at(x, type, t.first, 0), t.tokens, k, t.vecs, x_panel);
    for (int64_t b = blocks.first; b < blocks.end; b++) {
      const int64_t first = b * plan.rows, rows = std::min(plan.rows, n - first);
      const int64_t panels = s.col_blocks > kSumBlocks ? 2 : 1;
      char* y_panel = numbers(y_scratch, type, panels * rows * t.vecs * lanes);
      const void* block_values = in_place ? values : walked + nnz_before(s, b) * value;
      kern.spmm(type, t.vecs, two_sums, walk(s, b), rows, in_place, block_values,
                start + first * real, x_panel, y_panel);
      kern.unpack(type, y_panel, t.vecs, t.tokens, rows, at(y, type, t.first, first));
    }
  });
}

void sddmm(Pattern& pattern, const Csr& csr, Type given, Matrix dy, Matrix x, void* dvalues,
           int64_t tokens, const Plan& plan) {
  const Kernels& kern = kernels();
  const Type type = in_panels(given, plan);
  const auto schedule = pattern.schedule(csr, false, plan.rows, plan.cols);
  const Schedule& s = *schedule;

  const int64_t real = real_size_of(type), lanes = lanes_of(kern, type);
  const std::vector<Tile> tiles = cut_tokens(tokens, lanes, plan);
  const int64_t count = static_cast<int64_t>(tiles.size());
  advise_huge_pages(dvalues, csr.nnz * size_of(type));
  // The sums of kSumBlocks tiles, and if there are more tiles the totals of those.
  char* walked = numbers(w_scratch, type, count > kSumBlocks ? 2 * csr.nnz : csr.nnz);
  char* total = count > kSumBlocks ? walked + csr.nnz * real : walked;
  if (tokens == 0) std::fill_n(walked, csr.nnz * real, char{0});
  parallel_for(plan.threads, plan.row_parts * plan.col_parts, [&](int64_t cell) {
    const Range row_blocks = part_of(s.row_blocks, cell / plan.col_parts, plan.row_parts);
    const Range col_blocks = part_of(s.col_blocks, cell % plan.col_parts, plan.col_parts);
    const int64_t x_first = col_blocks.first * plan.cols;
    const int64_t x_cols = std::min(col_blocks.end * plan.cols, csr.k) - x_first;
    for (int64_t i = 0; i < count; i++) {
      const Tile& t = tiles[i];
      const int64_t width = t.vecs * lanes, sums = i % kSumBlocks;
      const bool is_complete = sums == kSumBlocks - 1 || i == count - 1;
      char* x_panel = elements(x_scratch, type, x_cols * width);
      kern.pack(type, at(x, type, t.first, x_first), t.tokens, x_cols, t.vecs, x_panel);
      for (int64_t b = row_blocks.first; b < row_blocks.end; b++) {
        const int64_t first = b * plan.rows, rows = std::min(plan.rows, csr.n - first);
        char* dy_panel = elements(y_scratch, type, rows * width);
        kern.pack(type, at(dy, type, t.first, first), t.tokens, rows, t.vecs, dy_panel);
        const Walk w = walk(s, b, col_blocks.first, col_blocks.end);
        const int64_t begin = nnz_before(s, b, col_blocks.first) * real;
        kern.sddmm(type, t.vecs, w, dy_panel, x_panel, sums > 0, walked + begin);
        if (is_complete && total != walked)
          kern.add(type, i < kSumBlocks, w.nnz, walked + begin, total + begin);
      }
    }
  });
  parallel_for(plan.threads, s.row_blocks * s.col_blocks, [&](int64_t i) {
    const int64_t b = i / s.col_blocks, c = i % s.col_blocks;
    if (c == 0) fetch_values(bytes_of_rows(csr, b * plan.rows, plan.rows, size_of(type)), dvalues);
    kern.scatter(type, walk(s, b, c, c + 1), total + s.nnz_offsets[i] * real, dvalues);
  });
}

}  // namespace sk
