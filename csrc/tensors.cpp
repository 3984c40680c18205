#include "tensors.h"

#include "capsules.h"

namespace sk {
namespace {

struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* older;
  void* of_managed_tensors[3];
  int (*read)(void* object, DLTensor* out);  // below 0: failed, with Python's error set
  void* current_work_stream;
};

PyTypeObject *tensor_type, *parameter_type;
const DLPackExchangeAPI* api;
PyObject *storage_offset, *untyped_storage, *nbytes;  // names of methods

PyObject* read_tensors_of(PyObject*, PyObject* type) {
  PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  if (!capsule) return nullptr;
  auto table =
      static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  while (table && table->major > 1) table = table->older;
  if (PyErr_Occurred()) return nullptr;
  if (!PyType_Check(type) || !table || table->major != 1 || !table->read)
    return PyErr_Format(PyExc_AttributeError, "%R has no exchange API of DLPack 1", type);
  PyObject* module = PyImport_ImportModule("torch.nn.parameter");
  PyObject* parameter = module ? PyObject_GetAttrString(module, "Parameter") : nullptr;
  Py_XDECREF(module);
  if (!parameter) return nullptr;
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter);
  tensor_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(type));
  api = table;
  Py_RETURN_NONE;
}

bool is_plain(PyObject* object) {
  return Py_TYPE(object) == tensor_type || Py_TYPE(object) == parameter_type;
}

// M, or -1.
int64_t find_tokens(PyObject* const* args, Py_ssize_t count) {
  if (!api || count < 8 || count % 2) return -1;
  const int64_t n = PyLong_AsLongLong(args[0]);
  if (n < 0) return -1;
  Operand rows, cols, first{};
  if (!rows.read(args[1]) || !rows.is_indices() || rows.shape[0] - 1 != n) return -1;
  if (!cols.read(args[2]) || !cols.is_indices() || !cols.is_on_device_of(rows)) return -1;
  for (Py_ssize_t i = 6; i < count; i += 2) {
    Operand x;
    if (!x.read(args[i]) || x.ndim != 2 || x.shape[1] != PyLong_AsLongLong(args[i + 1])) return -1;
    if (i == 6) first = x;
    if (x.shape[0] != first.shape[0] || !x.has_type_of(first) || !x.is_on_device_of(rows))
      return -1;
  }
  const auto is_vector = [&](PyObject* object, int64_t size) {
    Operand v;
    return object == Py_None || (v.read(object) && v.is_vector_like(first, size));
  };
  if (!is_vector(args[3], cols.shape[0])) return -1;
  if (!is_vector(args[4], PyLong_AsLongLong(args[5]))) return -1;
  return first.shape[0];
}

PyObject* fitting_tokens(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const int64_t m = find_tokens(args, count);
  if (m >= 0 && !PyErr_Occurred()) return PyLong_FromLongLong(m);
  PyErr_Clear();
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"read_tensors_of", read_tensors_of, METH_O,
     "Read the tensors of this type, torch.Tensor. AttributeError if it has no table for that."},
    {"fitting_tokens", fastcall(fitting_tokens), METH_FASTCALL,
     "fitting_tokens(n, row_offsets, col_indices, values, bias, outputs, x, width, ...): M if the\n"
     "indices are a pattern of n rows, values are [nnz] or None, bias [outputs] or None, each x\n"
     "[M, width], all of one dtype and on one device, each contiguous from the start of its\n"
     "memory; else None."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool Operand::read_view(PyObject* object) {
  // A method of another subclass may be anything, and change what was read before.
  if (!api || !is_plain(object)) return false;
  if (api->read(object, this) < 0) return false;
  int64_t size = 1;
  for (int i = ndim; i-- > 0; size *= shape[i])
    if (shape[i] != 1 && strides[i] != size) return false;
  return !byte_offset && (data || !size);
}

bool Operand::is_whole(PyObject* object) {
  PyObject* offset = PyObject_CallMethodNoArgs(object, storage_offset);
  if (!offset) return false;
  const bool is_whole = PyLong_AsLongLong(offset) == 0;
  Py_DECREF(offset);
  return is_whole;
}

bool Operand::is_there(PyObject* object) {
  if (is_whole(object)) return true;
  if (PyErr_Occurred()) return false;
  PyObject* storage = PyObject_CallMethodNoArgs(object, untyped_storage);
  PyObject* bytes = storage ? PyObject_CallMethodNoArgs(storage, nbytes) : nullptr;
  const bool is_there = bytes && PyLong_AsLongLong(bytes) > 0;
  Py_XDECREF(bytes);
  Py_XDECREF(storage);
  return is_there;
}

bool read_data(PyObject* tensor, void** address) {
  DLTensor t;
  if (!api || !is_plain(tensor) || api->read(tensor, &t) < 0) return false;
  *address = t.data ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
  return true;
}

bool add_tensor_functions(PyObject* module) {
  storage_offset = PyUnicode_InternFromString("storage_offset");
  untyped_storage = PyUnicode_InternFromString("untyped_storage");
  nbytes = PyUnicode_InternFromString("nbytes");
  return storage_offset && untyped_storage && nbytes &&
         PyModule_AddFunctions(module, functions) == 0;
}

}  // namespace sk
