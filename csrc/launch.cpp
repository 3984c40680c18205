#include "launch.h"

#include <memory>
#include <vector>

#include "capsules.h"
#include "tensors.h"

namespace sk {

int read_int(PyObject* object, int64_t* to) {
  if (!PyLong_Check(object)) return -1;
  int overflows;
  *to = PyLong_AsLongLongAndOverflow(object, &overflows);
  return overflows || *to != static_cast<int32_t>(*to) ? -1 : 0;
}

int read_address(PyObject* object, int64_t* to) {
  void* address = nullptr;
  if (object == Py_None) {
    *to = 0;
  } else if (PyLong_Check(object)) {
    *to = static_cast<int64_t>(PyLong_AsUnsignedLongLong(object));
  } else if (read_data(object, &address)) {
    *to = reinterpret_cast<int64_t>(address);
  } else {  // a subclass
    PyErr_Clear();
    PyObject* number = PyObject_CallMethod(object, "data_ptr", nullptr);
    if (!number) return -1;
    *to = static_cast<int64_t>(PyLong_AsUnsignedLongLong(number));
    Py_DECREF(number);
  }
  return PyErr_Occurred() ? -1 : 0;
}

bool start_kernel(const Kernel& kernel, const int64_t* sizes, int64_t stream, void** addresses) {
  int code;
  Py_BEGIN_ALLOW_THREADS;
  code = kernel.launch(kernel.name.c_str(), sizes[0], sizes[1], sizes[2], sizes[3],
                       reinterpret_cast<void*>(stream), addresses);
  Py_END_ALLOW_THREADS;
  if (code)
    PyErr_Format(PyExc_RuntimeError, "%s: %s (%s %d)", kernel.name.c_str(), kernel.text_of(code),
                 kernel.kind_of_code, code);
  return !code;
}

namespace {

constexpr int kFirstArgument = 5;  // of a call, after the grid, the block, smem_bytes, the stream

PyObject* refuse(const Kernel& kernel, PyObject* const* args, Py_ssize_t count) {
  PyErr_Clear();
  PyObject* got = PyTuple_New(count);
  if (!got) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) PyTuple_SET_ITEM(got, i, Py_NewRef(args[i]));
  PyErr_Format(PyExc_TypeError,
               "%s: expected %zd arguments, '%s' (P a tensor, an address or None, i an int32), "
               "got %R",
               kernel.name.c_str(), kernel.signature.size(), kernel.signature.c_str(), got);
  Py_DECREF(got);
  return nullptr;
}

PyObject* start(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  auto* kernel = static_cast<Kernel*>(PyCapsule_GetPointer(self, nullptr));
  if (!kernel) return nullptr;
  const auto parameters = static_cast<Py_ssize_t>(kernel->signature.size());
  int64_t sizes[kFirstArgument - 1], stream;
  bool fits = count == kFirstArgument + parameters;
  for (int i = 0; fits && i < kFirstArgument - 1; ++i) fits = !read_int(args[i], &sizes[i]);
  fits = fits && !read_address(args[kFirstArgument - 1], &stream);
  std::vector<int64_t> values(parameters);
  std::vector<void*> addresses(parameters);
  for (Py_ssize_t i = 0; fits && i < parameters; ++i) {
    PyObject* argument = args[kFirstArgument + i];
    fits = !(kernel->signature[i] == 'P' ? read_address : read_int)(argument, &values[i]);
    addresses[i] = &values[i];
  }
  if (!fits) {
    const Py_ssize_t first = count < kFirstArgument ? count : kFirstArgument;
    return refuse(*kernel, args + first, count - first);
  }
  if (!start_kernel(*kernel, sizes, stream, addresses.data())) return nullptr;
  Py_RETURN_NONE;
}

PyMethodDef start_method = {
    "start", fastcall(start), METH_FASTCALL,
    "start(grid_x, grid_y, block, smem_bytes, stream, *arguments): launch the kernel."};

PyObject* launcher(PyObject*, PyObject* args) {
  unsigned long long launch, text_of;
  const char *name, *signature;
  if (!PyArg_ParseTuple(args, "KKss:launcher", &launch, &text_of, &name, &signature))
    return nullptr;
  return launcher_of({reinterpret_cast<Launch*>(launch), reinterpret_cast<TextOf*>(text_of),
                      "CUDA error", name, signature});
}

PyMethodDef functions[] = {
    {"launcher", launcher, METH_VARARGS,
     "launcher(sk_launch, sk_error, name, signature): start(grid_x, grid_y, block, smem_bytes,\n"
     "stream, *arguments) of that kernel, by the addresses of both functions of _sk_cuda.so.\n"
     "TypeError for arguments that do not fit the signature, RuntimeError with CUDA's words."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyObject* launcher_of(Kernel kernel) {
  return function_of(&start_method, std::make_unique<Kernel>(std::move(kernel)));
}

const Kernel* kernel_of(PyObject* start) {
  if (!PyCFunction_Check(start) || PyCFunction_GetFunction(start) != start_method.ml_meth)
    return nullptr;
  return static_cast<Kernel*>(PyCapsule_GetPointer(PyCFunction_GetSelf(start), nullptr));
}

bool add_launch_functions(PyObject* module) {
  return PyModule_AddFunctions(module, functions) == 0;
}

}  // namespace sk
