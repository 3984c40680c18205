// Calls of packed layers: as calls.cpp, for a weight that is in the buffers of a module.
#include <memory>
#include <vector>

#include "calls.h"
#include "capsules.h"
#include "surroundings.h"

namespace sk {
namespace {

constexpr char kCapsule[] = "sparsekern.packed_calls";

// The calls of one module, as long as its buffers are what they were when the first was prepared.
struct PackedCalls {
  struct Buffer {
    Owned name, tensor;
    void* data;
  };
  std::vector<Buffer> buffers;
  Calls calls;

  bool has(PyObject* now) const {
    for (const Buffer& buffer : buffers) {
      PyObject* tensor = PyDict_GetItemWithError(now, buffer.name.get());
      void* data = nullptr;
      if (tensor != buffer.tensor.get()) return false;
      if (tensor != Py_None && (!read_data(tensor, &data) || data != buffer.data)) return false;
    }
    return true;
  }

  // False with or without Python's error set.
  bool take(PyObject* now) {
    std::vector<Buffer> taken;
    PyObject *name, *tensor;
    for (Py_ssize_t at = 0; PyDict_Next(now, &at, &name, &tensor);) {
      void* data = nullptr;
      if (tensor != Py_None && !read_data(tensor, &data)) return false;
      taken.push_back({share(name), share(tensor), data});
    }
    Calls old;  // their end may call anything
    old.swap(calls);
    taken.swap(buffers);
    return true;
  }
};

PackedCalls* calls_of(PyObject* capsule) {
  return static_cast<PackedCalls*>(PyCapsule_GetPointer(capsule, kCapsule));
}

PyObject* packed_calls(PyObject*, PyObject*) {
  return capsule_of(std::make_unique<PackedCalls>(), kCapsule);
}

PyObject* call_packed(PyObject*, PyObject* const* args, Py_ssize_t count) {
  PackedCalls* kept = count == 3 && PyDict_Check(args[1]) ? calls_of(args[0]) : nullptr;
  if (!kept || !around || !is_alone()) return leave();
  PyObject* x = args[2];
  Operand read;
  if (!read_fit(x, read) || !can_be_key(read)) return leave();
  if (!agrees_with_autocast(x) || (is_grad_enabled() && requires_grad(x))) return leave();
  if (PyErr_Occurred()) return leave();
  const Key key(read.device_id, read.shape[read.ndim - 1], 0, read);
  const auto found = kept->has(args[1]) ? kept->calls.find(key) : kept->calls.end();
  if (found == kept->calls.end()) Py_RETURN_FALSE;
  const Owned call = share(found->second.get());
  return Prepared::of(call.get())->run(Slots({Py_None, x, Py_None, Py_None, Py_None}));
}

PyObject* keep_packed(PyObject*, PyObject* const* args, Py_ssize_t count) {
  PackedCalls* kept = count == 4 && PyDict_Check(args[1]) ? calls_of(args[0]) : nullptr;
  Operand read;
  if (!kept || !around || !read_fit(args[2], read) || !can_be_key(read) || !Prepared::of(args[3]))
    return leave();
  if (!kept->has(args[1]) || kept->calls.empty())
    if (!kept->take(args[1])) return leave();
  keep(kept->calls, Key(read.device_id, read.shape[read.ndim - 1], 0, read), args[3]);
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"packed_calls", packed_calls, METH_NOARGS, "packed_calls(): where a packed layer keeps some."},
    {"call_packed", fastcall(call_packed), METH_FASTCALL,
     "call_packed(calls, buffers, x): the product of a call that was kept for such an x and these\n"
     "buffers, False if there is none. None where the operands are not plain, somebody looks on or "
     "a\n"
     "gradient is wanted."},
    {"keep_packed", fastcall(keep_packed), METH_FASTCALL,
     "keep_packed(calls, buffers, x, prepared): for all x of this shape and type on this device."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_packed_call_functions(PyObject* module) {
  return PyModule_AddFunctions(module, functions) == 0;
}

}  // namespace sk
