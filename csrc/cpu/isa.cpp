#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "kernels.h"

namespace sk {

namespace portable { extern const Kernels kKernels; }
#ifdef SK_HAVE_AVX2
namespace avx2 { extern const Kernels kKernels; }
#endif
#ifdef SK_HAVE_AVX512
namespace avx512 { extern const Kernels kKernels; }
#endif
#ifdef SK_HAVE_NEON
namespace neon { extern const Kernels kKernels; }
#endif

namespace {

struct Isa {
  const Kernels* kernels;
  bool runs_here;
};

// Best last.
const Isa kIsas[] = {
    {&portable::kKernels, true},
#ifdef SK_HAVE_NEON
    {&neon::kKernels, true},
#endif
#ifdef SK_HAVE_AVX2
    {&avx2::kKernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
#ifdef SK_HAVE_AVX512
    {&avx512::kKernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")},
#endif
};

const Kernels& choose() {
  const char* wanted = std::getenv("SPARSEKERN_ISA");
  const Kernels* best = nullptr;
  std::string names;
  for (const Isa& isa : kIsas) {
    if (!isa.runs_here) continue;
    if (wanted && wanted == std::string(isa.kernels->isa)) return *isa.kernels;
    names += (names.empty() ? "" : ", ") + std::string(isa.kernels->isa);
    best = isa.kernels;
  }
  if (wanted && *wanted)
    throw std::invalid_argument("SPARSEKERN_ISA: expected one of " + names +
                                " on this machine, got '" + wanted + "'");
  return *best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

int64_t cache_bytes(int level) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  return std::max(0L, sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : _SC_LEVEL2_CACHE_SIZE));
#else
  return 0;
#endif
}

}  // namespace sk
