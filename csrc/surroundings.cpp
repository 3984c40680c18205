#include "surroundings.h"

namespace sk {

Surroundings* around;

namespace {

bool is_true(PyObject* function) {
  const Owned result = own(PyObject_CallNoArgs(function));
  return result && PyObject_IsTrue(result.get()) == 1;
}

bool is_negated(PyObject* tensor) {
  const Owned is_neg = own(PyObject_CallMethodNoArgs(tensor, around->is_neg.get()));
  return !is_neg || PyObject_IsTrue(is_neg.get());
}

}  // namespace

bool is_alone() {
  PyObject* watchers = around->watchers.get();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(watchers); ++i) {
    const Owned sees = own(PyObject_CallNoArgs(PyTuple_GET_ITEM(watchers, i)));
    if (!sees || PyObject_IsTrue(sees.get())) return false;
  }
  const Owned level = own(PyObject_GetAttr(around->forward_ad.get(), around->current_level.get()));
  if (!level || PyLong_AsLong(level.get()) >= 0) return false;
  const Owned profiling = own(PyObject_GetAttr(around->profiler.get(), around->is_profiling.get()));
  return profiling && !PyObject_IsTrue(profiling.get());
}

bool agrees_with_autocast(PyObject* tensor) {
  if (!is_true(around->is_autocast.get())) return !PyErr_Occurred();
  const Owned agrees = own(PyObject_CallOneArg(around->agrees.get(), tensor));
  return agrees && PyObject_IsTrue(agrees.get()) == 1;
}

bool is_grad_enabled() { return is_true(around->is_grad_enabled.get()); }

bool requires_grad(PyObject* tensor) {
  if (tensor == Py_None) return false;
  const Owned
    requires
  = own(PyObject_GetAttr(tensor, around->requires_grad.get()));
  return
    requires && PyObject_IsTrue
              (requires.get()) == 1;
}

bool read_fit(PyObject* tensor, Operand& t) {
  constexpr int kCuda = 2;  // of DLPack
  if (!t.read_view(tensor)) return false;
  // A view of memory that was freed has its offset as address: no tensor is so large.
  const bool is_far = reinterpret_cast<uintptr_t>(t.data) >> 40;
  if (!is_far && !Operand::is_there(tensor)) return false;
  if (t.device_type == kCuda && reinterpret_cast<uintptr_t>(t.data) % 16) return false;
  return !is_negated(tensor);
}

PyObject* leave() {
  if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) return nullptr;
  PyErr_Clear();
  Py_RETURN_NONE;
}

}  // namespace sk
