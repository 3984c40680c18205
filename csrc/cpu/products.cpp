// Cuts the tokens into tiles and W into blocks, shares them out to threads, and calls the leaf
// loops. Every output element is summed by one thread in one order, so the result depends neither
// on the number of threads nor on their timing.
#include "products.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "threads.h"

namespace sk {
namespace {

constexpr int64_t kPackChunk = 256;  // features that one task packs

// Grow-only scratch memory of one thread, on page boundaries.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* floats(int64_t size) {
    if (size > size_) {
      std::free(data_);
      size_ = 0;
      const size_t bytes = (static_cast<size_t>(size) * sizeof(float) + 4095) / 4096 * 4096;
      data_ = static_cast<float*>(std::aligned_alloc(4096, bytes));
      if (!data_) throw std::bad_alloc();
      size_ = size;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

thread_local Scratch x_scratch, y_scratch, w_scratch;

// Up to a panel's width of tokens.
struct Tile {
  int64_t first, tokens;
  int vecs;
};

// A narrow tile costs more per token than a wide one, so what is left over takes the largest vector
// count of which it fills more than three quarters.
int fitting_vecs(int64_t tokens, int lanes, int vecs) {
  while (vecs > 1 && tokens <= vecs * lanes * 3 / 4) vecs /= 2;
  return vecs;
}

std::vector<Tile> cut_tokens(int64_t tokens, int lanes, int most_vecs) {
  std::vector<Tile> tiles;
  for (int64_t first = 0; first < tokens; first += tiles.back().tokens) {
    const int vecs = fitting_vecs(tokens - first, lanes, most_vecs);
    tiles.push_back({first, std::min<int64_t>(tokens - first, vecs * lanes), vecs});
  }
  return tiles;
}

// What a row block holds in the column blocks [first, end).
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

Matrix at(Matrix m, Type type, int64_t row, int64_t col) {
  m.data = static_cast<char*>(m.data) + (row * m.stride + col) * size_of(type);
  return m;
}

// Packs a tile's features, shared out to the threads.
void pack(const Kernels& kern, Type type, Matrix x, const Tile& t, int64_t features, float* panel,
          int threads) {
  const int64_t chunk = threads > 1 ? kPackChunk : std::max<int64_t>(1, features);
  parallel_for(threads, (features + chunk - 1) / chunk, [&](int64_t i) {
    const int64_t c = i * chunk;
    kern.pack(type, at(x, type, t.first, c), t.tokens, std::min(chunk, features - c), t.vecs,
              panel + c * t.vecs * kern.lanes);
  });
}

// Calls multiply(tile, panel, block) for every tile of x, packed, and every row block.
// As many tiles as the threads share evenly are taken whole, one thread each, while their panel is
// in its L2; the row blocks of the remaining tiles are shared out.
template <class F>
void for_tiles(const Kernels& kern, Type type, Matrix x, int64_t features, int64_t tokens,
               const Plan& plan, int64_t row_blocks, const F& multiply) {
  const std::vector<Tile> tiles = cut_tokens(tokens, kern.lanes, plan.vecs);
  const int64_t count = static_cast<int64_t>(tiles.size()), whole = count - count % plan.threads;
  parallel_for(plan.threads, whole, [&](int64_t i) {
    float* panel = x_scratch.floats(features * tiles[i].vecs * kern.lanes);
    pack(kern, type, x, tiles[i], features, panel, 1);
    for (int64_t b = 0; b < row_blocks; b++) multiply(tiles[i], panel, b);
  });
  for (int64_t i = whole; i < count; i++) {
    float* panel = x_scratch.floats(features * tiles[i].vecs * kern.lanes);
    pack(kern, type, x, tiles[i], features, panel, plan.threads);
    parallel_for(plan.threads, row_blocks, [&](int64_t b) { multiply(tiles[i], panel, b); });
  }
}

}  // namespace

void spmm(Pattern& pattern, const Csr& csr, bool transposed, Type type, const void* values,
          const void* bias, Matrix x, Matrix y, int64_t tokens, const Plan& plan) {
  const Kernels& kern = kernels();
  const int64_t n = transposed ? csr.k : csr.n, k = transposed ? csr.n : csr.k;
  const auto schedule = pattern.schedule(csr, transposed, plan.rows, plan.cols);
  const Schedule& s = *schedule;
  float* walked = w_scratch.floats(csr.nnz + n);
  float* start = walked + csr.nnz;
  bias ? kern.widen(type, bias, n, start) : void(std::fill_n(start, n, 0.0f));
  parallel_for(plan.threads, s.row_blocks, [&](int64_t b) {
    kern.gather(type, walk(s, b), values, walked + nnz_before(s, b));
  });
  for_tiles(kern, type, x, k, tokens, plan, s.row_blocks,
            [&](const Tile& t, const float* x_panel, int64_t b) {
              const int64_t first = b * plan.rows, rows = std::min(plan.rows, n - first);
              float* y_panel = y_scratch.floats(rows * t.vecs * kern.lanes);
              kern.spmm(t.vecs, walk(s, b), walked + nnz_before(s, b), start + first, x_panel,
                        y_panel);
              kern.unpack(type, y_panel, t.vecs, t.tokens, rows, at(y, type, t.first, first));
            });
}

// A thread takes row blocks, packing their dy while it is at it. Where these are too few to go
// round, all of dy is packed first and a task is a part of the column blocks too.
void sddmm(Pattern& pattern, const Csr& csr, Type type, Matrix dy, Matrix x, void* dvalues,
           int64_t tokens, const Plan& plan) {
  const Kernels& kern = kernels();
  const auto schedule = pattern.schedule(csr, false, plan.rows, plan.cols);
  const Schedule& s = *schedule;
  int64_t parts = 1;
  if (plan.threads > 1 && s.row_blocks < 2 * plan.threads)
    parts = std::min(s.col_blocks, 3 * plan.threads / std::max<int64_t>(1, s.row_blocks) + 1);

  float* walked = w_scratch.floats(csr.nnz);
  if (tokens == 0) std::fill_n(walked, csr.nnz, 0.0f);
  for (const Tile& t : cut_tokens(tokens, kern.lanes, plan.vecs)) {
    const int64_t width = t.vecs * kern.lanes;
    float* x_panel = x_scratch.floats((csr.k + (parts > 1 ? csr.n : 0)) * width);
    float* all_dy = x_panel + csr.k * width;
    pack(kern, type, x, t, csr.k, x_panel, plan.threads);
    if (parts > 1) pack(kern, type, dy, t, csr.n, all_dy, plan.threads);
    parallel_for(plan.threads, s.row_blocks * parts, [&](int64_t task) {
      const int64_t b = task / parts, part = task % parts;
      const int64_t first = b * plan.rows, rows = std::min(plan.rows, csr.n - first);
      const int64_t c0 = part * s.col_blocks / parts, c1 = (part + 1) * s.col_blocks / parts;
      float* dy_panel = all_dy + first * width;
      if (parts == 1) {
        dy_panel = y_scratch.floats(rows * width);
        pack(kern, type, at(dy, type, 0, first), t, rows, dy_panel, 1);
      }
      kern.sddmm(t.vecs, walk(s, b, c0, c1), dy_panel, x_panel + c0 * s.cols_per_block * width,
                 t.first > 0, walked + nnz_before(s, b, c0));
    });
  }
  parallel_for(plan.threads, s.row_blocks, [&](int64_t b) {
    kern.scatter(type, walk(s, b), walked + nnz_before(s, b), dvalues);
  });
}

}  // namespace sk
