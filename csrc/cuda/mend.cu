// What mends a product of many tokens whose W has zeros that are not stored: the tokens that an
// infinity or NaN has spoilt, from CSR.
//
// The indices are the caller's, who may write to them at any time. They were checked once (kernels/
// derived.py); here no access leaves its bounds whatever they hold: offsets are held to [0, nnz],
// columns beyond K are passed over.
#include "launch.cuh"
#include "mend.cuh"

namespace sk {

// A row of W: entries [begin, end). Unsigned, as all that steps towards a bound near 2^31.
struct Entries {
  unsigned begin, end;
};

__device__ inline Entries entries_of(const int* row_offsets, unsigned row, int nnz) {
  const int begin = max(0, min(row_offsets[row], nnz));
  const int end = max(begin, min(row_offsets[row + 1], nnz));
  return {static_cast<unsigned>(begin), static_cast<unsigned>(end)};
}

constexpr unsigned kMendColumns = 4096;  // of a sum that is in shared memory

// y [M, N] = x W^T + bias anew, of the tokens that find_spoilt() finds.
template <class T>
__device__ void mend(const int* row_offsets, const int* col_indices,
                     const typename Float<T>::Element* values, const typename Float<T>::Element* x,
                     const typename Float<T>::Element* bias, typename Float<T>::Element* y, int m,
                     int n, int k, int nnz, int checked) {
  using F = Float<T>;
  wait_for_last_kernel();
  const auto sum_part = [&](unsigned row, const typename F::Element* from, unsigned lane) {
    const Entries entries = entries_of(row_offsets, row, nnz);
    typename F::Sum sum = 0;
    for (unsigned i = entries.begin + lane; i < entries.end; i += kWarp) {
      const unsigned col = col_indices[i];
      if (col < static_cast<unsigned>(k)) sum += F::load(values[i]) * F::load(from[col]);
    }
    return sum;
  };
  mend_tokens<T>(x, bias, y, m, n, k, checked, sum_part);
}

// dx [M, K] = dy W + bias anew, as mend(). The columns of a row are different ones, so a block adds
// row after row to sums in shared memory, some columns after the other.
template <class T>
__device__ void mend_t(const int* row_offsets, const int* col_indices,
                       const typename Float<T>::Element* values,
                       const typename Float<T>::Element* dy, const typename Float<T>::Element* bias,
                       typename Float<T>::Element* dx, int m, int n, int k, int nnz, int checked) {
  using F = Float<T>;
  extern __shared__ __align__(16) char smem[];
  auto sums = reinterpret_cast<typename F::Sum*>(smem);
  int* spoilt = reinterpret_cast<int*>(sums + kMendColumns);
  wait_for_last_kernel();
  const Tokens tokens = tokens_of_block(m);
  if (!find_spoilt<T>(dx, tokens, k, checked, spoilt)) return;
  for (unsigned t = 0; t < tokens.count; ++t) {
    if (!spoilt[t]) continue;
    const long long token = tokens.first + t;
    for (unsigned first = 0; first < static_cast<unsigned>(k); first += kMendColumns) {
      const unsigned columns = min(kMendColumns, k - first);
      for (unsigned c = threadIdx.x; c < columns; c += kMendThreads) sums[c] = 0;
      __syncthreads();
      for (unsigned row = 0; row < static_cast<unsigned>(n); ++row) {
        const Entries entries = entries_of(row_offsets, row, nnz);
        const typename F::Sum factor = F::load(dy[token * n + row]);
        for (unsigned i = entries.begin + threadIdx.x; i < entries.end; i += kMendThreads) {
          const unsigned c = col_indices[i] - first;
          if (c < columns) sums[c] += F::load(values[i]) * factor;
        }
        __syncthreads();
      }
      for (unsigned c = threadIdx.x; c < columns; c += kMendThreads) {
        dx[token * k + first + c] = F::round(bias ? sums[c] + F::load(bias[first + c]) : sums[c]);
      }
      __syncthreads();
    }
  }
}

}  // namespace sk

#define SK_MEND(name, function, type, element)                                                 \
  extern "C" __global__ void __launch_bounds__(sk::kMendThreads) name(                         \
      const int* row_offsets, const int* col_indices, const element* values, const element* x, \
      const element* bias, element* y, int m, int n, int k, int nnz, int checked) {            \
    sk::function<type>(row_offsets, col_indices, values, x, bias, y, m, n, k, nnz, checked);   \
  }                                                                                            \
  SK_EARLY_KERNEL(name)

SK_MEND(sk_mend_bf16, mend, sk::bf16, unsigned short)
SK_MEND(sk_mend_f16, mend, sk::f16, unsigned short)
SK_MEND(sk_mend_f32, mend, float, float)
SK_MEND(sk_mend_f64, mend, double, double)
SK_MEND(sk_mend_t_bf16, mend_t, sk::bf16, unsigned short)
SK_MEND(sk_mend_t_f16, mend_t, sk::f16, unsigned short)
SK_MEND(sk_mend_t_f32, mend_t, float, float)
SK_MEND(sk_mend_t_f64, mend_t, double, double)
