// CUDA C++ on a CPU, for the tests: what csrc/cuda/*.cu need to be compiled by a C++ compiler and
// run by emulated.cpp, one thread at a time.
//
// Blocks run one after the other, and a thread runs until it waits for others: at a barrier, or
// where its warp has to be together. An error ends the launch. What is found:
//
// - barriers and warp instructions that not all threads meet, or meet at different ones;
// - shared memory (dynamic alone: a variable would be each thread's own) used out of bounds, off
//   its alignment, or before it is written: it holds NaNs at first, and again from the start of an
//   asynchronous copy until the thread has waited for it;
// - positions that are no sparse operand of a tensor core;
// - what an early kernel believes of memory that the last kernel has yet to write: backward, a
//   thread that has not waited for that one reads other numbers by __ldcg.
//
// A missing barrier shows where threads run in another order: emu_backward turns it around.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __device__
#define __global__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
using dim3 = uint3;

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulated {

constexpr int kWarp = 32;

// Ends the launch with this text, as printf has it.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// At barrier 0 all threads of the block that live wait for one another; at another one as many
// warps as they say.
void wait_for_warps(unsigned barrier, unsigned warps);

// Waits for all lanes of the warp to come with the same `run` and `name`, then one of them calls
// run with what each has brought; null for one that has exited, which `all` forbids.
using Run = void(void* const (&lanes)[kWarp]);
void meet(const char* name, Run* run, void* mine, bool all);

struct Shuffle {
  std::uint64_t value;
  int from;
  std::uint64_t result;
};
Run run_shuffle, run_nothing;

// Of an early kernel: the last one has ended. Whether what is read was written before that.
void wait_for_last_kernel();
bool reads_early();

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("mask %#x: emulated for whole warps alone", mask);
}

using Kernel = void();  // of any type

class Entry {
 public:
  // Adds itself to the table, while the library is being loaded.
  template <class... T>
  Entry(const char* name, void (*kernel)(T...), bool is_early)
      : Entry(name, reinterpret_cast<Kernel*>(kernel), call<T...>, kSignature<T...>, is_early) {}

  const char* name;
  Kernel* kernel;
  void (*caller)(Kernel* kernel, void** args);
  const char* signature;  // as in launch.cuh
  bool is_early;

 private:
  Entry(const char* name, Kernel* kernel, void (*caller)(Kernel*, void**), const char* signature,
        bool is_early);

  template <class T>
  static constexpr char code() {
    static_assert(std::is_pointer_v<T> || std::is_same_v<T, int>, "as in launch.cuh");
    return std::is_pointer_v<T> ? 'P' : 'i';
  }

  template <class... T>
  static constexpr char kSignature[] = {code<T>()..., '\0'};

  template <class... T>
  static void call(Kernel* kernel, void** args) {
    call_with<T...>(kernel, args, std::index_sequence_for<T...>());
  }

  template <class... T, std::size_t... kIndex>
  static void call_with(Kernel* kernel, void** args, std::index_sequence<kIndex...>) {
    reinterpret_cast<void (*)(T...)>(kernel)(*static_cast<T*>(args[kIndex])...);
  }
};

}  // namespace emulated

#define SK_KERNEL(kernel) static emulated::Entry entry_of_##kernel(#kernel, kernel, false);
#define SK_EARLY_KERNEL(kernel) static emulated::Entry entry_of_##kernel(#kernel, kernel, true);

inline void __syncthreads() { emulated::wait_for_warps(0, 0); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulated::check_mask(mask);
  emulated::meet("__syncwarp", emulated::run_nothing, nullptr, false);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  emulated::check_mask(mask);
  emulated::Shuffle mine = {0, from, 0};
  std::memcpy(&mine.value, &value, sizeof(T));
  emulated::meet("__shfl_sync", emulated::run_shuffle, &mine, false);
  std::memcpy(&value, &mine.result, sizeof(T));
  return value;
}

inline unsigned __ballot_sync(unsigned mask, bool yes) {
  unsigned ballot = 0;
  for (int lane = 0; lane < emulated::kWarp; ++lane) {
    ballot |= __shfl_sync(mask, yes ? 1u : 0u, lane) << lane;
  }
  return ballot;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }

inline void __threadfence() {}

inline int atomicAdd(int* at, int add) {
  const int before = *at;
  *at += add;
  return before;
}

inline unsigned atomicMax(unsigned* at, unsigned value) {
  const unsigned before = *at;
  if (value > before) *at = value;
  return before;
}

template <class T>
T __ldcg(const T* at) {
  return *at;
}
inline int __ldcg(const int* at) { return emulated::reads_early() ? *at * 3 / 2 - 7 : *at; }

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  if (selector & 0x8888) emulated::fail("__byte_perm: selector %#x", selector);
  const std::uint64_t bytes = static_cast<std::uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return result;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
