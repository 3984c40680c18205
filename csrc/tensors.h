// What the binding reads of torch's tensors itself: where Python would ask each of them for a dozen
// attributes in every call. DLPack's table of C functions, which torch.Tensor carries, tells the
// same in one step, so nothing of torch is needed here at build time.
#pragma once

#include <Python.h>

#include <cstdint>

namespace sk {

// Adds read_tensors_of() and fitting_tokens() to the module; false with Python's error set.
bool add_tensor_functions(PyObject* module);

// The address of a torch.Tensor's elements, null where it has none; false, with or without Python's
// error set, for anything else.
bool read_data(PyObject* tensor, void** address);

// A tensor whose elements lie where a kernel reads them: contiguous, from the start of memory that
// is there.
struct Operand {
  void* data;
  int ndim;
  const int64_t* shape;  // of the tensor: as long as it lives and keeps its shape
  int type_code, bits;   // 0 int, 1 unsigned, 2 float, 4 bfloat16
  bool is_cpu;
};

// False, with or without Python's error set, for anything else.
bool read_operand(PyObject* tensor, Operand* to);

}  // namespace sk
