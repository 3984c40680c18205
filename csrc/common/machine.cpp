#include "machine.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sk {
namespace {

struct Built {
  Isa isa;
  const char* name;
  bool runs_here;
};

// Best last.
const Built kBuilt[] = {
    {Isa::kPortable, "portable", true},
#ifdef SK_HAVE_NEON
    {Isa::kNeon, "neon", true},
#endif
#ifdef SK_HAVE_AVX2
    {Isa::kAvx2, "avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
#ifdef SK_HAVE_AVX512
    {Isa::kAvx512, "avx512",
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("fma")},
#endif
};

const Built& choose() {
  const char* wanted = std::getenv("SPARSEKERN_ISA");
  const Built* best = nullptr;
  std::string names;
  for (const Built& built : kBuilt) {
    if (!built.runs_here) continue;
    if (wanted && wanted == std::string(built.name)) return built;
    names += (names.empty() ? "" : ", ") + std::string(built.name);
    best = &built;
  }
  if (wanted && *wanted)
    throw std::invalid_argument("SPARSEKERN_ISA: expected one of " + names +
                                " on this machine, got '" + wanted + "'");
  return *best;
}

const Built& chosen() {
  static const Built& built = choose();
  return built;
}

}  // namespace

Isa isa() { return chosen().isa; }
const char* isa_name() { return chosen().name; }

bool has_bf16_dots() {
#ifdef SK_HAVE_AVX512
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has && isa() == Isa::kAvx512;
#else
  return false;
#endif
}

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHuge = 1 << 21;
  const auto at = reinterpret_cast<intptr_t>(data);
  const int64_t first = (at + kHuge - 1) / kHuge * kHuge, end = (at + bytes) / kHuge * kHuge;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

int64_t cache_bytes(int level) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  return std::max(0L, sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : _SC_LEVEL2_CACHE_SIZE));
#else
  return 0;
#endif
}

}  // namespace sk
