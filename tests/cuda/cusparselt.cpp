// A stand-in for libcusparseLt without a GPU: the functions that sparsekern/kernels/cuda/
// cusparselt.py calls, in bfloat16, float16 and E4M3, on host memory. It is stricter than the
// library: a struct that was never made, was moved, copied or destroyed, or whose handle is another
// thread's is refused.
//
// An operand [N, K] is its slots [N, K / 2], row by row, then for each half a byte: two places.
// The functions that begin with `standin_` say what goes wrong, and tell what was done.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>

namespace {

enum Status {
  kSuccess,
  kNotInitialized,
  kInvalidValue = 3,
  kExecutionFailed = 6,
  kNotSupported = 10
};
enum Behaviour { kRight, kRefused, kWrong, kChanging };
constexpr int kBfloat16 = 14, kFloat16 = 2, kE4m3 = 28;  // cudaDataType
constexpr int kFloat32 = 2, kRow = 2, kColumn = 1, kSparsity50 = 0;
constexpr int kPlain = 0, kTransposed = 1, kId = 0, kBias = 8;
constexpr int64_t kWorkspaceBytes = 48;

struct Algorithm {
  Behaviour behaviour = kRight;
  int cost = 100, products = 0;
};

std::mutex mutex;
std::map<std::string, int> failures;
std::map<int, Algorithm> algorithms;
int live = 0, elapsed = 0, version[3] = {0, 8, 1};
bool slots_in_columns = false, e4m3_takes_bias = true;

// A struct in the caller's memory knows where it was made.
struct Struct {
  uintptr_t tag;
};
struct Handle : Struct {
  static constexpr uintptr_t kKind = 0x11111111;
  std::thread::id owner;
};
struct Matrix : Struct {
  static constexpr uintptr_t kKind = 0x22222222;
  int64_t rows, columns, ld;
  int order, type;
  bool is_sparse;
};
struct Matmul : Struct {
  static constexpr uintptr_t kKind = 0x33333333;
  const Matrix *w, *x, *y;
  const uint16_t* bias;
};
struct Selection : Struct {
  static constexpr uintptr_t kKind = 0x44444444;
  int algorithm;
};
struct Plan : Struct {
  static constexpr uintptr_t kKind = 0x55555555;
  const Matmul* matmul;
  const Selection* selection;
  int products;
};

bool is_aligned(const void* p) { return p && reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T>
bool is_made(const T* t) {
  if (!is_aligned(t) || t->tag != (reinterpret_cast<uintptr_t>(t) ^ T::kKind)) return false;
  if constexpr (std::is_same_v<T, Handle>) return t->owner == std::this_thread::get_id();
  return true;
}

template <class... T>
bool are_made(const T*... structs) {
  return (is_made(structs) && ...);
}

template <class T>
bool make(T* t) {
  if (!is_aligned(t) || is_made(t)) return false;
  std::memset(static_cast<void*>(t), 0x5a, 512);
  t->tag = reinterpret_cast<uintptr_t>(t) ^ T::kKind;
  return true;
}

template <class T>
int destroy(T* t) {
  if (!is_made(t)) return kInvalidValue;
  t->tag = 0, --live;
  return kSuccess;
}

// What begins each function: the test may want it to fail.
#define BEGIN(function, ...)                                                            \
  std::lock_guard<std::mutex> lock(mutex);                                              \
  if (const auto at = failures.find(function); at != failures.end()) return at->second; \
  if (!are_made(__VA_ARGS__)) return kNotInitialized

// The value of an element of `type`.
float value_of(const void* elements, int64_t i, int type) {
  if (type == kFloat16) return static_cast<const _Float16*>(elements)[i];
  if (type == kE4m3) {
    const int code = static_cast<const uint8_t*>(elements)[i], exponent = code >> 3 & 15;
    if ((code & 0x7f) == 0x7f) return NAN;
    const int mantissa = exponent ? 8 + code % 8 : code % 8;
    const float size = std::ldexp(static_cast<float>(mantissa), (exponent ? exponent : 1) - 10);
    return code & 0x80 ? -size : size;
  }
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(elements)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t rounded(float value, int type) {
  uint32_t bits;
  if (type == kFloat16) {
    const _Float16 half = static_cast<_Float16>(value);
    std::memcpy(&bits, &half, 2);
    return static_cast<uint16_t>(bits);
  }
  if (std::isnan(value)) return 0x7fc0;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

int64_t bytes_of(int type) { return type == kE4m3 ? 1 : 2; }

int describe(Matrix* out, int64_t rows, int64_t columns, int64_t ld, uint32_t alignment, int type,
             int order, bool is_sparse) {
  const int multiple = (is_sparse ? 16 : 8) * (type == kE4m3 ? 2 : 1);
  if (type != kBfloat16 && type != kFloat16 && type != kE4m3) return kNotSupported;
  if (rows % multiple || columns % multiple) return kNotSupported;
  const int64_t least = order == kRow ? columns : rows;
  if (ld < least || (is_sparse && ld != least) || ld % 8 || alignment != 16 || !make(out))
    return kInvalidValue;
  out->rows = rows, out->columns = columns, out->ld = ld;
  out->order = order, out->type = type, out->is_sparse = is_sparse, ++live;
  return kSuccess;
}

}  // namespace

extern "C" {

void standin_fail(const char* function, int status) { failures[function] = status; }
void standin_algorithm(int id, int behaviour, int cost) {
  algorithms[id] = {static_cast<Behaviour>(behaviour), cost, 0};
}
void standin_minor_version(int minor) { version[1] = minor; }
void standin_slots_in_columns() { slots_in_columns = true; }
void standin_e4m3_without_bias() { e4m3_takes_bias = false; }
int standin_products(int id) { return algorithms[id].products; }
int standin_live() { return live; }  // plans, selections and descriptors of matrices
int standin_elapsed() { return elapsed; }
void standin_reset() {
  failures.clear(), algorithms.clear();
  version[1] = 8, slots_in_columns = false, e4m3_takes_bias = true;
}

const char* cusparseLtGetErrorString(int status) {
  if (status == kNotInitialized) return "CUSPARSE_STATUS_NOT_INITIALIZED";
  if (status == kInvalidValue) return "CUSPARSE_STATUS_INVALID_VALUE";
  if (status == kNotSupported) return "CUSPARSE_STATUS_NOT_SUPPORTED";
  return "CUSPARSE_STATUS_EXECUTION_FAILED";
}

int cusparseLtGetProperty(int which, int* value) {
  BEGIN("GetProperty");
  *value = version[which];
  return kSuccess;
}

int cusparseLtInit(Handle* handle) {
  BEGIN("Init");
  if (!make(handle)) return kInvalidValue;
  handle->owner = std::this_thread::get_id();
  return kSuccess;
}

int cusparseLtStructuredDescriptorInit(const Handle* handle, Matrix* out, int64_t rows,
                                       int64_t columns, int64_t ld, uint32_t alignment, int type,
                                       int order, int sparsity) {
  BEGIN("StructuredDescriptorInit", handle);
  if (order != kRow || sparsity != kSparsity50) return kNotSupported;
  return describe(out, rows, columns, ld, alignment, type, order, true);
}

int cusparseLtDenseDescriptorInit(const Handle* handle, Matrix* out, int64_t rows, int64_t columns,
                                  int64_t ld, uint32_t alignment, int type, int order) {
  BEGIN("DenseDescriptorInit", handle);
  return describe(out, rows, columns, ld, alignment, type, order, false);
}

int cusparseLtMatDescriptorDestroy(Matrix* m) {
  BEGIN("MatDescriptorDestroy", m);
  return destroy(m);
}

// y, column by column, = w x^T
int cusparseLtMatmulDescriptorInit(const Handle* handle, Matmul* out, int op_w, int op_x,
                                   const Matrix* w, const Matrix* x, const Matrix* c,
                                   const Matrix* y, int type) {
  BEGIN("MatmulDescriptorInit", handle, w, x, y);
  if (op_w != kPlain || op_x != kTransposed || type != kFloat32 || c != y) return kNotSupported;
  if (!w->is_sparse || x->order != kRow || y->order != kColumn) return kNotSupported;
  if (w->rows != y->rows || w->columns != x->columns || x->rows != y->columns || !make(out))
    return kInvalidValue;
  if (w->type != x->type || y->type != (x->type == kE4m3 ? kBfloat16 : x->type))
    return kNotSupported;
  out->w = w, out->x = x, out->y = y, out->bias = nullptr;
  return kSuccess;
}

int cusparseLtMatmulDescSetAttribute(const Handle* handle, Matmul* m, int which, const void* data,
                                     size_t bytes) {
  BEGIN("MatmulDescSetAttribute", handle, m);
  if (m->x->type == kE4m3 && !e4m3_takes_bias) return kNotSupported;
  if (which != kBias || bytes != sizeof m->bias) return kInvalidValue;
  std::memcpy(&m->bias, data, bytes);
  return is_aligned(m->bias) ? kSuccess : kInvalidValue;
}

int cusparseLtMatmulAlgSelectionInit(const Handle* handle, Selection* out, const Matmul* m,
                                     int algorithm) {
  BEGIN("MatmulAlgSelectionInit", handle, m);
  if (!make(out)) return kInvalidValue;
  out->algorithm = algorithm, ++live;
  return kSuccess;
}

int cusparseLtMatmulAlgSetAttribute(const Handle* handle, Selection* s, int which, const void* data,
                                    size_t bytes) {
  BEGIN("MatmulAlgSetAttribute", handle, s);
  if (which != kId || bytes != sizeof s->algorithm) return kInvalidValue;
  std::memcpy(&s->algorithm, data, bytes);
  return kSuccess;
}

int cusparseLtMatmulAlgSelectionDestroy(Selection* s) {
  BEGIN("MatmulAlgSelectionDestroy", s);
  return destroy(s);
}

int cusparseLtMatmulPlanInit(const Handle* handle, Plan* out, const Matmul* m, const Selection* s) {
  BEGIN("MatmulPlanInit", handle, m, s);
  if (algorithms[s->algorithm].behaviour == kRefused) return kNotSupported;
  if (!make(out)) return kInvalidValue;
  out->matmul = m, out->selection = s, out->products = 0, ++live;
  return kSuccess;
}

int cusparseLtMatmulPlanDestroy(Plan* p) {
  BEGIN("MatmulPlanDestroy", p);
  return destroy(p);
}

int cusparseLtMatmulGetWorkspace(const Handle* handle, const Plan* p, size_t* bytes) {
  BEGIN("MatmulGetWorkspace", handle, p);
  *bytes = kWorkspaceBytes;
  return kSuccess;
}

int cusparseLtSpMMACompressedSize2(const Handle* handle, const Matrix* w, size_t* bytes,
                                   size_t* buffer_bytes) {
  BEGIN("SpMMACompressedSize2", handle, w);
  const int64_t needed = w->rows * w->columns / 8 * (4 * bytes_of(w->type) + 1);
  *bytes = (needed + 1023) / 1024 * 1024, *buffer_bytes = kWorkspaceBytes;
  return kSuccess;
}

int cusparseLtSpMMACompress2(const Handle* handle, const Matrix* w, int is_sparse_a, int op,
                             const uint8_t* dense, uint8_t* out, char* buffer, void*) {
  BEGIN("SpMMACompress2", handle, w);
  if (!w->is_sparse || !is_sparse_a || op != kPlain) return kInvalidValue;
  if (!is_aligned(dense) || !is_aligned(out) || !is_aligned(buffer)) return kInvalidValue;
  std::memset(buffer, 0xff, kWorkspaceBytes);
  const int64_t fours = w->columns / 4, item = bytes_of(w->type);
  uint8_t* tail = out + 2 * w->rows * fours * item;
  for (int64_t i = 0; i < w->rows * fours; ++i) {
    const uint8_t* four = dense + 4 * i * item;
    bool takes[4];
    int taken = 0, slot = 0;
    for (int j = 0; j < 4; ++j) {
      // Of 8 bits -0 is a place of its own: nobody may count on what becomes of it.
      takes[j] = item == 1 ? four[j] : value_of(four, j, w->type) != 0;
      taken += takes[j];
    }
    if (taken > 2) return kExecutionFailed;  // the library would leave one out
    for (int j = 3; taken < 2; --j) {        // which of the free ones, nobody may know
      if (!takes[j]) takes[j] = true, ++taken;
    }
    if (i % 2 == 0) tail[i / 2] = 0;
    for (int j = 0; j < 4; ++j) {
      if (!takes[j]) continue;
      const int64_t row = i / fours, column = i % fours * 2 + slot;
      const int64_t at = slots_in_columns ? column * w->rows + row : 2 * i + slot;
      std::memcpy(out + at * item, four + j * item, item);
      tail[i / 2] |= static_cast<uint8_t>(j << (i % 2 * 4 + slot++ * 2));
    }
  }
  return kSuccess;
}

int cusparseLtMatmul(const Handle* handle, Plan* p, const float* alpha, const uint8_t* w,
                     const uint8_t* x, const float* beta, const uint16_t* c, uint16_t* y,
                     char* workspace, void** streams, int count) {
  BEGIN("Matmul", handle, p);
  if (!are_made(p->selection, p->matmul, p->matmul->w, p->matmul->x, p->matmul->y))
    return kNotInitialized;
  if (!is_aligned(w) || !is_aligned(x) || !is_aligned(y) || !is_aligned(workspace))
    return kInvalidValue;
  if (c != y || *beta != 0 || !streams || count != 1) return kInvalidValue;
  std::memset(workspace, 0xff, kWorkspaceBytes);
  const uint16_t* bias = p->matmul->bias;
  const int64_t outputs = p->matmul->y->rows, tokens = p->matmul->y->columns;
  const int64_t ld = p->matmul->y->ld, x_ld = p->matmul->x->ld;
  const int64_t inputs = p->matmul->w->columns, fours = inputs / 4;
  const int type = p->matmul->x->type, out = p->matmul->y->type;
  const uint8_t* tail = w + outputs * inputs / 2 * bytes_of(type);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t n = 0; n < outputs; ++n) {
      float sum = 0;
      for (int64_t i = n * fours; i < (n + 1) * fours; ++i) {
        const int places = tail[i / 2] >> i % 2 * 4;
        const int64_t four = t * x_ld + i % fours * 4;
        sum += value_of(w, 2 * i, type) * value_of(x, four + (places & 3), type);
        sum += value_of(w, 2 * i + 1, type) * value_of(x, four + (places >> 2 & 3), type);
      }
      sum *= *alpha;
      y[t * ld + n] = rounded(bias ? sum + value_of(bias, n, out) : sum, out);
    }
  }
  Algorithm& algorithm = algorithms[p->selection->algorithm];
  ++algorithm.products, ++p->products, elapsed += algorithm.cost;
  uint16_t& last = y[ld * (tokens - 1) + outputs - 1];
  if (algorithm.behaviour == kWrong) last = rounded(value_of(&last, 0, out) + 1, out);
  if (algorithm.behaviour == kChanging && p->products % 8 == 0) last ^= 1;
  return kSuccess;
}

}  // extern "C"
