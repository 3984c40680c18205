// The table of the kernels in this library, and what a source file does to be in it.
//
// A .cu file here is compiled by two compilers: by nvcc into `_sk_cuda.so`, and, where that library
// is missing, by NVRTC at first use (sparsekern/kernels/cuda_library.py, which launches on both
// routes). So it holds device code that includes no host header, and no launchers. It is written
// so:
//
//   #include "launch.cuh"
//   ...                                  // templates; names stay unmangled only as extern "C"
//   #define SK_GATHER(name, type, deltas)                        // the backslash that ends each
//     extern "C" __global__ void name(const type* values, int n) {  // line but the last is left
//     out
//       gather<type, deltas>(values, n);
//     }
//     SK_KERNEL(name)
//   SK_GATHER(sk_spmm_gather_bf16_d4, bf16, 4)
//
// Rules:
// - SK_KERNEL(name) follows the definition, at namespace scope. A kernel without it is not found.
// - The name begins with `sk_` and the name of its file: spmm_gather.cu holds sk_spmm_gather_*. By
//   this the NVRTC route knows which file to compile.
// - Parameters are pointers and ints (32 bits). Python checks their number and ranges against the
//   signature that this table keeps.
// - Shared memory that is larger than 48 KB must be dynamic (`extern __shared__`); its size is
// given
//   at the launch, and the kernel's limit on the current device is raised when it first needs it.
#pragma once

#ifdef __CUDACC_RTC__

#define SK_KERNEL(kernel)

#else

#include <atomic>
#include <type_traits>

namespace sk {

// Python's struct codes: P a pointer, i an int.
template <class T>
constexpr char parameter_code() {
  static_assert(std::is_pointer_v<T> || std::is_same_v<T, int>,
                "a kernel's parameters are pointers and ints: nothing else can be passed");
  return std::is_pointer_v<T> ? 'P' : 'i';
}

template <class... T>
inline constexpr char kSignature[] = {parameter_code<T>()..., '\0'};

constexpr int kMaxDevices = 64;

struct KernelEntry {
  // Adds itself to the table, while the library is being loaded.
  template <class... T>
  KernelEntry(const char* name, void (*kernel)(T...))
      : KernelEntry(name, reinterpret_cast<const void*>(kernel), kSignature<T...>) {}

  KernelEntry(const char* name, const void* kernel, const char* signature);

  const char* name;
  const void* kernel;
  const char* signature;
  std::atomic<unsigned> smem_limit_bytes[kMaxDevices] = {};  // 0: the 48 KB of every kernel
};

}  // namespace sk

#define SK_KERNEL(kernel) static sk::KernelEntry entry_of_##kernel(#kernel, kernel);

#endif
