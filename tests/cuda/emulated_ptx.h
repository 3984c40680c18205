// csrc/cuda/ptx.cuh for a CPU: the same functions, described there.
#pragma once

#include "emulated.h"

namespace emulated {

// The place of shared bytes, if the block has them and they are aligned to their number.
char* shared_bytes(const char* what, unsigned at, unsigned bytes);

template <class T>
T load(const char* what, unsigned at) {
  T value;
  std::memcpy(&value, shared_bytes(what, at, sizeof(T)), sizeof(T));
  return value;
}

template <class T>
void store(const char* what, unsigned at, const T& value) {
  std::memcpy(shared_bytes(what, at, sizeof(T)), &value, sizeof(T));
}

void begin_copy(unsigned to, const void* from, unsigned bytes);
void commit();
void wait_for_copies(unsigned groups);

struct Matrices {
  unsigned* out;
  unsigned row;
};
struct Mma {
  float* c;
  const unsigned *a, *b;
  unsigned positions;
  bool is_bf16;
  int selector;
};
Run run_load_matrices, run_mma;

}  // namespace emulated

namespace sk {

extern char smem[];

struct bf16;
struct f16;

unsigned shared_address(const void* pointer);

inline unsigned load_shared_u8(unsigned at) {
  return emulated::load<std::uint8_t>("load_shared_u8", at);
}
inline unsigned load_shared_u16(unsigned at) {
  return emulated::load<std::uint16_t>("load_shared_u16", at);
}
inline unsigned load_shared_u32(unsigned at) {
  return emulated::load<unsigned>("load_shared_u32", at);
}
inline uint2 load_shared_v2(unsigned at) { return emulated::load<uint2>("load_shared_v2", at); }
inline uint4 load_shared_v4(unsigned at) { return emulated::load<uint4>("load_shared_v4", at); }
inline void store_shared(unsigned at, uint2 v) { emulated::store("store_shared", at, v); }
inline void store_shared(unsigned at, uint4 v) { emulated::store("store_shared", at, v); }

template <int kBytes>
void copy_async(unsigned to, const void* from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulated::begin_copy(to, from, kBytes);
}

inline void copy_async_if(unsigned to, const void* from, int count, int limit) {
  if (count > limit) emulated::begin_copy(to, from, 16);
}

inline void commit_copies() { emulated::commit(); }

template <int kGroups>
void wait_copies() {
  emulated::wait_for_copies(kGroups);
}

inline void sync_warps(int barrier, int warps) { emulated::wait_for_warps(barrier, warps); }
inline void prefetch_to_l2(const void*) {}
constexpr bool kStartsEarly = true;
inline void let_next_kernel_start() {}
inline void wait_for_last_kernel() { emulated::wait_for_last_kernel(); }

inline void load_matrices_transposed(unsigned (&out)[4], unsigned row) {
  emulated::Matrices mine = {out, row};
  emulated::meet("load_matrices_transposed", emulated::run_load_matrices, &mine, true);
}

template <class T, int kSelector>
void mma_sparse(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned positions) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  static_assert((kBf16 || std::is_same_v<T, f16>) && (kSelector == 0 || kSelector == 1));
  constexpr const char* kName = kBf16 ? (kSelector ? "mma_sparse<bf16, 1>" : "mma_sparse<bf16, 0>")
                                      : (kSelector ? "mma_sparse<f16, 1>" : "mma_sparse<f16, 0>");
  emulated::Mma mine = {c, a, b, positions, kBf16, kSelector};
  emulated::meet(kName, emulated::run_mma, &mine, true);
}

unsigned short round_to_bf16(float value);
unsigned short round_to_f16(float value);
float f16_to_float(unsigned short bits);

}  // namespace sk
