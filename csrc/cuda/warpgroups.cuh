// The instructions of sm_90a for warpgroups: four warps, the first of which has a number that four
// divides, multiply together. The tests' emulator has its own.
#pragma once

#include "ptx.cuh"

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

namespace sk {

// A kernel that needs warpgroups ends with an error where it was compiled for another architecture.
__device__ inline void require_warpgroups() {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("trap;");
#endif
}

// Publishes what this thread wrote to shared memory to a warpgroup that reads it after a barrier.
__device__ inline void publish_to_warpgroups() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
#endif
}

// Operand B [16, tokens] at `at` of shared memory: a row of 128 bytes a token, of whose eight
// chunks of 16 bytes the one at i lies at i ^ token % 8. Rows begin at a multiple of 1024, `at` is
// that or a chunk with an even number of the first row.
__device__ inline unsigned long long describe_rows(unsigned at) {
  constexpr unsigned long long kSwizzled128 = 1ull << 62, kEightRows = 1024 / 16;
  return (at & 0x3ffff) >> 4 | 1ull << 16 | kEightRows << 32 | kSwizzled128;
}

// Registers of products to come have been written.
__device__ inline void begin_warpgroup_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#endif
}
__device__ inline void commit_warpgroup_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
#endif
}
// Until at most kGroups groups of products are under way.
template <int kGroups>
__device__ inline void wait_warpgroup_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kGroups) : "memory");
#endif
}

// c [16, 8 kNTiles] of each warp += a [16, 16] b, with fragments as of mma and b of describe_rows.
// It goes on in the background; the four warps of a warpgroup come together.
template <class T, int kNTiles>
__device__ inline void mma_warpgroup(float (&c)[kNTiles][4], const unsigned* a,
                                     unsigned long long b);

// Registers of a thread from here on, of all in its warpgroup: fewer, which others may then have.
template <int kRegisters>
__device__ inline void give_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
#endif
}
// More.
template <int kRegisters>
__device__ inline void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SK_C4(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define SK_C8(i) SK_C4(i), SK_C4(i + 1)
#define SK_C16(i) SK_C8(i), SK_C8(i + 2)
#define SK_C32(i) SK_C16(i), SK_C16(i + 4)
#define SK_R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define SK_R16 SK_R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define SK_R32 SK_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SK_R48 SK_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define SK_R64 SK_R48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
// %a0 .. %a3 and %b stand behind the %c of the sums.
#define SK_WARPGROUP_MMA(type, tiles, tokens, sums, operands, ...)                                \
  template <>                                                                                     \
  __device__ inline void mma_warpgroup<type, tiles>(float (&c)[tiles][4], const unsigned* a,      \
                                                    unsigned long long b) {                       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32." #type "." #type " {" sums \
                 "}, " operands ", 1, 1, 1, 0;"                                                   \
                 : __VA_ARGS__                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                           \
  }
#define SK_WARPGROUP_MMAS(type)                                                          \
  SK_WARPGROUP_MMA(type, 2, 16, SK_R8, "{%8,%9,%10,%11}, %12", SK_C8(0))                 \
  SK_WARPGROUP_MMA(type, 4, 32, SK_R16, "{%16,%17,%18,%19}, %20", SK_C16(0))             \
  SK_WARPGROUP_MMA(type, 8, 64, SK_R32, "{%32,%33,%34,%35}, %36", SK_C32(0))             \
  SK_WARPGROUP_MMA(type, 12, 96, SK_R48, "{%48,%49,%50,%51}, %52", SK_C32(0), SK_C16(8)) \
  SK_WARPGROUP_MMA(type, 16, 128, SK_R64, "{%64,%65,%66,%67}, %68", SK_C32(0), SK_C32(8))
SK_WARPGROUP_MMAS(bf16)
SK_WARPGROUP_MMAS(f16)
#undef SK_WARPGROUP_MMAS
#undef SK_WARPGROUP_MMA
#undef SK_C4
#undef SK_C8
#undef SK_C16
#undef SK_C32
#undef SK_R8
#undef SK_R16
#undef SK_R32
#undef SK_R48
#undef SK_R64
#else
template <class T, int kNTiles>
__device__ inline void mma_warpgroup(float (&)[kNTiles][4], const unsigned*, unsigned long long) {}
#endif

}  // namespace sk

#endif
