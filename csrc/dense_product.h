// Products by an algorithm of cuBLASLt (kernels/cuda/cublaslt.py) without a line of Python:
// launches as those of kernels (launch.h), whose first argument says which product.
#pragma once

#include <Python.h>

namespace sk {

// Adds dense_product() to the module; false with Python's error set.
bool add_dense_product(PyObject* module);

}  // namespace sk
