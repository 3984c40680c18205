// Products by a plan of cuSPARSELt (kernels/cuda/cusparselt.py) without a line of Python.
#pragma once

#include <Python.h>

namespace sk {

// Adds sparse_product() to the module; false with Python's error set.
bool add_sparse_product(PyObject* module);

}  // namespace sk
