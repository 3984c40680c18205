// The packed weight that both SpMM kernels read, and how a lane decodes it.
//
// W [N, K] is cut into slices of 32 rows (sorted by nnz inside of blocks of 128; lane r of a warp
// owns row r of the slice) and parts of columns, each a whole number of panels of 128. One part of
// one slice is a *stream* per lane: its non-zeros in column order, in granules of 8 entries.
// Granule g of a part holds 32 x 8 values (lane-major, 16 B a lane) and, in a second array, 32 x 8
// column deltas:
//
//   4 bits: entry i < 4 in the low nibble of byte i, entry i >= 4 in the high nibble of byte i - 4.
//           Bits 0-2 count pairs of columns since the last entry, bit 3 says which one of the pair.
//   8 bits: entry i in byte i, the columns since the last entry.
//
// An entry whose value is 0 is a step without a product: it bridges a longer gap, or lets a lane
// wait for the others. So no pattern is an exception, and a stored zero costs nothing else. All
// lanes of a warp take the same number of granules. They may run ahead of one another, but window w
// of 32 columns is complete in all lanes after the first S(w) granules of the part, and no entry of
// window w + 4 comes before them: a ring of four windows is enough for a kernel that writes them
// out.
// Made by sparsekern/kernels/packed.py.
#pragma once

namespace sk {

constexpr int kWarp = 32;
constexpr int kGranule = 8;  // entries of a lane
constexpr int kPanel = 128;  // columns
constexpr int kWindow = 32;  // columns
constexpr int kRing = 4;     // windows
constexpr unsigned kAllLanes = 0xffffffffu;

struct bf16 {
  unsigned short bits;
};
struct f16 {
  unsigned short bits;
};

template <class T>
struct Convert;

template <>
struct Convert<bf16> {
  static __device__ float low(unsigned pair) { return __uint_as_float(pair << 16); }
  static __device__ float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
  static __device__ unsigned short round(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  }
};

template <>
struct Convert<f16> {
  static __device__ float low(unsigned pair) { return of(static_cast<unsigned short>(pair)); }
  static __device__ float high(unsigned pair) {
    return of(static_cast<unsigned short>(pair >> 16));
  }
  static __device__ unsigned short round(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  }

 private:
  static __device__ float of(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
};

// The deltas of one granule of a lane.
template <int kBits>
struct Deltas;
template <>
struct Deltas<4> {
  using Word = unsigned;
};
template <>
struct Deltas<8> {
  using Word = uint2;
};

template <int kBits>
struct Granule {
  uint4 values;
  typename Deltas<kBits>::Word deltas;
};

// A lane's share of the granules that are on their way: kDepth of them, in shared memory, each lane
// waiting for its own copies alone. Registers would not do: a warp that waits for one load waits
// for all later ones that use the same scoreboard, and there are six.
template <int kBits, int kDepth>
class Stream {
 public:
  using Word = typename Deltas<kBits>::Word;
  static constexpr int kWarpBytes = kDepth * kWarp * (16 + static_cast<int>(sizeof(Word)));

  // `shared` has kWarpBytes for this warp. Reads granules [begin, end).
  __device__ Stream(unsigned shared, const uint4* values, const Word* deltas, int begin, int end)
      : values_at_(shared + threadIdx.x % kWarp * 16),
        deltas_at_(shared + kDepth * kWarp * 16 + threadIdx.x % kWarp * sizeof(Word)),
        slot_(0),
        left_(end - begin) {
    const long long first = static_cast<long long>(begin) * kWarp + threadIdx.x % kWarp;
    values_ = values + first;
    deltas_ = deltas + first;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      copy(i);
    }
  }

  // The next granule has arrived in the registers returned.
  __device__ Granule<kBits> front() const {
    Granule<kBits> g;
    asm volatile("cp.async.wait_group %0;" : : "n"(kDepth - 1) : "memory");
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(g.values.x), "=r"(g.values.y), "=r"(g.values.z), "=r"(g.values.w)
                 : "r"(values_at_ + slot_ * (kWarp * 16))
                 : "memory");
    const unsigned at = deltas_at_ + slot_ * (kWarp * static_cast<unsigned>(sizeof(Word)));
    if constexpr (kBits == 4) {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(g.deltas) : "r"(at) : "memory");
    } else {
      asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];"
                   : "=r"(g.deltas.x), "=r"(g.deltas.y)
                   : "r"(at)
                   : "memory");
    }
    return g;
  }

  // Sends for another one in the place of the front. Call it when the front has been used.
  __device__ void advance() {
    copy(slot_);
    slot_ = slot_ + 1 == kDepth ? 0 : slot_ + 1;
  }

 private:
  __device__ void copy(int slot) {
    if (left_ > 0) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                   :
                   : "r"(values_at_ + slot * (kWarp * 16)), "l"(values_)
                   : "memory");
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                   :
                   : "r"(deltas_at_ + slot * (kWarp * static_cast<unsigned>(sizeof(Word)))),
                     "l"(deltas_), "n"(sizeof(Word))
                   : "memory");
      values_ += kWarp;
      deltas_ += kWarp;
      --left_;
    }
    asm volatile("cp.async.commit_group;" : : : "memory");
  }

  unsigned values_at_, deltas_at_;
  int slot_, left_;
  const uint4* values_;
  const Word* deltas_;
};

__device__ inline unsigned word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// The first panel of a part, of K cut into `panels` panels and `parts` parts.
__device__ inline int part_panel(int part, int parts, int panels) {
  return static_cast<int>(static_cast<long long>(part) * panels / parts);
}

}  // namespace sk
