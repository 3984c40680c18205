// Launches of CUDA kernels from Python in one step: the addresses of tensors are read here
// (tensors.h) and the arguments collected where the driver reads them.
#pragma once

#include <Python.h>

namespace sk {

// Adds launcher() to the module; false with Python's error set.
bool add_launch_functions(PyObject* module);

}  // namespace sk
