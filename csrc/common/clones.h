// SK_CLONES before a function that is not a leaf loop of cpu/: it is compiled for several
// instruction sets, and the best that the machine has is linked when the module is loaded. Only for
// functions whose results are the same on all of them. Sanitizers start too late for that.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define SK_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SK_CLONES
#endif
