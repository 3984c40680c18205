#include "packed_call.h"

#include <new>
#include <stdexcept>
#include <string>

#include "cpu/packed.h"
#include "tensors.h"

namespace sk {
namespace {

constexpr int kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat16 = 4;  // type codes

PyObject* new_empty;  // the method's name

struct Weight {
  LanesShape shape;
  Operand part_steps, heads, cols, values, bias;
  int64_t steps;

  // args: n, k, part_steps, heads, cols, values, bias. Whether all is as packing made it.
  bool read(PyObject* const* args) {
    shape = {PyLong_AsLongLong(args[0]), PyLong_AsLongLong(args[1])};
    if (shape.n < 0 || shape.k < 0) return false;
    if (!is(args[2], &part_steps, kInt, 64, 1, shape.parts() + 1)) return false;
    if (!is(args[3], &heads, kUnsigned, 8, 2, shape.blocks() * shape.groups())) return false;
    if (!read_operand(args[4], &cols) || cols.ndim != 2) return false;
    steps = cols.shape[0];
    if (!is(args[4], &cols, kUnsigned, 8, 2, steps) || cols.shape[1] != kLanesGroup) return false;
    if (!read_operand(args[5], &values) || !has_type_of(values) || values.ndim != 2) return false;
    if (values.shape[0] != steps || values.shape[1] != kLanesGroup) return false;
    bias.data = nullptr;
    return args[6] == Py_None || is(args[6], &bias, values.type_code, values.bits, 1, shape.n);
  }

 private:
  static bool is(PyObject* object, Operand* t, int type_code, int bits, int ndim, int64_t size) {
    return read_operand(object, t) && t->is_cpu && t->type_code == type_code && t->bits == bits &&
           t->ndim == ndim && t->shape[0] == size;
  }
  static bool has_type_of(const Operand& t) {
    return t.is_cpu && ((t.type_code == kFloat && t.bits == 32) || t.type_code == kBfloat16);
  }
};

// y, or null where a caller has to look closer, or with `failed` where the product has failed.
PyObject* multiply(PyObject* const* args, Py_ssize_t count, bool* failed) {
  Operand x;
  Weight w;
  if (count != 9 || !read_operand(args[0], &x) || !x.is_cpu || !w.read(args + 1)) return nullptr;
  if (x.ndim < 1 || x.shape[x.ndim - 1] != w.shape.k || x.type_code != w.values.type_code ||
      x.bits != w.values.bits)
    return nullptr;
  int64_t tokens = 1;
  for (int i = 0; i + 1 < x.ndim; i++) tokens *= x.shape[i];
  if (tokens * w.steps > w.shape.n * w.shape.k) return nullptr;  // W is written out (lanes.py)
  const auto threads = static_cast<int>(PyLong_AsLong(args[8]));
  if (PyErr_Occurred()) return nullptr;

  PyObject* sizes = PyTuple_New(x.ndim);
  if (!sizes) return nullptr;
  for (int i = 0; i < x.ndim; i++)
    PyTuple_SET_ITEM(sizes, i, PyLong_FromLongLong(i + 1 < x.ndim ? x.shape[i] : w.shape.n));
  PyObject* y = PyObject_CallMethodOneArg(args[0], new_empty, sizes);
  Py_DECREF(sizes);
  void* out = nullptr;
  if (!y || !read_data(y, &out)) {
    Py_XDECREF(y);
    return nullptr;
  }
  PyObject* error = nullptr;
  std::string what = "spmm_lanes: out of memory";
  Py_BEGIN_ALLOW_THREADS;
  try {
    spmm_lanes(w.shape, static_cast<const int64_t*>(w.part_steps.data),
               static_cast<const LanesHead*>(w.heads.data), w.steps,
               static_cast<const uint8_t*>(w.cols.data),
               w.values.type_code == kFloat ? Type::kFloat : Type::kBfloat16, w.values.data,
               w.bias.data, {x.data, w.shape.k}, {out, w.shape.n}, tokens, threads);
  } catch (const std::invalid_argument& wrong) {
    error = PyExc_ValueError;
    what = wrong.what();
  } catch (const std::bad_alloc&) {
    error = PyExc_MemoryError;
  }
  Py_END_ALLOW_THREADS;
  if (!error) return y;
  Py_DECREF(y);
  PyErr_SetString(error, what.c_str());
  *failed = true;
  return nullptr;
}

PyObject* multiply_lanes(PyObject*, PyObject* const* args, Py_ssize_t count) {
  bool failed = false;
  PyObject* y = multiply(args, count, &failed);
  if (y || failed) return y;
  PyErr_Clear();
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"multiply_lanes", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(multiply_lanes)),
     METH_FASTCALL,
     "multiply_lanes(x, n, k, part_steps, heads, cols, values, bias, threads): y [..., n] of\n"
     "x [..., k], or None for operands that it does not take and for so many tokens that W is to\n"
     "be written out."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_packed_functions(PyObject* module) {
  new_empty = PyUnicode_InternFromString("new_empty");
  return new_empty && PyModule_AddFunctions(module, functions) == 0;
}

}  // namespace sk
