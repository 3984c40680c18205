// Between CSR and dense matrices: for products of many tokens, which torch multiplies. Bytes: those
// of both sides, once.
//
// The indices are the caller's, who may write to them at any time. They were checked once (kernels/
// derived.py); here no access leaves its bounds whatever they hold: offsets are held to [0, nnz],
// columns beyond K are passed over.
#include "launch.cuh"
#include "mend.cuh"

namespace sk {

constexpr unsigned kCsrThreads = kMendThreads, kCsrWarps = kMendWarps;
constexpr unsigned kCsrRowBytes = 48 * 1024;  // of shared memory

// A row of W: entries [begin, end). Unsigned, as all that steps towards a bound near 2^31.
struct Entries {
  unsigned begin, end;
};

__device__ inline Entries entries_of(const int* row_offsets, unsigned row, int nnz) {
  const int begin = max(0, min(row_offsets[row], nnz));
  const int end = max(begin, min(row_offsets[row + 1], nnz));
  return {static_cast<unsigned>(begin), static_cast<unsigned>(end)};
}

// w [N, K] = W. A block writes a row, some columns after the other: zeros and values meet in shared
// memory, so that each line of w is written whole and once.
template <class Element>
__device__ void write_out(const int* row_offsets, const int* col_indices, const Element* values,
                          Element* w, int k, int nnz) {
  constexpr unsigned kColumns = kCsrRowBytes / sizeof(Element);
  extern __shared__ __align__(16) char smem[];
  Element* row = reinterpret_cast<Element*>(smem);
  const Entries entries = entries_of(row_offsets, blockIdx.x, nnz);
  Element* out = w + static_cast<long long>(blockIdx.x) * k;
  unsigned i = entries.begin + threadIdx.x;
  for (unsigned first = 0; first < static_cast<unsigned>(k); first += kColumns) {
    const unsigned columns = min(kColumns, k - first);
    for (unsigned c = threadIdx.x; c < columns; c += kCsrThreads) row[c] = 0;
    __syncthreads();
    for (; i < entries.end; i += kCsrThreads) {
      const int col = col_indices[i];
      if (col >= static_cast<int>(first + columns)) break;
      if (col >= static_cast<int>(first)) row[col - first] = values[i];
    }
    __syncthreads();
    for (unsigned c = threadIdx.x; c < columns; c += kCsrThreads) out[first + c] = row[c];
    __syncthreads();
  }
}

// values [nnz] = w [N, K] at the places of W. A warp takes a row.
template <class Element>
__device__ void collect(const int* row_offsets, const int* col_indices, const Element* w,
                        Element* values, int n, int k, int nnz) {
  const unsigned row = blockIdx.x * kCsrWarps + threadIdx.x / kWarp;
  if (row >= static_cast<unsigned>(n)) return;
  const Element* from = w + static_cast<long long>(row) * k;
  const Entries entries = entries_of(row_offsets, row, nnz);
  for (unsigned i = entries.begin + threadIdx.x % kWarp; i < entries.end; i += kWarp) {
    const unsigned col = col_indices[i];
    values[i] = col < static_cast<unsigned>(k) ? from[col] : Element(0);
  }
}

constexpr unsigned kMendColumns = 4096;  // of a sum that is in shared memory

// y [M, N] = x W^T + bias anew, of the tokens that find_spoilt() finds.
template <class T>
__device__ void mend(const int* row_offsets, const int* col_indices,
                     const typename Float<T>::Element* values, const typename Float<T>::Element* x,
                     const typename Float<T>::Element* bias, typename Float<T>::Element* y, int m,
                     int n, int k, int nnz) {
  using F = Float<T>;
  const auto sum_part = [&](unsigned row, const typename F::Element* from, unsigned lane) {
    const Entries entries = entries_of(row_offsets, row, nnz);
    typename F::Sum sum = 0;
    for (unsigned i = entries.begin + lane; i < entries.end; i += kWarp) {
      const unsigned col = col_indices[i];
      if (col < static_cast<unsigned>(k)) sum += F::load(values[i]) * F::load(from[col]);
    }
    return sum;
  };
  mend_tokens<T>(x, bias, y, m, n, k, sum_part);
}

// dx [M, K] = dy W + bias anew, as mend(). The columns of a row are different ones, so a block adds
// row after row to sums in shared memory, some columns after the other.
template <class T>
__device__ void mend_t(const int* row_offsets, const int* col_indices,
                       const typename Float<T>::Element* values,
                       const typename Float<T>::Element* dy, const typename Float<T>::Element* bias,
                       typename Float<T>::Element* dx, int m, int n, int k, int nnz) {
  using F = Float<T>;
  extern __shared__ __align__(16) char smem[];
  auto sums = reinterpret_cast<typename F::Sum*>(smem);
  int* spoilt = reinterpret_cast<int*>(sums + kMendColumns);
  find_spoilt<T>(dx, m, k, spoilt);
  for (unsigned t = 0; t < kCsrWarps; ++t) {
    if (!spoilt[t]) continue;
    const long long token = static_cast<long long>(blockIdx.x) * kCsrWarps + t;
    for (unsigned first = 0; first < static_cast<unsigned>(k); first += kMendColumns) {
      const unsigned columns = min(kMendColumns, k - first);
      for (unsigned c = threadIdx.x; c < columns; c += kCsrThreads) sums[c] = 0;
      __syncthreads();
      for (unsigned row = 0; row < static_cast<unsigned>(n); ++row) {
        const Entries entries = entries_of(row_offsets, row, nnz);
        const typename F::Sum factor = F::load(dy[token * n + row]);
        for (unsigned i = entries.begin + threadIdx.x; i < entries.end; i += kCsrThreads) {
          const unsigned c = col_indices[i] - first;
          if (c < columns) sums[c] += F::load(values[i]) * factor;
        }
        __syncthreads();
      }
      for (unsigned c = threadIdx.x; c < columns; c += kCsrThreads) {
        dx[token * k + first + c] = F::round(bias ? sums[c] + F::load(bias[first + c]) : sums[c]);
      }
      __syncthreads();
    }
  }
}

}  // namespace sk

#define SK_CSR(bytes, element)                                                                 \
  extern "C" __global__ void __launch_bounds__(sk::kCsrThreads)                                \
      sk_csr_write_out_##bytes(const int* row_offsets, const int* col_indices,                 \
                               const element* values, element* w, int k, int nnz) {            \
    sk::write_out(row_offsets, col_indices, values, w, k, nnz);                                \
  }                                                                                            \
  SK_KERNEL(sk_csr_write_out_##bytes)                                                          \
  extern "C" __global__ void __launch_bounds__(sk::kCsrThreads)                                \
      sk_csr_collect_##bytes(const int* row_offsets, const int* col_indices, const element* w, \
                             element* values, int n, int k, int nnz) {                         \
    sk::collect(row_offsets, col_indices, w, values, n, k, nnz);                               \
  }                                                                                            \
  SK_KERNEL(sk_csr_collect_##bytes)

SK_CSR(2, unsigned short)
SK_CSR(4, unsigned)
SK_CSR(8, unsigned long long)

#define SK_CSR_MEND(name, function, type, element)                                            \
  extern "C" __global__ void __launch_bounds__(sk::kCsrThreads)                               \
      name(const int* row_offsets, const int* col_indices, const element* values,             \
           const element* x, const element* bias, element* y, int m, int n, int k, int nnz) { \
    sk::function<type>(row_offsets, col_indices, values, x, bias, y, m, n, k, nnz);           \
  }                                                                                           \
  SK_KERNEL(name)

SK_CSR_MEND(sk_csr_mend_bf16, mend, sk::bf16, unsigned short)
SK_CSR_MEND(sk_csr_mend_f16, mend, sk::f16, unsigned short)
SK_CSR_MEND(sk_csr_mend_f32, mend, float, float)
SK_CSR_MEND(sk_csr_mend_f64, mend, double, double)
SK_CSR_MEND(sk_csr_mend_t_bf16, mend_t, sk::bf16, unsigned short)
SK_CSR_MEND(sk_csr_mend_t_f16, mend_t, sk::f16, unsigned short)
SK_CSR_MEND(sk_csr_mend_t_f32, mend_t, float, float)
SK_CSR_MEND(sk_csr_mend_t_f64, mend_t, double, double)
