// The leaf loops for one instruction set: compiled once per ISA, with SK_ISA naming it.
#include <type_traits>

#include "../common/machine.h"
#include "expand.h"
#include "few_tokens_columns.h"
#include "few_tokens_rows.h"
#include "few_tokens_scalar.h"
#include "gather.h"
#include "kernels.h"
#include "packed_lanes.h"
#include "panel.h"
#include "sddmm.h"
#include "spmm.h"

namespace sk::SK_ISA {
namespace {

// Calls f with a null pointer of the element type, and one of the type it is computed in.
template <class F>
void with_type(Type type, F f) {
  float* real = nullptr;
  if (type == Type::kFloat) f(static_cast<float*>(nullptr), real);
  if (type == Type::kBfloat16 || type == Type::kPairs || type == Type::kDots)
    f(static_cast<bf16*>(nullptr), real);
  if (type == Type::kDouble) f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
}
template <class F>
void with_real(Type type, F f) {
  type == Type::kDouble ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}
// Calls f with a null pointer of the element type of panels that are read, and one as above.
template <class F>
void with_panel(Type type, F f) {
  if (type == Type::kPairs) return f(static_cast<Pair*>(nullptr), static_cast<float*>(nullptr));
  with_real(type, [&](auto* real) { f(real, real); });
}

template <class T>
T* as(void* data, T*) {
  return static_cast<T*>(data);
}
template <class T>
const T* as(const void* data, T*) {
  return static_cast<const T*>(data);
}

// Elements in a row of a panel.
template <class Element>
int64_t width(int vecs, Element*) {
  return int64_t{vecs} * Simd<Element>::kCount;
}

#define SK_WITH_VECS(call) \
  switch (vecs) {          \
    case 1: call(1);       \
    case 2: call(2);       \
    case 4: call(4);       \
    case 8: call(8);       \
  }

void pack_(Type type, Matrix x, int64_t tokens, int64_t features, int vecs, void* panel) {
  auto to = [&](auto* t, auto* element) {
    pack(as(static_cast<const void*>(x.data), t), x.stride, tokens, features, width(vecs, element),
         as(panel, element));
  };
  if (panel_size_of(type) == 2) return to(static_cast<bf16*>(nullptr), static_cast<Pair*>(nullptr));
  with_type(type, to);
}

void unpack_(Type type, const void* panel, int vecs, int64_t tokens, int64_t features, Matrix y) {
  const auto from = [&](auto* t, auto* real) {
    const int64_t tokens_in_row = width(vecs, real) * real_size_of(type) / panel_size_of(type);
    unpack(as(panel, real), tokens_in_row, tokens, features, as(y.data, t), y.stride);
  };
#ifdef SK_DOTS
  if (type == Type::kDots)
    return from(static_cast<FlushedBf16*>(nullptr), static_cast<float*>(nullptr));
#endif
  with_type(type, from);
}

void gather_(Type type, const Walk& w, const void* values, void* walked) {
  with_type(type, [&](auto* t, auto* real) {
    type == Type::kDots ? gather(w, as(values, t), as(walked, t))
                        : gather(w, as(values, t), as(walked, real));
  });
}

void scatter_(Type type, const Walk& w, const void* walked, void* values) {
  with_type(type, [&](auto* t, auto* real) { scatter(w, as(walked, real), as(values, t)); });
}

void widen_(Type type, const void* values, int64_t size, void* wide) {
  with_type(type, [&](auto* t, auto* real) {
    for (int64_t i = 0; i < size; i++) as(wide, real)[i] = to_real(as(values, t)[i]);
  });
}

void spmm_(Type type, int vecs, bool two_sums, const Walk& w, int64_t rows, bool in_place,
           const void* values, const void* start, const void* x, void* y) {
  const auto run = [&](auto sums) {
    using Sums = decltype(sums);
    spmm_block<Sums>(w, rows, in_place, static_cast<const typename Sums::Value*>(values),
                     static_cast<const typename Sums::Real*>(start),
                     static_cast<const typename Sums::Element*>(x),
                     static_cast<typename Sums::Real*>(y));
  };
#ifdef SK_DOTS
  if (type == Type::kDots) {
#define SK_CALL(v) return run(Dots<v>())
    SK_WITH_VECS(SK_CALL)
#undef SK_CALL
  }
#endif
  with_panel(type, [&](auto* e, auto* r) {
    using Element = std::remove_pointer_t<decltype(e)>;
    using Real = std::remove_pointer_t<decltype(r)>;
    if constexpr (std::is_same_v<Element, Real>)
      if (two_sums && vecs == 4) return run(MultiplyAdds<4, true, Element, Real>());
#define SK_CALL(v) return run(MultiplyAdds<v, false, Element, Real>())
    SK_WITH_VECS(SK_CALL)
#undef SK_CALL
  });
}

void sddmm_(Type type, int vecs, const Walk& w, const void* dy, const void* x, bool add,
            void* walked) {
#define SK_CALL(v) return sddmm_block<v, Dot>(w, as(dy, e), as(x, e), add, as(walked, r))
#ifdef SK_DOTS
  if (type == Type::kPairs && has_bf16_dots()) {
    using Dot = InOneInstruction;
    Pair* e = nullptr;
    float* r = nullptr;
    SK_WITH_VECS(SK_CALL)
  }
#endif
  with_panel(type, [&](auto* e, auto* r) {
    using Dot = MultiplyAdd;
    SK_WITH_VECS(SK_CALL)
  });
#undef SK_CALL
}

void add_(Type type, bool is_first, int64_t size, const void* part, void* total) {
  with_real(type, [&](auto* r) {
    const auto* from = as(part, r);
    auto* to = as(total, r);
    for (int64_t i = 0; i < size; i++) to[i] = is_first ? from[i] : to[i] + from[i];
  });
}

// The types that `spmm_few` takes.
template <class F>
void with_few_type(Type type, F f) {
  type == Type::kFloat ? f(static_cast<float*>(nullptr)) : f(static_cast<bf16*>(nullptr));
}

// Tokens that a kernel computes at once: the smallest of its sizes that is enough.
template <class F>
void with_bitmap_tokens(int64_t tokens, const F& f) {
  if (tokens <= 1) return f(std::integral_constant<int, 1>());
  if (tokens <= 2) return f(std::integral_constant<int, 2>());
  if (tokens <= 4) return f(std::integral_constant<int, 4>());
  f(std::integral_constant<int, 8>());
}
template <class F>
void with_panel_width(int64_t tokens, const F& f) {
#if defined(__AVX512F__)
  if (tokens <= 2) return f(std::integral_constant<int, 2>());
  if (tokens <= 4) return f(std::integral_constant<int, 4>());
#endif
  if (tokens <= kBlock) return f(std::integral_constant<int, kBlock>());
  if (tokens <= 8) return f(std::integral_constant<int, 8>());
  f(std::integral_constant<int, 16>());
}

void pack_few_(Type type, Format format, Matrix x, int64_t tokens, int64_t features,
               float* packed) {
  with_few_type(type, [&](auto* t) {
    auto* in = as(static_cast<const void*>(x.data), t);
    const int64_t words = (features + 63) / 64;
    if (format == Format::kBitmap)
      with_bitmap_tokens(tokens, [&](auto rows) {
        pack_rows(in, x.stride, tokens, features, words, rows, packed);
      });
    else if (tokens == 1 || format == Format::kColumns32)
      pack_rows(in, x.stride, tokens, features, words, static_cast<int>(tokens), packed);
    else
      with_panel_width(
          tokens, [&](auto width) { pack_panel(in, x.stride, tokens, features, width, packed); });
  });
}

void spmm_few_(Type type, Format format, const CompressedRows& w, const void* values,
               const float* packed, int64_t tokens, Lookup lookup, Matrix y) {
  with_few_type(type, [&](auto* t) {
    auto *v = as(values, t), *out = as(y.data, t);
    if (format == Format::kBitmap)
      with_bitmap_tokens(
          tokens, [&](auto rows) { spmm_bitmap<rows>(w, v, packed, tokens, out, y.stride); });
    else if (format == Format::kWindow64)
      spmm_window<64>(w, v, packed, out);
    else if (format == Format::kWindow128)
      spmm_window<128>(w, v, packed, out);
    else if (format == Format::kColumns32)
      for (int64_t m = 0; m < tokens; m++)
        spmm_scalar(w, w.cols32, v, packed + 64 * w.words * m, out + y.stride * m);
    else if (tokens == 1 && lookup == Lookup::kScalar)
      spmm_scalar(w, w.cols, v, packed, out);
    else if (tokens == 1)
      lookup == Lookup::kPick ? spmm_gather<true>(w, v, packed, out)
                              : spmm_gather<false>(w, v, packed, out);
    else
      with_panel_width(
          tokens, [&](auto width) { spmm_columns<width>(w, v, packed, tokens, out, y.stride); });
  });
}

void widen_t_(Type type, Matrix x, int64_t tokens, int64_t features, int width, double* wide) {
  with_type(type, [&](auto* t, auto*) {
    auto* from = as(static_cast<const void*>(x.data), t);
    for (int64_t c = 0; c < features; c++)
      for (int m = 0; m < width; m++)
        wide[c * width + m] = m < tokens ? to_real(from[m * x.stride + c]) : 0;
  });
}

void narrow_t_(Type type, const double* wide, int width, const void* bias, int64_t tokens,
               int64_t features, Matrix y) {
  with_type(type, [&](auto* t, auto*) {
    auto *start = as(bias, t), *to = as(y.data, t);
    for (int64_t m = 0; m < tokens; m++)
      for (int64_t c = 0; c < features; c++)
        put(wide[c * width + m] + (start ? to_real(start[c]) : 0), to + m * y.stride + c);
  });
}

void spmm_t_few_(Type type, const CompressedRows& w, const void* values, const double* dy,
                 int width, double* y) {
  with_type(type, [&](auto* t, auto*) {
    auto with_cols = [&](const auto* cols) {
      auto* v = as(values, t);
      if (width == 1) return spmm_t_scalar<1>(w, cols, v, dy, y);
      if (width == 2) return spmm_t_scalar<2>(w, cols, v, dy, y);
      if (width == 4) return spmm_t_scalar<4>(w, cols, v, dy, y);
      spmm_t_scalar<8>(w, cols, v, dy, y);
    };
    w.cols32 ? with_cols(w.cols32) : with_cols(w.cols);
  });
}

void pack_lanes_(Type type, Matrix x, int64_t tokens, int64_t features, int64_t rows,
                 float* packed) {
  with_few_type(type, [&](auto* t) {
    pack_lanes(as(static_cast<const void*>(x.data), t), x.stride, tokens, features,
               (features + kLanesCols - 1) / kLanesCols, rows, packed);
  });
}

void spmm_lanes_(Type type, const LanesPart& w, const void* values, const float* packed,
                 int64_t tokens, Matrix y) {
  with_few_type(type, [&](auto* t) {
    auto *v = as(values, t), *out = as(y.data, t);
    if (tokens == 1) return spmm_lanes<1>(w, v, packed, tokens, out, y.stride);
    if (tokens == 2) return spmm_lanes<2>(w, v, packed, tokens, out, y.stride);
    spmm_lanes<4>(w, v, packed, tokens, out, y.stride);
  });
}

// Calls f(a Mover of elements of so many bytes).
template <class F>
void with_mover(int bytes, F f) {
  if (bytes == 2) f(MoverOf<2>());
  if (bytes == 4) f(MoverOf<4>());
  if (bytes == 8) f(MoverOf<8>());
}

void expand_(int bytes, const CompressedRows& w, int64_t first_col, int64_t cols,
             const void* values, void* dense) {
  with_mover(bytes, [&](auto mover) {
    typename decltype(mover)::T* t = nullptr;
    expand_rows<decltype(mover)>(w, first_col, cols, as(values, t), as(dense, t));
  });
}

void collect_(int bytes, const CompressedRows& w, int64_t cols, const void* dense, void* values) {
  with_mover(bytes, [&](auto mover) {
    typename decltype(mover)::T* t = nullptr;
    collect_rows<decltype(mover)>(w, cols, as(dense, t), as(values, t));
  });
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {kLanes,    pack_,       unpack_,     gather_,     scatter_,  widen_,
                          spmm_,     sddmm_,      add_,        pack_few_,   spmm_few_, widen_t_,
                          narrow_t_, spmm_t_few_, pack_lanes_, spmm_lanes_, expand_,   collect_};

}  // namespace sk::SK_ISA
