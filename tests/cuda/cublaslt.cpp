// A stand-in for libcublasLt without a GPU: the functions that sparsekern/kernels/cuda/cublaslt.py
// calls, in bfloat16 and float16, on host memory. It is stricter than the library: what was not
// made or is destroyed, a pointer less aligned than the preference said, an algorithm of another
// shape, a workspace too small, two threads with one handle, and a handle that is asked and
// multiplies are refused.
//
// The functions that begin with `standin_` say what it does, and tell what was done.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <set>
#include <thread>

namespace {

enum Status { kSuccess, kNotInitialized, kAllocFailed = 3, kInvalidValue = 7, kNotSupported = 15 };
constexpr int kBfloat16 = 14, kFloat16 = 2;
constexpr uint64_t kWorkspaceBytes = 48;

struct Handle {
  std::atomic<int> users{0};
  bool is_asked = false, has_multiplied = false;
};
struct Descriptor {
  int compute, scale, trans_a = 0, trans_b = 0, epilogue = 1;
  uint16_t* bias = nullptr;
};
struct Layout {
  int type;
  int64_t rows, columns, ld;
};
struct Preference {
  uint64_t most_bytes = 0;
  uint32_t reductions = 7, alignments[4] = {256, 256, 256, 256};
};
struct Algorithm {
  int64_t m, n, k;
  uint32_t alignment;
  int32_t type;
  uint64_t kind;
};
static_assert(sizeof(Algorithm) <= 64);
struct Found {
  uint64_t algorithm[8];
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};

std::mutex mutex;
std::set<const void*> made;
std::atomic<int> products{0}, asked{0};
bool wants_memory = false, has_none = false, has_no_sums = false, needs_workspace = true;

template <class T, class... Args>
int make(T** out, Args... args) {
  *out = new T{args...};
  const std::lock_guard<std::mutex> lock(mutex);
  made.insert(*out);
  return kSuccess;
}
template <class T>
int destroy(T* t) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!made.erase(t)) return kInvalidValue;
  delete t;
  return kSuccess;
}
template <class... T>
bool are_made(const T*... each) {
  const std::lock_guard<std::mutex> lock(mutex);
  return (made.count(each) && ...);
}
bool is_aligned(const void* p, uint32_t to) {
  return p && reinterpret_cast<uintptr_t>(p) % to == 0;
}

float value_of(uint16_t bits, int type) {
  if (type == kFloat16) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return half;
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

uint16_t rounded(float value, int type) {
  uint32_t bits;
  if (type == kFloat16) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t result;
    std::memcpy(&result, &half, 2);
    return result;
  }
  if (std::isnan(value)) return 0x7fc0;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The sizes of a product; false where they do not fit together.
bool sizes_of(const Descriptor& d, const Layout& a, const Layout& b, const Layout& out,
              Algorithm* sizes) {
  const int64_t m = d.trans_a ? a.columns : a.rows, k = d.trans_a ? a.rows : a.columns;
  const int64_t n = d.trans_b ? b.rows : b.columns;
  *sizes = {m, n, k, 0, out.type, 0};
  return k == (d.trans_b ? b.columns : b.rows) && out.rows == m && out.columns == n &&
         a.type == b.type && b.type == out.type && a.ld >= a.rows && b.ld >= b.rows && out.ld >= m;
}

}  // namespace

extern "C" {

void standin_without_algorithms(bool yes) { has_none = yes; }
void standin_without_memory(bool yes) { wants_memory = yes; }
void standin_without_sums(bool yes) { has_no_sums = yes; }
void standin_without_workspace(bool yes) { needs_workspace = !yes; }
int standin_products() { return products; }
int standin_asked() { return asked; }
int standin_live() {  // descriptors, layouts and preferences
  return static_cast<int>(made.size());
}

const char* cublasLtGetStatusString(int status) {
  return status == kInvalidValue ? "CUBLAS_STATUS_INVALID_VALUE" : "CUBLAS_STATUS_NOT_SUPPORTED";
}
int cublasLtCreate(Handle** out) {
  *out = new Handle;
  return kSuccess;
}
int cublasLtMatmulDescCreate(Descriptor** out, int compute, int scale) {
  return compute == 68 && scale == 0 ? make(out, compute, scale) : kNotSupported;
}
int cublasLtMatmulDescSetAttribute(Descriptor* d, int which, const void* data, size_t bytes) {
  if (!are_made(d)) return kNotInitialized;
  void* to = which == 3   ? static_cast<void*>(&d->trans_a)
             : which == 4 ? static_cast<void*>(&d->trans_b)
             : which == 7 ? static_cast<void*>(&d->epilogue)
             : which == 8 ? static_cast<void*>(&d->bias)
                          : nullptr;
  if (!to || bytes != (which == 8 ? 8 : 4)) return kInvalidValue;
  std::memcpy(to, data, bytes);
  return kSuccess;
}
int cublasLtMatmulDescDestroy(Descriptor* d) { return destroy(d); }
int cublasLtMatrixLayoutCreate(Layout** out, int type, uint64_t rows, uint64_t columns,
                               int64_t ld) {
  if (type != kBfloat16 && type != kFloat16) return kNotSupported;
  return make(out, type, static_cast<int64_t>(rows), static_cast<int64_t>(columns), ld);
}
int cublasLtMatrixLayoutDestroy(Layout* l) { return destroy(l); }
int cublasLtMatmulPreferenceCreate(Preference** out) { return make(out); }
int cublasLtMatmulPreferenceSetAttribute(Preference* p, int which, const void* data, size_t bytes) {
  if (!are_made(p)) return kNotInitialized;
  void* to = which == 1                ? static_cast<void*>(&p->most_bytes)
             : which == 3              ? static_cast<void*>(&p->reductions)
             : which >= 5 && which < 9 ? static_cast<void*>(&p->alignments[which - 5])
                                       : nullptr;
  if (!to || bytes != (which == 1 ? 8 : 4)) return kInvalidValue;
  std::memcpy(to, data, bytes);
  return kSuccess;
}
int cublasLtMatmulPreferenceDestroy(Preference* p) { return destroy(p); }

int cublasLtMatmulAlgoGetHeuristic(Handle* handle, const Descriptor* d, const Layout* a,
                                   const Layout* b, const Layout* c, const Layout* out,
                                   const Preference* p, int most, Found* found, int* count) {
  if (!are_made(d, a, b, c, out, p)) return kNotInitialized;
  ++asked, *count = 0;
  if (handle->has_multiplied) return kInvalidValue;
  handle->is_asked = true;
  if (wants_memory) return kAllocFailed;
  Algorithm algorithm;
  if (!sizes_of(*d, *a, *b, *out, &algorithm) || most < 1) return kInvalidValue;
  if (has_none) return kNotSupported;
  algorithm.alignment = 256;
  for (uint32_t each : p->alignments)
    if (each < algorithm.alignment) algorithm.alignment = each;
  if (d->epilogue != 1 && !is_aligned(d->bias, 16)) return kInvalidValue;
  if (d->epilogue == 512 && has_no_sums) return kNotSupported;
  if (p->reductions & ~2u || p->most_bytes < kWorkspaceBytes) return kNotSupported;
  *found = {};
  std::memcpy(found->algorithm, &algorithm, sizeof algorithm);
  found->workspace_bytes = needs_workspace ? kWorkspaceBytes : 0;
  *count = 1;
  return kSuccess;
}

int cublasLtMatmul(Handle* handle, const Descriptor* d, const float* alpha, const uint16_t* a,
                   const Layout* la, const uint16_t* b, const Layout* lb, const float* beta,
                   const uint16_t* c, const Layout* lc, uint16_t* out, const Layout* lo,
                   const Algorithm* algorithm, char* workspace, size_t workspace_bytes,
                   void* stream) {
  if (!are_made(d, la, lb, lc, lo)) return kNotInitialized;
  if (handle->is_asked || handle->users.fetch_add(1)) return kInvalidValue;
  handle->has_multiplied = true;
  Algorithm s;
  int status = kSuccess;
  if (!sizes_of(*d, *la, *lb, *lo, &s) || algorithm->m != s.m || algorithm->n != s.n ||
      algorithm->k != s.k || algorithm->type != s.type || c != out || lc != lo || *beta != 0)
    status = kInvalidValue;
  const uint32_t to = algorithm->alignment;
  if (!is_aligned(a, to) || !is_aligned(b, to) || !is_aligned(out, to)) status = kInvalidValue;
  if (needs_workspace && (workspace_bytes < kWorkspaceBytes || !is_aligned(workspace, 16)))
    status = kInvalidValue;
  if (!stream || (d->epilogue != 1 && !is_aligned(d->bias, 16))) status = kInvalidValue;
  if (status == kSuccess) {
    if (needs_workspace) std::memset(workspace, 0xff, kWorkspaceBytes);
    for (int64_t j = 0; j < s.n; ++j) {
      for (int64_t i = 0; i < s.m; ++i) {
        float sum = 0;
        for (int64_t l = 0; l < s.k; ++l) {
          const uint16_t left = a[d->trans_a ? l + i * la->ld : i + l * la->ld];
          const uint16_t right = b[d->trans_b ? j + l * lb->ld : l + j * lb->ld];
          sum += value_of(left, s.type) * value_of(right, s.type);
        }
        sum *= *alpha;
        if (d->epilogue == 4) sum += value_of(d->bias[i], s.type);
        out[i + j * lo->ld] = rounded(sum, s.type);
      }
    }
    for (int64_t j = 0; d->epilogue == 512 && j < s.n; ++j) {  // of the columns of b
      float sum = 0;
      for (int64_t l = 0; l < s.k; ++l)
        sum += value_of(b[d->trans_b ? j + l * lb->ld : l + j * lb->ld], s.type);
      d->bias[j] = rounded(sum, s.type);
    }
    ++products;
  }
  --handle->users;
  return status;
}

}  // extern "C"
