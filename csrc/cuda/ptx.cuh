// The instructions that CUDA C++ has no name for, each a function. Kernels hold no assembly, so the
// tests can run them on a CPU, where tests/cuda/emulated_ptx.h takes the place of this file's.
//
// Addresses of shared memory are 32 bits, as the instructions want them.
#pragma once

#if !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
#include "emulated_ptx.h"
#else

namespace sk {

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ inline unsigned load_shared_u8(unsigned at) {
  unsigned v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}

__device__ inline unsigned load_shared_u16(unsigned at) {
  unsigned v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}

__device__ inline unsigned load_shared_u32(unsigned at) {
  unsigned v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}

__device__ inline uint2 load_shared_v2(unsigned at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
  return v;
}

__device__ inline uint4 load_shared_v4(unsigned at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}

// The word at `at` if `condition` is not 0, else 0: a predicate, where the compiler would make a
// branch.
__device__ inline void load_shared_if(unsigned& word, unsigned at, unsigned condition) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %2, 0;\n"
      "mov.u32 %0, 0;\n"
      "@p ld.shared.u32 %0, [%1];\n"
      "}"
      : "=&r"(word)
      : "r"(at), "r"(condition)
      : "memory");
}

// The same of 16 bits.
__device__ inline void load_shared_u16_if(unsigned& half, unsigned at, unsigned condition) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %2, 0;\n"
      "mov.u32 %0, 0;\n"
      "@p ld.shared.u16 %0, [%1];\n"
      "}"
      : "=&r"(half)
      : "r"(at), "r"(condition)
      : "memory");
}

// The products of the four bytes of a and b, and add: their sum.
__device__ inline unsigned dot_bytes(unsigned a, unsigned b, unsigned add) {
  unsigned sum;
  asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(add));
  return sum;
}

__device__ inline void store_shared(unsigned at, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1,%2};" : : "r"(at), "r"(v.x), "r"(v.y) : "memory");
}

__device__ inline void store_shared(unsigned at, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};"
               :
               : "r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Copies from global to shared memory in the background: kBytes is 4, 8 or 16.
template <int kBytes>
__device__ inline void copy_async(unsigned to, const void* from) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                 :
                 : "r"(to), "l"(from), "n"(kBytes)
                 : "memory");
  }
}

// 16 bytes, if count > limit: a predicate, where the compiler would make a branch.
__device__ inline void copy_async_if(unsigned to, const void* from, int count, int limit) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.gt.s32 p, %2, %3;\n"
      "@p cp.async.cg.shared.global [%0], [%1], 16;\n"
      "}"
      :
      : "r"(to), "l"(from), "r"(count), "r"(limit)
      : "memory");
}

// The copies of this thread since the last commit are a group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Until at most kGroups groups of this thread are under way.
template <int kGroups>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kGroups) : "memory");
}

// Whether there are copies in bulk, and warpgroups whose four warps multiply together (sm_90a).
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ constexpr bool has_warpgroups() { return true; }
#else
__device__ constexpr bool has_warpgroups() { return false; }
#endif

// A barrier in shared memory, 8 bytes: a phase of it is over when it has been arrived at so many
// times, and what it was given to has come. To be made by one thread, before others know of it.
__device__ inline void init_barrier(unsigned barrier, unsigned count = 1) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;\n"
      "fence.mbarrier_init.release.cluster;"
      :
      : "r"(barrier), "r"(count)
      : "memory");
#endif
}

__device__ inline void arrive_at(unsigned barrier) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(barrier) : "memory");
#endif
}

// Copies from global to shared memory in the background, by one thread: a multiple of 16 bytes. It
// arrives at the barrier, and so does the copy.
__device__ inline void copy_bulk(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :
      : "r"(to), "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// Until a phase is over; phases are 0 and 1 in turn.
__device__ inline void wait_barrier(unsigned barrier, unsigned phase) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  unsigned is_over;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(is_over)
        : "r"(barrier), "r"(phase)
        : "memory");
  } while (!is_over);
#endif
}

// A barrier for `warps` whole warps; `barrier` is 1 to 15 and not that of others at the same time.
__device__ inline void sync_warps(int barrier, int warps) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(warps * 32) : "memory");
}

// A hint that costs nothing if wrong, as long as the address is that of an allocation.
__device__ inline void prefetch_to_l2(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(at));
}

// Whether a kernel can start before the last one has ended.
#if __CUDA_ARCH__ >= 900
constexpr bool kStartsEarly = true;
#else
constexpr bool kStartsEarly = false;
#endif

// The next kernel of the stream may take what this one leaves free of the multiprocessors, if its
// launch allows that (launch.cuh).
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}

// Until the kernels before this one have ended, and what they wrote can be read.
__device__ inline void wait_for_last_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit elements. Lane 8 i + r gives the address of row r of matrix i, 16
// bytes. Lane 4 g + t gets out[i]: columns 2 t (low half) and 2 t + 1 of row g.
__device__ inline void load_matrices(unsigned (&out)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

// The same, transposed: lane 4 g + t gets rows 2 t (low half) and 2 t + 1 of column g.
__device__ inline void load_matrices_transposed(unsigned (&out)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

struct bf16;
struct f16;

// c [16, 8] += a [16, 16] b [16, 8]. Fragments of lane (g, t) = lane / 4, lane % 4:
//
//   a0, a1   columns 2 t (low half) and 2 t + 1 of rows g and g + 8; a2, a3 columns 2 t + 8, + 9
//   b_i      rows 8 i + 2 t (low half) and 8 i + 2 t + 1 of column g
//   c0, c1   row g, columns 2 t and 2 t + 1; c2, c3 row g + 8
template <class T>
__device__ inline void mma(float (&c)[4], const unsigned* a, unsigned b0, unsigned b1);

#define SK_MMA(type)                                                                             \
  template <>                                                                                    \
  __device__ inline void mma<type>(float (&c)[4], const unsigned* a, unsigned b0, unsigned b1) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." #type "." #type                                 \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                             \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                         \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                         \
  }
SK_MMA(bf16)
SK_MMA(f16)
#undef SK_MMA

// c [16, 8] += a [16, 32] b [32, 8] with a sparse: of each group of four columns a row has two
// values, at the positions that two bits each name. Fragments of lane (g, t) = lane / 4, lane % 4:
//
//   a0, a2   row g, groups t and t + 4: two values; a1, a3 the same of row g + 8
//   b_i      rows 8 i + 2 t (low half) and 8 i + 2 t + 1 of column g
//   c0, c1   row g, columns 2 t and 2 t + 1; c2, c3 row g + 8
//
// positions: of lanes t = 2 kSelector + u, for groups 4 u .. 4 u + 3, a nibble each: row g in the
// low half, row g + 8 in the high one. The two positions of a group differ, in any order: the form
// `mma.sp` without `::ordered_metadata`.
template <class T, int kSelector>
__device__ inline void mma_sparse(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[4],
                                  unsigned positions);

#define SK_MMA_SPARSE(type, selector)                                                             \
  template <>                                                                                     \
  __device__ inline void mma_sparse<type, selector>(float (&c)[4], const unsigned (&a)[4],        \
                                                    const unsigned (&b)[4], unsigned positions) { \
    asm volatile("mma.sp.sync.aligned.m16n8k32.row.col.f32." #type "." #type                      \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"   \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),   \
                   "r"(b[3]), "r"(positions), "n"(selector));                                     \
  }
SK_MMA_SPARSE(bf16, 0)
SK_MMA_SPARSE(bf16, 1)
SK_MMA_SPARSE(f16, 0)
SK_MMA_SPARSE(f16, 1)
#undef SK_MMA_SPARSE

// Two floats as E4M3, the first in the low byte: to the nearest, ties to even, beyond 448 to that;
// NaN stays NaN. On sm_89 and later.
__device__ inline unsigned round_to_e4m3(float low, float high) {
  unsigned short pair = 0;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}

// Two numbers in E4M3, the low 16 bits, as f16: exact.
__device__ inline unsigned e4m3_to_f16(unsigned pair) {
  unsigned halves;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<unsigned short>(pair)));
#else
  const unsigned high = __byte_perm(pair, 0, 0x1404);
  const unsigned bits = (high & 0x80008000u) | (high >> 1 & 0x3f803f80u);
  asm("mul.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(bits), "r"(0x5c005c00u));  // 2^8
#endif
  return halves;
}

__device__ inline unsigned add_f16(unsigned a, unsigned b) {
  unsigned sums;
  asm("add.f16x2 %0, %1, %2;" : "=r"(sums) : "r"(a), "r"(b));
  return sums;
}

// a b + c of two bfloat16 each, rounded once.
__device__ inline unsigned multiply_add_bf16(unsigned a, unsigned b, unsigned c) {
  unsigned sums;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sums) : "r"(a), "r"(b), "r"(c));
  return sums;
}

// Of two E4M3 in the low bytes their sum; NaN if one is.
__device__ inline float sum_of_e4m3(unsigned pair) {
  const unsigned halves = e4m3_to_f16(pair);
  float low, high;
  asm("{\n"
      ".reg .b16 l, h;\n"
      "mov.b32 {l, h}, %2;\n"
      "cvt.f32.f16 %0, l;\n"
      "cvt.f32.f16 %1, h;\n"
      "}"
      : "=f"(low), "=f"(high)
      : "r"(halves));
  return low + high;
}

__device__ inline unsigned short round_to_bf16(float value) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ inline unsigned short round_to_f16(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ inline float f16_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

}  // namespace sk

#endif
