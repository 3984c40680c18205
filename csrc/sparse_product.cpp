#include "sparse_product.h"

#include <cstddef>
#include <memory>

#include "capsules.h"
#include "launch.h"
#include "prepared.h"

namespace sk {
namespace {

// Of cusparseLt.h.
using Matmul = int(const void* handle, const void* plan, const void* alpha, const void* a,
                   const void* b, const void* beta, const void* c, void* d, void* workspace,
                   void** streams, int streams_count);
using SetAttribute = int(const void* handle, void* matmul, int attribute, const void* data,
                         size_t bytes);

constexpr int kStream = 4, kFirst = 5;  // of a call, after four numbers that have no meaning

struct Product {
  Owned plan, other_way;  // the plan; what multiplies in another thread than its own
  unsigned long thread;
  Matmul* matmul;
  SetAttribute* set_attribute;
  TextOf* text_of;
  void *handle, *plan_at, *matmul_at;
  int64_t workspace_at;  // bytes behind the begin of the operand
  int bias_attribute;
  int64_t bias;  // that the plan has
};

// start(_, _, _, _, stream, operand, x, y, bias)
PyObject* start(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  auto* product = static_cast<Product*>(PyCapsule_GetPointer(self, nullptr));
  if (!product) return nullptr;
  if (count != kFirst + 4) {
    PyErr_SetString(PyExc_TypeError, "sparse_product: expected 9 arguments");
    return nullptr;
  }
  if (PyThread_get_thread_ident() != product->thread)
    return PyObject_Vectorcall(product->other_way.get(), args + kFirst, 4, nullptr);
  int64_t stream, at[4];
  bool fits = !read_address(args[kStream], &stream);
  for (int i = 0; fits && i < 4; ++i) fits = !read_address(args[kFirst + i], &at[i]);
  if (!fits) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "sparse_product: expected tensors");
    return nullptr;
  }
  const float one = 1, zero = 0;
  const auto [operand, x, y, bias] = at;
  int status = 0;
  Py_BEGIN_ALLOW_THREADS;
  if (bias && bias != product->bias)
    status = product->set_attribute(product->handle, product->matmul_at, product->bias_attribute,
                                    &bias, sizeof(void*));
  if (!status) {
    product->bias = bias;
    void* streams[] = {reinterpret_cast<void*>(stream)};
    const auto to = [](int64_t address) { return reinterpret_cast<void*>(address); };
    status = product->matmul(product->handle, product->plan_at, &one, to(operand), to(x), &zero,
                             to(y), to(y), to(operand + product->workspace_at), streams, 1);
  }
  Py_END_ALLOW_THREADS;
  if (status)
    return PyErr_Format(PyExc_RuntimeError, "cusparseLtMatmul: %s (status %d)",
                        product->text_of(status), status);
  Py_RETURN_NONE;
}

PyMethodDef start_method = {"start", fastcall(start), METH_FASTCALL,
                            "start(_, _, _, _, stream, operand, x, y, bias)"};

PyObject* sparse_product(PyObject*, PyObject* args) {
  PyObject *plan, *other_way;
  unsigned long long matmul, set_attribute, text_of, handle, plan_at, matmul_at;
  long long workspace_at;
  int bias_attribute;
  if (!PyArg_ParseTuple(args, "OOKKKKKKLi:sparse_product", &plan, &other_way, &matmul,
                        &set_attribute, &text_of, &handle, &plan_at, &matmul_at, &workspace_at,
                        &bias_attribute))
    return nullptr;
  const auto to = [](unsigned long long address) { return reinterpret_cast<void*>(address); };
  std::unique_ptr<Product> product(new Product{
      share(plan), share(other_way), PyThread_get_thread_ident(), reinterpret_cast<Matmul*>(matmul),
      reinterpret_cast<SetAttribute*>(set_attribute), reinterpret_cast<TextOf*>(text_of),
      to(handle), to(plan_at), to(matmul_at), workspace_at, bias_attribute, 0});
  return function_of(&start_method, std::move(product));
}

PyMethodDef functions[] = {
    {"sparse_product", sparse_product, METH_VARARGS,
     "sparse_product(plan, other_way, matmul, set_attribute, words, handle, plan_at, matmul_at,\n"
     "workspace_at, bias_attribute): start(..) of a plan that nobody else uses, in this thread;\n"
     "other_way(operand, x, y, bias) in others. The workspace is in the operand's memory.\n"
     "RuntimeError with the library's words."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_sparse_product(PyObject* module) { return PyModule_AddFunctions(module, functions) == 0; }

}  // namespace sk
