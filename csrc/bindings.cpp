// The only door between Python and C++: raw pointers, sizes and strides. Knows nothing of torch.
// Shapes and types are checked before (tensors.h, kernels/operands.py); pointers are trusted, but
// for null where something is to be read: a storage that was freed below its tensor. The GIL is
// released in kernels.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bench/bench_loops.h"
#include "calls.h"
#include "common/machine.h"
#include "common/threads.h"
#include "cpu/dense.h"
#include "cpu/few_tokens.h"
#include "cpu/lanes_layout.h"
#include "cpu/packed.h"
#include "cpu/products.h"
#include "dense_product.h"
#include "launch.h"
#include "packing/cover.h"
#include "packing/order.h"
#include "prepared.h"
#include "sparse_product.h"
#include "tensors.h"

namespace py = pybind11;

namespace {

using Pointer = uintptr_t;

template <class T>
T* as(Pointer p) {
  return reinterpret_cast<T*>(p);
}

template <class T>
T* as(Pointer p, const char* name, int64_t size) {
  if (!p && size > 0)
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(size) +
                                " elements, but their memory was freed");
  return as<T>(p);
}

sk::Csr csr(const sk::Pattern& p, Pointer row_offsets, Pointer col_indices,
            int64_t row_version = -1, int64_t col_version = -1) {
  return {as<const int32_t>(row_offsets, "row_offsets", p.n + 1),
          as<const int32_t>(col_indices, "col_indices", p.nnz),
          p.n,
          p.k,
          p.nnz,
          row_version,
          col_version};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of sparsekern over raw pointers";
  if (!sk::add_tensor_functions(m.ptr()) || !sk::add_launch_functions(m.ptr()) ||
      !sk::add_prepared_functions(m.ptr()) || !sk::add_call_functions(m.ptr()) ||
      !sk::add_packed_call_functions(m.ptr()) || !sk::add_sparse_product(m.ptr()) ||
      !sk::add_dense_product(m.ptr()))
    throw py::error_already_set();
  using NoGil = py::call_guard<py::gil_scoped_release>;

  py::enum_<sk::Type>(m, "Type")
      .value("float32", sk::Type::kFloat)
      .value("bfloat16", sk::Type::kBfloat16)
      .value("float64", sk::Type::kDouble);

  py::enum_<sk::Format>(m, "Format")
      .value("bitmap", sk::Format::kBitmap)
      .value("columns", sk::Format::kColumns)
      .value("window64", sk::Format::kWindow64)
      .value("window128", sk::Format::kWindow128)
      .value("columns32", sk::Format::kColumns32);

  py::class_<sk::Plan>(m, "Plan", "How a product is cut.")
      .def(py::init([](int threads, int vecs, int tile_parts, int64_t rows, int64_t cols,
                       int64_t row_parts, int64_t col_parts, bool pairs, bool in_place,
                       bool two_sums) {
             return sk::Plan{threads,   vecs,      tile_parts, rows,     cols,
                             row_parts, col_parts, pairs,      in_place, two_sums};
           }),
           py::kw_only(), py::arg("threads"), py::arg("vecs"), py::arg("tile_parts"),
           py::arg("rows"), py::arg("cols"), py::arg("row_parts"), py::arg("col_parts"),
           py::arg("pairs"), py::arg("in_place"), py::arg("two_sums"));

  m.def("isa", &sk::isa_name, "The instruction set in use.");
  m.def("lanes", [] { return sk::kernels().lanes; }, "Floats in one of its vectors.");
  m.def("cache_bytes", &sk::cache_bytes, "Of a core's L1 data (1) or L2 (2) cache; 0: unknown.");
  m.def("thread_runtime", &sk::thread_runtime, "Whose threads the kernels run on.");

  m.def("multiply_adds", &sk::multiply_adds, NoGil(), "FLOPs done on registers by all threads.");
  m.def(
      "read_memory",
      [](Pointer p, int64_t size, int64_t rounds, int threads) {
        sk::read_memory(as<const float>(p), size, rounds, threads);
      },
      NoGil(), "Reads `size` floats, each thread a part of them, `rounds` times.");
  py::enum_<sk::Step>(m, "Step")
      .value("floats", sk::Step::kFloats)
      .value("pairs", sk::Step::kPairs)
      .value("dots", sk::Step::kDots);
  m.def(
      "multiply_panel",
      [](sk::Step step, Pointer p, int64_t bytes, int64_t rounds) {
        return sk::multiply_panel(step, as<const void>(p), bytes, rounds);
      },
      NoGil(), "FLOPs done with what stands in memory.");
  m.def("has_bf16_dots", &sk::has_bf16_dots, "Whether one instruction sums products of bfloat16.");
  m.def("add_chain", &sk::add_chain, NoGil(), "Additions done, one a cycle.");

  py::class_<sk::Pattern>(m, "Pattern", "What the kernels derive from a CSR pattern, made once.")
      .def(py::init<int64_t, int64_t, int64_t>(), py::arg("n"), py::arg("k"), py::arg("nnz"))
      .def(
          "spmm",
          [](sk::Pattern& p, Pointer row_offsets, Pointer col_indices, int64_t row_version,
             int64_t col_version, sk::Type type, Pointer values, Pointer bias, Pointer x, Pointer y,
             int64_t tokens, bool transposed, const sk::Plan& plan) {
            const int64_t features = transposed ? p.n : p.k, outputs = transposed ? p.k : p.n;
            sk::spmm(p, csr(p, row_offsets, col_indices, row_version, col_version), transposed,
                     type, as<void>(values, "values", p.nnz), as<void>(bias),
                     {as<void>(x, transposed ? "dy" : "x", tokens * features), features},
                     {as<void>(y), outputs}, tokens, plan);
          },
          NoGil(), "y[M, N] = x W^T + bias, or transposed: y[M, K] = x W + bias; contiguous.")
      .def(
          "spmm_few_tokens",
          [](sk::Pattern& p, Pointer row_offsets, Pointer col_indices, int64_t row_version,
             int64_t col_version, sk::Format format, sk::Type type, Pointer values, Pointer bias,
             Pointer x, Pointer y, int64_t tokens, int threads) {
            sk::spmm_few_tokens(p, csr(p, row_offsets, col_indices, row_version, col_version),
                                format, type, as<void>(values, "values", p.nnz), as<void>(bias),
                                {as<void>(x, "x", tokens * p.k), p.k}, {as<void>(y), p.n}, tokens,
                                threads);
          },
          NoGil(), "y[M, N] = x W^T + bias for few tokens; contiguous.")
      .def(
          "spmm_t_few_tokens",
          [](sk::Pattern& p, Pointer row_offsets, Pointer col_indices, int64_t row_version,
             int64_t col_version, sk::Type type, Pointer values, Pointer bias, Pointer dy,
             Pointer y, int64_t tokens, int threads) {
            sk::spmm_t_few_tokens(p, csr(p, row_offsets, col_indices, row_version, col_version),
                                  type, as<void>(values, "values", p.nnz), as<void>(bias),
                                  {as<void>(dy, "dy", tokens * p.n), p.n}, {as<void>(y), p.k},
                                  tokens, threads);
          },
          NoGil(), "y[M, K] = dy W + bias for few tokens; contiguous.")
      .def(
          "sddmm",
          [](sk::Pattern& p, Pointer row_offsets, Pointer col_indices, int64_t row_version,
             int64_t col_version, sk::Type type, Pointer dy, Pointer x, Pointer dvalues,
             int64_t tokens, const sk::Plan& plan) {
            sk::sddmm(p, csr(p, row_offsets, col_indices, row_version, col_version), type,
                      {as<void>(dy, "dy", tokens * p.n), p.n},
                      {as<void>(x, "x", tokens * p.k), p.k}, as<void>(dvalues), tokens, plan);
          },
          NoGil(), "dvalues[nnz] = dy^T x at the non-zeros, in CSR order.")
      .def("kept_bytes", &sk::Pattern::kept_bytes, "Of all that was derived.")
      .def(
          "to_dense",
          [](sk::Pattern& p, Pointer row_offsets, Pointer col_indices, int64_t row_version,
             int64_t col_version, int element_bytes, Pointer values, int64_t row, int64_t rows,
             int64_t col, int64_t cols, Pointer dense, int threads) {
            sk::to_dense(p, csr(p, row_offsets, col_indices, row_version, col_version),
                         element_bytes, as<void>(values, "values", p.nnz), {row, rows}, {col, cols},
                         as<void>(dense), threads);
          },
          NoGil(), "dense[rows, cols] = W from (row, col) on; col is a multiple of 64.")
      .def(
          "from_dense",
          [](sk::Pattern& p, Pointer row_offsets, Pointer col_indices, int64_t row_version,
             int64_t col_version, int element_bytes, Pointer dense, int64_t row, int64_t rows,
             Pointer values, int threads) {
            sk::from_dense(p, csr(p, row_offsets, col_indices, row_version, col_version),
                           element_bytes, as<void>(dense), {row, rows}, as<void>(values), threads);
          },
          NoGil(), "values[nnz] = dense[rows, K] at the non-zeros of the rows from `row` on.");

  py::class_<sk::Cover>(m, "Cover", "W in groups of columns for sparse tensor cores.")
      .def(py::init([](Pointer row_offsets, Pointer col_indices, int64_t n, int64_t k, int64_t nnz,
                       Pointer row_order, int64_t slices, int threads) {
             return new sk::Cover({as<const int32_t>(row_offsets, "row_offsets", n + 1),
                                   as<const int32_t>(col_indices, "col_indices", nnz), n, k, nnz},
                                  as<const int32_t>(row_order), slices, threads);
           }),
           NoGil())
      .def_property_readonly("steps", &sk::Cover::steps)
      .def(
          "write",
          [](const sk::Cover& cover, Pointer step_offsets, Pointer records, Pointer places,
             int value_bytes) {
            cover.write(as<int32_t>(step_offsets), as<uint8_t>(records), as<int64_t>(places),
                        value_bytes);
          },
          NoGil(), "step_offsets, records (zeros before) and places; cover.h has their sizes.");

  py::class_<sk::LanesPack>(m, "Lanes", "W with 16 rows in the lanes of a register.")
      .def(
          py::init([](Pointer row_offsets, Pointer col_indices, int64_t n, int64_t k, int64_t nnz) {
            return new sk::LanesPack({as<const int32_t>(row_offsets, "row_offsets", n + 1),
                                      as<const int32_t>(col_indices, "col_indices", nnz), n, k,
                                      nnz});
          }),
          NoGil())
      .def_property_readonly("steps", [](const sk::LanesPack& w) { return w.part_steps.back(); })
      .def(
          "write",
          [](const sk::LanesPack& w, Pointer part_steps, Pointer heads, Pointer cols,
             Pointer places) {
            std::copy(w.part_steps.begin(), w.part_steps.end(), as<int64_t>(part_steps));
            std::copy(w.heads.begin(), w.heads.end(), as<sk::LanesHead>(heads));
            std::copy(w.cols.begin(), w.cols.end(), as<uint8_t>(cols));
            std::copy(w.places.begin(), w.places.end(), as<int64_t>(places));
          },
          NoGil(), "part_steps, heads, cols and places; cpu/lanes_layout.h has their sizes.");
  m.def(
      "spmm_lanes",
      [](int64_t n, int64_t k, Pointer part_steps, Pointer heads, int64_t steps, Pointer cols,
         sk::Type type, Pointer values, Pointer bias, Pointer x, Pointer y, int64_t tokens,
         int threads) {
        const sk::LanesShape shape{n, k};
        sk::spmm_lanes(shape, as<int64_t>(part_steps, "part_steps", shape.parts() + 1),
                       as<sk::LanesHead>(heads, "heads", shape.blocks() * shape.groups()), steps,
                       as<uint8_t>(cols), type, as<void>(values), as<void>(bias),
                       {as<void>(x, "x", tokens * k), k}, {as<void>(y), n}, tokens, threads);
      },
      NoGil(), "y[M, N] = x W^T + bias of a W in lanes; contiguous.");
  m.def(
      "lanes_to_dense",
      [](int64_t n, int64_t k, Pointer part_steps, Pointer heads, int64_t steps, Pointer cols,
         int element_bytes, Pointer values, Pointer dense, int threads) {
        sk::lanes_to_dense({n, k}, as<int64_t>(part_steps), as<sk::LanesHead>(heads), steps,
                           as<uint8_t>(cols), as<void>(values), element_bytes, as<void>(dense),
                           threads);
      },
      NoGil(), "dense[N, K] = W, on zeros.");
  py::class_<sk::Order>(m, "Order", "One order of the columns of W for 2:4 sparse tensor cores.")
      .def(py::init([](Pointer row_offsets, Pointer col_indices, int64_t n, int64_t k, int64_t nnz,
                       int64_t most_slots) {
             return new sk::Order({as<const int32_t>(row_offsets, "row_offsets", n + 1),
                                   as<const int32_t>(col_indices, "col_indices", nnz), n, k, nnz},
                                  most_slots);
           }),
           NoGil())
      .def_property_readonly("slots", &sk::Order::slots, "0: it would take more than most_slots.")
      .def(
          "write",
          [](const sk::Order& order, Pointer columns, Pointer places) {
            order.write(as<int32_t>(columns), as<int32_t>(places));
          },
          NoGil(), "columns [slots], -1 for none, and places [nnz]: the slot of each entry.");
}
