// Between CSR and dense matrices: for products of many tokens, which torch multiplies. Bytes: those
// of both sides, once.
#include "launch.cuh"
#include "numbers.cuh"

namespace sk {

constexpr int kCsrThreads = 256;
constexpr int kCsrRowBytes = 48 * 1024;  // of shared memory

// w [N, K] = W. A block writes a row, some columns after the other: zeros and values meet in shared
// memory, so that each line of w is written whole and once.
template <class Element>
__device__ void write_out(const int* row_offsets, const int* col_indices, const Element* values,
                          Element* w, int k) {
  constexpr int kColumns = kCsrRowBytes / static_cast<int>(sizeof(Element));
  extern __shared__ __align__(16) char smem[];
  Element* row = reinterpret_cast<Element*>(smem);
  const int end = row_offsets[blockIdx.x + 1];
  Element* out = w + static_cast<long long>(blockIdx.x) * k;
  int i = row_offsets[blockIdx.x] + static_cast<int>(threadIdx.x);
  for (int first = 0; first < k; first += kColumns) {
    const int columns = min(kColumns, k - first);
    for (int c = threadIdx.x; c < columns; c += kCsrThreads) row[c] = 0;
    __syncthreads();
    for (; i < end; i += kCsrThreads) {
      const int c = col_indices[i] - first;
      if (c >= columns) break;
      row[c] = values[i];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < columns; c += kCsrThreads) out[first + c] = row[c];
    __syncthreads();
  }
}

// values [nnz] = w [N, K] at the places of W. A warp takes a row.
template <class Element>
__device__ void collect(const int* row_offsets, const int* col_indices, const Element* w,
                        Element* values, int n, int k) {
  const int row = blockIdx.x * (kCsrThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= n) return;
  const Element* from = w + static_cast<long long>(row) * k;
  const int end = row_offsets[row + 1];
  for (int i = row_offsets[row] + static_cast<int>(threadIdx.x) % kWarp; i < end; i += kWarp) {
    values[i] = from[col_indices[i]];
  }
}

}  // namespace sk

#define SK_CSR(bytes, element)                                                                    \
  extern "C" __global__ void __launch_bounds__(sk::kCsrThreads) sk_csr_write_out_##bytes(         \
      const int* row_offsets, const int* col_indices, const element* values, element* w, int k) { \
    sk::write_out(row_offsets, col_indices, values, w, k);                                        \
  }                                                                                               \
  SK_KERNEL(sk_csr_write_out_##bytes)                                                             \
  extern "C" __global__ void __launch_bounds__(sk::kCsrThreads)                                   \
      sk_csr_collect_##bytes(const int* row_offsets, const int* col_indices, const element* w,    \
                             element* values, int n, int k) {                                     \
    sk::collect(row_offsets, col_indices, w, values, n, k);                                       \
  }                                                                                               \
  SK_KERNEL(sk_csr_collect_##bytes)

SK_CSR(2, unsigned short)
SK_CSR(4, unsigned)
