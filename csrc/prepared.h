// A product whose steps are known beforehand: allocations, launches and calls of torch, in a row.
// Python describes it once a problem and pattern (kernels/steps.py); it runs with no bytecode.
#pragma once

#include <Python.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "launch.h"

namespace sk {

// A reference that is owned.
struct Decref {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Decref>;

inline Owned own(PyObject* object) { return Owned(object); }
inline Owned share(PyObject* object) { return Owned(Py_NewRef(object)); }

// Their slots are the first ones, in this order.
struct Operands {
  PyObject *values, *a, *b, *row_offsets, *col_indices;
};

class Prepared {
 public:
  // prepared(device, current, stream, capturing, steps, results), see kernels/steps.py.
  static PyObject* make(PyObject* const* args, Py_ssize_t count);
  static Prepared* of(PyObject* capsule);  // null for any other object

  // The results for these operands, one or a tuple; None where a CUDA graph is captured or
  // another GPU is the current one; null with Python's error set.
  PyObject* run(const Operands& operands) const;

 private:
  struct Argument {
    int slot;        // the operand or result that it is; below 0: `object`
    Owned object;    // what it is, or keeps alive
    int64_t number;  // of a launch
  };
  struct Step {
    Owned function;
    const Kernel* kernel;  // that `function` starts; null: it is called
    int64_t sizes[4];      // of a launch; the grid's first is 0 for a call
    std::vector<Argument> arguments;
    Owned names;  // of the last arguments of a call, or null
  };

  bool read_step(PyObject* step);
  PyObject* take(const Step& step, PyObject* const* slots, PyObject* stream,
                 int64_t stream_handle) const;

  Owned device_, current_, stream_, capturing_;  // device_ is null on a CPU
  std::vector<Step> steps_;
  std::vector<int> results_;
};

bool add_prepared_functions(PyObject* module);

}  // namespace sk
