// Products from Python in one step: is anybody looking on, do the operands fit, which prepared call
// (prepared.h) is that of the pattern and the problem. All that is not plain is left to Python.
#pragma once

#include <Python.h>

namespace sk {

// Adds set_up(), call(), call_inside() and forget_calls() to the module.
bool add_call_functions(PyObject* module);

}  // namespace sk
