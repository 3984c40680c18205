// What this machine has: instruction sets and caches.
//
// *_isa.cpp are compiled once for each instruction set, in a namespace of its name (SK_ISA). At run
// time one is chosen for all of them.
#pragma once

#include <cstdint>

namespace sk {

enum class Isa { kPortable, kNeon, kAvx2, kAvx512 };

// The instruction set named by SPARSEKERN_ISA, else the best that this machine runs.
// Throws std::invalid_argument for a name that is unknown, not built or not runnable here.
Isa isa();
const char* isa_name();

// SK_DECLARE(declaration) stands for one in the namespace of each instruction set that was built,
// and SK_CHOSEN(name) is the name that was declared so in the namespace of isa().
#if defined(SK_HAVE_AVX2) || defined(SK_HAVE_AVX512)  // CMakeLists.txt builds both or none
#define SK_DECLARE(...)               \
  namespace portable { __VA_ARGS__; } \
  namespace avx2 { __VA_ARGS__; }     \
  namespace avx512 { __VA_ARGS__; }
#define SK_CHOSEN(name)                         \
  (sk::isa() == sk::Isa::kAvx512 ? avx512::name \
   : sk::isa() == sk::Isa::kAvx2 ? avx2::name   \
                                 : portable::name)
#elif defined(SK_HAVE_NEON)
#define SK_DECLARE(...)               \
  namespace portable { __VA_ARGS__; } \
  namespace neon { __VA_ARGS__; }
#define SK_CHOSEN(name) (sk::isa() == sk::Isa::kNeon ? neon::name : portable::name)
#else
#define SK_DECLARE(...) \
  namespace portable { __VA_ARGS__; }
#define SK_CHOSEN(name) portable::name
#endif

// Whether there is an instruction for dot products of bfloat16 (AVX512-BF16), and isa() may use it.
bool has_bf16_dots();

// Tells the system that a large result is about to be written from end to end, so that it may put
// huge pages there: a fresh page of 4 KiB costs as much as thousands of multiply-adds. A hint, of
// Linux; nothing is changed in the memory.
void advise_huge_pages(void* data, int64_t bytes);

// Size of a core's L1 data cache (level 1) or L2 cache (2); 0 where the system does not say.
int64_t cache_bytes(int level);

}  // namespace sk
