// Values of a packed weight, in one launch: floats[places[i]] = values[i], but a zero is -0, since
// +0 is a place that is not stored. Bytes: those of both indices and values, once; the places are
// scattered. They are made from a checked copy that nobody else can write to.
#include "launch.cuh"

namespace sk {

constexpr unsigned kRefillThreads = 256;

// 16-bit floats of either type.
__device__ inline void refill(const unsigned short* values, const long long* places,
                              unsigned short* floats, unsigned count) {
  const unsigned i = blockIdx.x * kRefillThreads + threadIdx.x;
  if (i >= count) return;
  const unsigned short value = values[i];
  floats[places[i]] = value & 0x7fffu ? value : 0x8000u;
}

}  // namespace sk

extern "C" __global__ void __launch_bounds__(sk::kRefillThreads)
    sk_refill_2(const unsigned short* values, const long long* places, unsigned short* floats,
                int count) {
  sk::refill(values, places, floats, static_cast<unsigned>(count));
}
SK_KERNEL(sk_refill_2)
