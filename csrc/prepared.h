// A product whose steps are known beforehand: allocations, launches and calls of torch, in a row.
// Python describes it once a problem and pattern (kernels/steps.py); it runs with no bytecode.
#pragma once

#include <Python.h>

#include <array>
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

constexpr int kOperands = 5;  // values, a, b, row_offsets, col_indices: the first slots

// Slots of a call that runs: what is there, and where, which is read when it is asked for.
struct Slots {
  static constexpr int kMost = 24;
  static constexpr int64_t kUnknown = -1;
  PyObject* objects[kMost];
  int64_t addresses[kMost];

  explicit Slots(const std::array<PyObject*, kOperands>& operands);
  // False with Python's error set for what has none.
  bool find(int slot, int64_t* address);
};

class Prepared {
 public:
  // prepared(device, current, stream, capturing, steps, results), see kernels/steps.py.
  static PyObject* make(PyObject* const* args, Py_ssize_t count);
  static Prepared* of(PyObject* capsule);  // null for any other object

  // The results for these operands, one or a tuple; None where a CUDA graph is captured, another
  // GPU is the current one or a step gives NotImplemented; null with Python's error set.
  PyObject* run(Slots slots) const;

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
    Owned names;            // of the last arguments of a call, or null
    std::vector<int> last;  // results of steps before that nobody needs after this one
  };

  bool read_step(PyObject* step);
  PyObject* take(const Step& step, Slots& slots, PyObject* stream, int64_t stream_handle) const;

  // device_ is null where nothing is launched, current_ where there is one GPU.
  Owned device_, current_, stream_, capturing_;
  std::vector<Step> steps_;
  std::vector<int> results_;
};

bool add_prepared_functions(PyObject* module);

}  // namespace sk
