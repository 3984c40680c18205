// The table of the kernels in this library, and what a source file does to be in it.
//
// A .cu file here is compiled by two compilers: by nvcc into `_sk_cuda.so`, and, where that library
// is missing, by NVRTC at first use. sparsekern/kernels/cuda/library.py launches on both routes. So
// a file holds device code that includes no host header, and no launchers:
//
//   #include "launch.cuh"
//   template <int kDeltaBits> __device__ void gather(const uint16_t* values, int n) { ... }
//   extern "C" __global__ void sk_spmm_gather_bf16_d4(const uint16_t* values, int n) {
//     gather<4>(values, n);
//   }
//   SK_KERNEL(sk_spmm_gather_bf16_d4)
//
// The last four lines may be what a macro expands to. Rules:
// - SK_KERNEL(name) follows the definition, at namespace scope. A kernel without it is not found.
// - SK_EARLY_KERNEL(name) in its place lets the kernel start before the last one of its stream has
//   ended (on sm_90 and later, built with nvcc). It calls wait_for_last_kernel() before it reads or
//   writes anything; before that it may only prefetch.
// - The name begins with `sk_` and the name of its file: spmm_gather.cu holds sk_spmm_gather_*. By
//   this the NVRTC route knows which file to compile.
// - Parameters are pointers and ints. Python checks arguments against the signature kept here.
// - Shared memory of more than 48 KB must be dynamic (`extern __shared__`). A launch gives its
//   size, and raises the kernel's limit on the current device where it has to.
#pragma once

#ifdef __CUDACC_RTC__

#define SK_KERNEL(kernel)
#define SK_EARLY_KERNEL(kernel)

// The types that <cstdint> would declare.
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;

#elif !defined(SK_KERNEL)  // the tests' emulator has its own

#include <atomic>
#include <cstdint>
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
  KernelEntry(const char* name, void (*kernel)(T...), bool is_early)
      : KernelEntry(name, reinterpret_cast<const void*>(kernel), kSignature<T...>, is_early) {}

  KernelEntry(const char* name, const void* kernel, const char* signature, bool is_early);

  const char* name;
  const void* kernel;
  const char* signature;
  bool is_early;
  std::atomic<unsigned> smem_limit_bytes[kMaxDevices] = {};  // 0: the 48 KB of every kernel
};

}  // namespace sk

#define SK_KERNEL(kernel) static sk::KernelEntry entry_of_##kernel(#kernel, kernel, false);
#define SK_EARLY_KERNEL(kernel) static sk::KernelEntry entry_of_##kernel(#kernel, kernel, true);

#endif
