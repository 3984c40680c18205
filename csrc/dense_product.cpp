#include "dense_product.h"

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "launch.h"

namespace sk {
namespace {

// Of cublasLt.h.
using Matmul = int(void* handle, void* descriptor, const void* alpha, const void* a, void* a_layout,
                   const void* b, void* b_layout, const void* beta, const void* c, void* c_layout,
                   void* d, void* d_layout, const void* algorithm, void* workspace,
                   size_t workspace_bytes, void* stream);
using SetAttribute = int(void* descriptor, int attribute, const void* data, size_t bytes);
constexpr int kBias = 8;  // an attribute

// As Python fills it.
struct DenseProduct {
  Matmul* matmul;
  SetAttribute* set_attribute;
  void *handle, *descriptor, *a_layout, *b_layout, *out_layout, *algorithm;
  int64_t workspace_at, workspace_bytes;  // the first from where the scratch begins
};

// One handle is for one thread at a time, and so is a descriptor, which holds the bias.
std::mutex& mutex_of(const DenseProduct& p) {
  static std::mutex mutexes[64];
  return mutexes[reinterpret_cast<uintptr_t>(p.handle) / 64 % 64];
}

// product, a, b, out, bias or null, scratch
int launch(const char*, unsigned, unsigned, unsigned, unsigned, void* stream, void** args) {
  const auto pointer = [&](int i) { return *static_cast<char**>(args[i]); };
  const auto& p = *reinterpret_cast<const DenseProduct*>(pointer(0));
  void *out = pointer(3), *bias = pointer(4);
  void* workspace = p.workspace_bytes ? pointer(5) + p.workspace_at : nullptr;
  const float one = 1, zero = 0;
  const std::lock_guard<std::mutex> lock(mutex_of(p));
  if (bias) {
    const int status = p.set_attribute(p.descriptor, kBias, &bias, sizeof bias);
    if (status) return status;
  }
  return p.matmul(p.handle, p.descriptor, &one, pointer(1), p.a_layout, pointer(2), p.b_layout,
                  &zero, out, p.out_layout, out, p.out_layout, p.algorithm, workspace,
                  static_cast<size_t>(p.workspace_bytes), stream);
}

PyObject* dense_product(PyObject*, PyObject* words) {
  auto text_of = reinterpret_cast<TextOf*>(PyLong_AsVoidPtr(words));
  if (!text_of && PyErr_Occurred()) return nullptr;
  return launcher_of({launch, text_of, "status", "cublasLtMatmul", "PPPPPP"});
}

PyMethodDef functions[] = {
    {"dense_product", dense_product, METH_O,
     "dense_product(words): start(1, 1, 1, 0, stream, product, a, b, out, bias, scratch). words:\n"
     "the address of cublasLtGetStatusString. product: those of cublasLtMatmul and of\n"
     "cublasLtMatmulDescSetAttribute, of the handle, the descriptor, the layouts of a, b and out\n"
     "and the algorithm, where in the scratch a workspace begins, its bytes. RuntimeError with\n"
     "the library's words."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_dense_product(PyObject* module) { return PyModule_AddFunctions(module, functions) == 0; }

}  // namespace sk
