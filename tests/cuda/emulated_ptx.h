// csrc/cuda/ptx.cuh and warpgroups.cuh for a CPU: the same functions, described there.
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
void init_barrier(unsigned barrier, unsigned count);
void arrive_at(unsigned barrier);
void copy_bulk(unsigned to, const void* from, unsigned bytes, unsigned barrier);
void wait_barrier(unsigned barrier, unsigned phase);

struct Matrices {
  unsigned* out;
  unsigned row;
};
struct DenseMma {
  float* c;
  const unsigned* a;
  unsigned b[2];
  bool is_bf16;
};
struct GroupMma {
  float* c;  // [tiles][4]
  int tiles;
  const unsigned* a;
  unsigned long long b;
  bool is_bf16;
};
struct SparseMma {
  float* c;
  const unsigned *a, *b;
  unsigned positions;
  bool is_bf16;
  int selector;
};
Run run_load_matrices, run_load_matrices_transposed, run_mma, run_mma_group, run_mma_sparse;

// Whether has_warpgroups().
extern bool warpgroups;

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
inline void load_shared_if(unsigned& word, unsigned at, unsigned condition) {
  word = condition ? emulated::load<unsigned>("load_shared_if", at) : 0;
}
inline void load_shared_u16_if(unsigned& half, unsigned at, unsigned condition) {
  half = condition ? emulated::load<std::uint16_t>("load_shared_u16_if", at) : 0;
}
inline unsigned dot_bytes(unsigned a, unsigned b, unsigned add) {
  for (int i = 0; i < 32; i += 8) add += (a >> i & 0xff) * (b >> i & 0xff);
  return add;
}
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

inline bool has_warpgroups() { return emulated::warpgroups; }
inline void init_barrier(unsigned barrier, unsigned count = 1) {
  emulated::init_barrier(barrier, count);
}
inline void arrive_at(unsigned barrier) { emulated::arrive_at(barrier); }
inline void copy_bulk(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
  emulated::copy_bulk(to, from, bytes, barrier);
}
inline void wait_barrier(unsigned barrier, unsigned phase) {
  emulated::wait_barrier(barrier, phase);
}

inline void sync_warps(int barrier, int warps) { emulated::wait_for_warps(barrier, warps); }
inline void prefetch_to_l2(const void*) {}
constexpr bool kStartsEarly = true;
inline void let_next_kernel_start() {}
inline void wait_for_last_kernel() { emulated::wait_for_last_kernel(); }

inline void load_matrices(unsigned (&out)[4], unsigned row) {
  emulated::Matrices mine = {out, row};
  emulated::meet("load_matrices", emulated::run_load_matrices, &mine, true);
}

inline void load_matrices_transposed(unsigned (&out)[4], unsigned row) {
  emulated::Matrices mine = {out, row};
  emulated::meet("load_matrices_transposed", emulated::run_load_matrices_transposed, &mine, true);
}

template <class T>
void mma(float (&c)[4], const unsigned* a, unsigned b0, unsigned b1) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  static_assert(kBf16 || std::is_same_v<T, f16>);
  emulated::DenseMma mine = {c, a, {b0, b1}, kBf16};
  emulated::meet(kBf16 ? "mma<bf16>" : "mma<f16>", emulated::run_mma, &mine, true);
}

inline void require_warpgroups() {
  if (!emulated::warpgroups) emulated::fail("require_warpgroups: there are none");
}
inline void publish_to_warpgroups() {}
inline void begin_warpgroup_products() {}
inline void commit_warpgroup_products() {}
template <int kGroups>
void wait_warpgroup_products() {}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

// As warpgroups.cuh has it: rows, the distance of eight of them, and the pattern of 128 bytes.
inline unsigned long long describe_rows(unsigned at) {
  return (at & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// At once, and each warp for itself: its rows of c depend on no other warp.
template <class T, int kNTiles>
void mma_warpgroup(float (&c)[kNTiles][4], const unsigned* a, unsigned long long b) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  static_assert(kBf16 || std::is_same_v<T, f16>);
  emulated::GroupMma mine = {c[0], kNTiles, a, b, kBf16};
  emulated::meet(kBf16 ? "mma_warpgroup<bf16>" : "mma_warpgroup<f16>", emulated::run_mma_group,
                 &mine, true);
}

template <class T, int kSelector>
void mma_sparse(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned positions) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  static_assert((kBf16 || std::is_same_v<T, f16>) && (kSelector == 0 || kSelector == 1));
  constexpr const char* kName = kBf16 ? (kSelector ? "mma_sparse<bf16, 1>" : "mma_sparse<bf16, 0>")
                                      : (kSelector ? "mma_sparse<f16, 1>" : "mma_sparse<f16, 0>");
  emulated::SparseMma mine = {c, a, b, positions, kBf16, kSelector};
  emulated::meet(kName, emulated::run_mma_sparse, &mine, true);
}

unsigned short round_to_bf16(float value);
unsigned short round_to_f16(float value);
float f16_to_float(unsigned short bits);
unsigned round_to_e4m3(float low, float high);
float sum_of_e4m3(unsigned pair);
unsigned e4m3_to_f16(unsigned pair);
unsigned add_f16(unsigned a, unsigned b);
unsigned multiply_add_bf16(unsigned a, unsigned b, unsigned c);

}  // namespace sk
