// Things of C++ that Python owns: in a capsule, or as the `self` of a function.
#pragma once

#include <Python.h>

#include <memory>

namespace sk {

// `name` is that of PyCapsule_New. Null with Python's error set.
template <class T>
PyObject* capsule_of(std::unique_ptr<T> thing, const char* name = nullptr) {
  PyObject* capsule = PyCapsule_New(thing.get(), name, [](PyObject* self) {
    delete static_cast<T*>(PyCapsule_GetPointer(self, PyCapsule_GetName(self)));
  });
  if (capsule) thing.release();
  return capsule;
}

// The method of this thing, in a capsule without a name.
template <class T>
PyObject* function_of(PyMethodDef* method, std::unique_ptr<T> self) {
  PyObject* capsule = capsule_of(std::move(self));
  if (!capsule) return nullptr;
  PyObject* function = PyCFunction_New(method, capsule);
  Py_DECREF(capsule);
  return function;
}

template <class F>
PyCFunction fastcall(F* function) {  // of METH_FASTCALL
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

}  // namespace sk
