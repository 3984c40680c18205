// A product of a weight packed for a CPU in one step from Python: with small weights what Python
// and pybind11 take for a dozen arguments is as much as the product.
#pragma once

#include <Python.h>

namespace sk {

// Adds multiply_lanes() to the module; false with Python's error set.
bool add_packed_functions(PyObject* module);

}  // namespace sk
