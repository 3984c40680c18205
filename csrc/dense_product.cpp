#include "dense_product.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "launch.h"
#include "prepared.h"

namespace sk {
namespace {

// Of cublasLt.h.
using Matmul = int(void* handle, void* descriptor, const void* alpha, const void* a, void* a_layout,
                   const void* b, void* b_layout, const void* beta, const void* c, void* c_layout,
                   void* d, void* d_layout, const void* algorithm, void* workspace,
                   size_t workspace_bytes, void* stream);
using SetAttribute = int(void* descriptor, int attribute, const void* data, size_t bytes);

constexpr int kStream = 4, kFirst = 5;  // of a call, after four numbers that have no meaning

struct DenseProduct {
  Owned product;  // of Python, which owns all that is pointed to
  Matmul* matmul;
  SetAttribute* set_attribute;
  void *handle, *descriptor, *a_layout, *b_layout, *out_layout, *algorithm;
  int64_t workspace_at, workspace_bytes;
  int bias_attribute;
};

// One handle is for one thread at a time, and so is a descriptor, which holds the bias.
std::mutex& mutex_of(const DenseProduct& p) {
  static std::mutex mutexes[64];
  return mutexes[reinterpret_cast<uintptr_t>(p.handle) / 64 % 64];
}

void* to(int64_t address) { return reinterpret_cast<void*>(address); }

// start(_, _, _, _, stream, a, b, out, bias, scratch)
PyObject* start(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const auto* p = static_cast<DenseProduct*>(PyCapsule_GetPointer(self, nullptr));
  if (!p) return nullptr;
  int64_t stream, at[5];
  bool fits = count == kFirst + 5 && !read_address(args[kStream], &stream);
  for (int i = 0; fits && i < 5; ++i) fits = !read_address(args[kFirst + i], &at[i]);
  if (!fits) {
    if (!PyErr_Occurred())
      PyErr_SetString(PyExc_TypeError, "dense_product: expected four numbers, a stream, tensors");
    return nullptr;
  }
  const float one = 1, zero = 0;
  const auto [a, b, out, bias, scratch] = at;
  void* workspace = p->workspace_bytes ? to(scratch + p->workspace_at) : nullptr;
  int status = 0;
  Py_BEGIN_ALLOW_THREADS;
  {
    const std::lock_guard<std::mutex> lock(mutex_of(*p));
    if (bias) status = p->set_attribute(p->descriptor, p->bias_attribute, &bias, sizeof(void*));
    if (!status)
      status = p->matmul(p->handle, p->descriptor, &one, to(a), p->a_layout, to(b), p->b_layout,
                         &zero, to(out), p->out_layout, to(out), p->out_layout, p->algorithm,
                         workspace, static_cast<size_t>(p->workspace_bytes), to(stream));
  }
  Py_END_ALLOW_THREADS;
  if (status) return PyErr_Format(PyExc_RuntimeError, "cublasLtMatmul: status %d", status);
  Py_RETURN_NONE;
}

PyMethodDef start_method = {"start", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(start)),
                            METH_FASTCALL, "start(_, _, _, _, stream, a, b, out, bias, scratch)"};

void forget(PyObject* capsule) {
  delete static_cast<DenseProduct*>(PyCapsule_GetPointer(capsule, nullptr));
}

PyObject* dense_product(PyObject*, PyObject* args) {
  PyObject* product;
  unsigned long long matmul, set_attribute, at[6];
  long long workspace_at, workspace_bytes;
  int bias_attribute;
  if (!PyArg_ParseTuple(args, "OKKKKKKKKLLi:dense_product", &product, &matmul, &set_attribute,
                        &at[0], &at[1], &at[2], &at[3], &at[4], &at[5], &workspace_at,
                        &workspace_bytes, &bias_attribute))
    return nullptr;
  const auto of = [&](int i) { return reinterpret_cast<void*>(at[i]); };
  std::unique_ptr<DenseProduct> made(
      new DenseProduct{share(product), reinterpret_cast<Matmul*>(matmul),
                       reinterpret_cast<SetAttribute*>(set_attribute), of(0), of(1), of(2), of(3),
                       of(4), of(5), workspace_at, workspace_bytes, bias_attribute});
  PyObject* capsule = PyCapsule_New(made.get(), nullptr, forget);
  if (!capsule) return nullptr;
  made.release();
  PyObject* function = PyCFunction_New(&start_method, capsule);
  Py_DECREF(capsule);
  return function;
}

PyMethodDef functions[] = {
    {"dense_product", dense_product, METH_VARARGS,
     "dense_product(product, matmul, set_attribute, handle, descriptor, a, b, out, algorithm,\n"
     "workspace_at, workspace_bytes, bias_attribute): start(..) of a product whose layouts and\n"
     "algorithm are these addresses. The workspace is in the scratch. RuntimeError with the\n"
     "library's status."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_dense_product(PyObject* module) { return PyModule_AddFunctions(module, functions) == 0; }

}  // namespace sk
