// A stand-in for libcusparseLt without a GPU: the functions that sparsekern/kernels/cuda/
// cusparselt.py calls, in bfloat16, on host memory. It is stricter than the library: a struct that
// was never made, was moved, copied or destroyed, or whose handle is another thread's is refused.
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
constexpr int kBfloat16 = 14, kFloat32 = 2, kRow = 2, kColumn = 1, kSparsity50 = 0;
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
bool slots_in_columns = false;

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
  int order;
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

float to_float(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

int describe(Matrix* out, int64_t rows, int64_t columns, int64_t ld, uint32_t alignment, int type,
             int order, bool is_sparse) {
  const int multiple = is_sparse ? 16 : 8;
  if (rows % multiple || columns % multiple || type != kBfloat16) return kNotSupported;
  const int64_t least = order == kRow ? columns : rows;
  if (ld < least || (is_sparse && ld != least) || ld % 8 || alignment != 16 || !make(out))
    return kInvalidValue;
  out->rows = rows, out->columns = columns, out->ld = ld;
  out->order = order, out->is_sparse = is_sparse;
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
int standin_products(int id) { return algorithms[id].products; }
int standin_live() { return live; }  // plans and selections
int standin_elapsed() { return elapsed; }
void standin_reset() {
  failures.clear(), algorithms.clear();
  version[1] = 8, slots_in_columns = false;
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
  m->tag = 0;
  return kSuccess;
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
  out->w = w, out->x = x, out->y = y, out->bias = nullptr;
  return kSuccess;
}

int cusparseLtMatmulDescSetAttribute(const Handle* handle, Matmul* m, int which, const void* data,
                                     size_t bytes) {
  BEGIN("MatmulDescSetAttribute", handle, m);
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
  *bytes = w->rows * w->columns / 8 * 9, *buffer_bytes = kWorkspaceBytes;
  return kSuccess;
}

int cusparseLtSpMMACompress2(const Handle* handle, const Matrix* w, int is_sparse_a, int op,
                             const uint16_t* dense, uint16_t* out, char* buffer, void*) {
  BEGIN("SpMMACompress2", handle, w);
  if (!w->is_sparse || !is_sparse_a || op != kPlain) return kInvalidValue;
  if (!is_aligned(dense) || !is_aligned(out) || !is_aligned(buffer)) return kInvalidValue;
  std::memset(buffer, 0xff, kWorkspaceBytes);
  const int64_t fours = w->columns / 4;
  uint8_t* tail = reinterpret_cast<uint8_t*>(out + 2 * w->rows * fours);
  for (int64_t i = 0; i < w->rows * fours; ++i) {
    const uint16_t* four = dense + 4 * i;
    bool takes[4];
    int taken = 0, slot = 0;
    for (int j = 0; j < 4; ++j) taken += takes[j] = four[j] & 0x7fff;
    if (taken > 2) return kExecutionFailed;  // the library would leave one out
    for (int j = 3; taken < 2; --j) {        // which of the free ones, nobody may know
      if (!takes[j]) takes[j] = true, ++taken;
    }
    if (i % 2 == 0) tail[i / 2] = 0;
    for (int j = 0; j < 4; ++j) {
      if (!takes[j]) continue;
      const int64_t row = i / fours, column = i % fours * 2 + slot;
      out[slots_in_columns ? column * w->rows + row : 2 * i + slot] = four[j];
      tail[i / 2] |= static_cast<uint8_t>(j << (i % 2 * 4 + slot++ * 2));
    }
  }
  return kSuccess;
}

int cusparseLtMatmul(const Handle* handle, Plan* p, const float* alpha, const uint16_t* w,
                     const uint16_t* x, const float* beta, const uint16_t* c, uint16_t* y,
                     char* workspace, void** streams, int count) {
  BEGIN("Matmul", handle, p);
  if (!are_made(p->selection, p->matmul, p->matmul->w, p->matmul->x, p->matmul->y))
    return kNotInitialized;
  if (!is_aligned(w) || !is_aligned(x) || !is_aligned(y) || !is_aligned(workspace))
    return kInvalidValue;
  if (c != y || *alpha != 1 || *beta != 0 || !streams || count != 1) return kInvalidValue;
  std::memset(workspace, 0xff, kWorkspaceBytes);
  const uint16_t* bias = p->matmul->bias;
  const int64_t outputs = p->matmul->y->rows, tokens = p->matmul->y->columns;
  const int64_t ld = p->matmul->y->ld, x_ld = p->matmul->x->ld;
  const int64_t inputs = p->matmul->w->columns, fours = inputs / 4;
  const uint8_t* tail = reinterpret_cast<const uint8_t*>(w + outputs * inputs / 2);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t n = 0; n < outputs; ++n) {
      float sum = 0;
      for (int64_t i = n * fours; i < (n + 1) * fours; ++i) {
        const int places = tail[i / 2] >> i % 2 * 4;
        const uint16_t* four = x + t * x_ld + i % fours * 4;
        sum += to_float(w[2 * i]) * to_float(four[places & 3]);
        sum += to_float(w[2 * i + 1]) * to_float(four[places >> 2 & 3]);
      }
      y[t * ld + n] = to_bfloat16(bias ? sum + to_float(bias[n]) : sum);
    }
  }
  Algorithm& algorithm = algorithms[p->selection->algorithm];
  ++algorithm.products, ++p->products, elapsed += algorithm.cost;
  uint16_t& last = y[ld * (tokens - 1) + outputs - 1];
  if (algorithm.behaviour == kWrong) last = to_bfloat16(to_float(last) + 1);
  if (algorithm.behaviour == kChanging && p->products % 8 == 0) last ^= 1;
  return kSuccess;
}

}  // extern "C"
