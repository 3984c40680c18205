// Products from Python in one step: is anybody looking on, do the operands fit, which prepared call
// (prepared.h) is that of the pattern and the problem. All that is not plain is left to Python.
#pragma once

#include <Python.h>

namespace sk {

// Add set_up(), call() and forget_calls() to the module, and packed_calls(), call_packed() and
// keep_packed(); false with Python's error set.
bool add_call_functions(PyObject* module);
bool add_packed_call_functions(PyObject* module);

}  // namespace sk
