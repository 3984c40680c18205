// Cuts the tokens into tiles and W into blocks, shares them out to threads, and calls the leaf
// loops. Every output element is summed by one thread in one order, so the result depends neither
// on the number of threads nor on their timing.
#include "products.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__unix__)
#include <unistd.h>
#endif

#include "threads.h"

namespace sk {
namespace {

constexpr int64_t kPackChunk = 256;      // features that one task packs
constexpr int64_t kSmallWork = 1 << 18;  // multiply-adds below which a second thread costs more

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

int64_t l1_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const int64_t size = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (size > 0) return size;
#endif
  return 32768;
}

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

struct Plan {
  int threads;
  int vecs;            // of a full tile
  int64_t rows, cols;  // of a block
};

// Sizes found by measurement (docs/LOG.md). W has n rows, k columns and this density.
// - A wide tile reads fewer values of W per multiply-add, a narrow one moves fewer accumulators per
//   segment: with 16 lanes the second matters more below a density of 0.18, except in SDDMM, whose
//   reduction a wide tile shares among more tokens.
// - A column block of x fits L1, or a little more where few of its rows are read.
// - A row block's y panel takes 192 KiB of L2. Where threads share the rows of a tile there are at
//   least two blocks for each thread.
Plan make_plan(int64_t n, int64_t k, int64_t nnz, int64_t tokens, int lanes, int threads,
               bool is_sddmm) {
  const double density = static_cast<double>(nnz) / std::max<int64_t>(1, n * k);
  Plan plan;
  plan.threads = tokens * nnz < kSmallWork ? 1 : std::max(1, threads);
  plan.vecs = fitting_vecs(tokens, lanes, lanes < 16 || is_sddmm || density > 0.18 ? 8 : 4);
  const int64_t row_bytes = plan.vecs * lanes * sizeof(float);
  const int64_t x_bytes = l1_bytes() * (density > 0.15 ? 3 : density > 0.04 ? 5 : 8) / 4;
  plan.cols = std::clamp<int64_t>(x_bytes / row_bytes, 16, 65536);
  const int64_t most_rows = std::min<int64_t>(196608 / row_bytes, 65536);
  const bool shares_rows =
      is_sddmm || cut_tokens(tokens, lanes, plan.vecs).size() % plan.threads != 0;
  const int64_t least_blocks = plan.threads > 1 && shares_rows ? 2 * plan.threads : 1;
  const int64_t blocks = std::max((n + most_rows - 1) / most_rows, least_blocks);
  plan.rows = std::max<int64_t>(1, (n + blocks - 1) / blocks);
  return plan;
}

Walk walk(const Schedule& s, int64_t block) {
  const int64_t first = s.nnz_offsets[block];
  return {s.runs.data(),
          s.run_offsets.data() + block * s.col_blocks,
          s.col_blocks,
          s.cols_per_block,
          s.nnz_offsets[block + 1] - first,
          s.row.data(),
          s.start.data(),
          s.cols.data() + first,
          s.source.empty() ? nullptr : s.source.data() + first};
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
          Matrix x, Matrix y, int64_t tokens, int threads) {
  const Kernels& kern = kernels();
  const int64_t n = transposed ? csr.k : csr.n, k = transposed ? csr.n : csr.k;
  const Plan plan = make_plan(n, k, csr.nnz, tokens, kern.lanes, threads, false);

  // Lets leaf(first row, rows, y panel) compute a row block of a tile, and writes it to y.
  auto write_block = [&](const Tile& t, int64_t b, const auto& leaf) {
    const int64_t first = b * plan.rows, rows = std::min(plan.rows, n - first);
    float* panel = y_scratch.floats(rows * t.vecs * kern.lanes);
    leaf(first, rows, panel);
    kern.unpack(type, panel, t.vecs, t.tokens, rows, at(y, type, t.first, first));
  };

  // So few tokens would not pay for a gather; CSR in its own order streams best.
  if (!transposed && tokens <= 2 * kern.lanes) {
    for_tiles(kern, type, x, k, tokens, plan, (n + plan.rows - 1) / plan.rows,
              [&](const Tile& t, const float* x_panel, int64_t b) {
                write_block(t, b, [&](int64_t first, int64_t rows, float* y_panel) {
                  const Csr part{csr.row_offsets + first, csr.col_indices, rows, k, csr.nnz};
                  kern.spmm_csr(type, t.vecs, part, values, x_panel, y_panel);
                });
              });
    return;
  }

  const auto schedule = pattern.schedule(csr, transposed, plan.rows, plan.cols, plan.threads);
  const Schedule& s = *schedule;
  float* walked = w_scratch.floats(csr.nnz);
  parallel_for(plan.threads, s.row_blocks, [&](int64_t b) {
    kern.gather(type, walk(s, b), values, walked + s.nnz_offsets[b]);
  });
  for_tiles(kern, type, x, k, tokens, plan, s.row_blocks,
            [&](const Tile& t, const float* x_panel, int64_t b) {
              write_block(t, b, [&](int64_t, int64_t, float* y_panel) {
                kern.spmm(t.vecs, walk(s, b), walked + s.nnz_offsets[b], x_panel, y_panel);
              });
            });
}

void sddmm(Pattern& pattern, const Csr& csr, Type type, Matrix dy, Matrix x, void* dvalues,
           int64_t tokens, int threads) {
  const Kernels& kern = kernels();
  const Plan plan = make_plan(csr.n, csr.k, csr.nnz, tokens, kern.lanes, threads, true);
  const auto schedule = pattern.schedule(csr, false, plan.rows, plan.cols, plan.threads);
  const Schedule& s = *schedule;

  float* walked = w_scratch.floats(csr.nnz);
  if (tokens == 0) std::fill_n(walked, csr.nnz, 0.0f);
  for (const Tile& t : cut_tokens(tokens, kern.lanes, plan.vecs)) {
    const int64_t width = t.vecs * kern.lanes;
    float* x_panel = x_scratch.floats(csr.k * width);
    pack(kern, type, x, t, csr.k, x_panel, plan.threads);
    parallel_for(plan.threads, s.row_blocks, [&](int64_t b) {
      const int64_t first = b * plan.rows, rows = std::min(plan.rows, csr.n - first);
      float* dy_panel = y_scratch.floats(rows * width);
      pack(kern, type, at(dy, type, 0, first), t, rows, dy_panel, 1);
      kern.sddmm(t.vecs, walk(s, b), dy_panel, x_panel, t.first > 0, walked + s.nnz_offsets[b]);
    });
  }
  parallel_for(plan.threads, s.row_blocks, [&](int64_t b) {
    kern.scatter(type, walk(s, b), walked + s.nnz_offsets[b], dvalues);
  });
}

}  // namespace sk
