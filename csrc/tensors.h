// What the binding reads of torch's tensors itself: where Python would ask each of them for a dozen
// attributes in every call. DLPack's table of C functions, which torch.Tensor carries, tells the
// same in one step, so nothing of torch is needed here at build time.
#pragma once

#include <Python.h>

namespace sk {

// Adds read_tensors_of() and fitting_tokens() to the module; false with Python's error set.
bool add_tensor_functions(PyObject* module);

// The address of a torch.Tensor's elements, null where it has none; false, with or without Python's
// error set, for anything else.
bool read_data(PyObject* tensor, void** address);

}  // namespace sk
