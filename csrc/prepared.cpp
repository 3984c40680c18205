#include "prepared.h"

#include <algorithm>

#include "capsules.h"
#include "tensors.h"

namespace sk {
namespace {

constexpr int kMostArguments = 32;
constexpr char kCapsule[] = "sparsekern.prepared";

}  // namespace

Slots::Slots(const std::array<PyObject*, kOperands>& operands) {
  for (int i = 0; i < kMost; ++i) {
    objects[i] = i < kOperands ? operands[i] : nullptr;
    addresses[i] = kUnknown;
  }
}

bool Slots::find(int slot, int64_t* address) {
  if (addresses[slot] == kUnknown && read_address(objects[slot], &addresses[slot])) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "prepared: expected a tensor");
    return false;
  }
  *address = addresses[slot];
  return true;
}

Prepared* Prepared::of(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, kCapsule)) return nullptr;
  return static_cast<Prepared*>(PyCapsule_GetPointer(capsule, kCapsule));
}

PyObject* Prepared::make(PyObject* const* args, Py_ssize_t count) {
  if (count != 6 || !PyTuple_Check(args[4]) || !PyTuple_Check(args[5])) {
    PyErr_SetString(PyExc_TypeError,
                    "prepared: expected device, current, stream, capturing, steps, results");
    return nullptr;
  }
  auto made = std::make_unique<Prepared>();
  if (args[0] != Py_False) made->device_ = share(args[0]);
  if (args[1] != Py_None) made->current_ = share(args[1]);
  made->stream_ = share(args[2]);
  made->capturing_ = share(args[3]);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[4]); ++i)
    if (!made->read_step(PyTuple_GET_ITEM(args[4], i))) return nullptr;
  const auto slots = kOperands + static_cast<int>(made->steps_.size());
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[5]); ++i)
    made->results_.push_back(static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(args[5], i))));
  bool fits = slots <= Slots::kMost && !made->results_.empty();
  for (int slot : made->results_) fits = fits && slot >= 0 && slot < slots;
  for (const Step& step : made->steps_)
    for (const Argument& argument : step.arguments) fits = fits && argument.slot < slots;
  if (!fits || PyErr_Occurred()) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "prepared: a slot that is not there");
    return nullptr;
  }
  for (int slot = kOperands; slot < slots; ++slot) {
    const auto& results = made->results_;
    if (std::find(results.begin(), results.end(), slot) != results.end()) continue;
    size_t last = slot - kOperands;
    for (size_t i = last; i < made->steps_.size(); ++i)
      for (const Argument& argument : made->steps_[i].arguments)
        if (argument.slot == slot) last = i;
    made->steps_[last].last.push_back(slot);
  }
  return capsule_of(std::move(made), kCapsule);
}

// (function, sizes or None, arguments, slots, names or None)
bool Prepared::read_step(PyObject* step) {
  PyObject *function, *sizes, *arguments, *slots, *names;
  if (!PyArg_ParseTuple(step, "OOO!O!O:prepared", &function, &sizes, &PyTuple_Type, &arguments,
                        &PyTuple_Type, &slots, &names))
    return false;
  Step read{share(function), nullptr, {}, {}, names == Py_None ? nullptr : share(names), {}};
  if (sizes != Py_None) {
    if (!PyArg_ParseTuple(sizes, "LLLL", &read.sizes[0], &read.sizes[1], &read.sizes[2],
                          &read.sizes[3]))
      return false;
    read.kernel = kernel_of(function);
  }
  const Py_ssize_t count = PyTuple_GET_SIZE(arguments);
  if (PyTuple_GET_SIZE(slots) != count || count > kMostArguments ||
      (read.kernel && read.kernel->signature.size() != static_cast<size_t>(count))) {
    PyErr_Format(PyExc_TypeError, "prepared: %R does not take %zd arguments", function, count);
    return false;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* object = PyTuple_GET_ITEM(arguments, i);
    Argument argument{static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(slots, i))), share(object),
                      0};
    if (PyErr_Occurred()) return false;
    if (read.kernel && argument.slot < 0) {
      const bool is_address = read.kernel->signature[i] == 'P';
      if ((is_address ? read_address : read_int)(object, &argument.number)) {
        if (!PyErr_Occurred())
          PyErr_Format(PyExc_TypeError, "%s: argument %zd: got %R", read.kernel->name.c_str(), i,
                       object);
        return false;
      }
    }
    read.arguments.push_back(std::move(argument));
  }
  steps_.push_back(std::move(read));
  return true;
}

PyObject* Prepared::take(const Step& step, Slots& slots, PyObject* stream,
                         int64_t stream_handle) const {
  if (step.kernel) {
    int64_t numbers[kMostArguments];
    void* addresses[kMostArguments];
    for (size_t i = 0; i < step.arguments.size(); ++i) {
      const Argument& argument = step.arguments[i];
      numbers[i] = argument.number;
      addresses[i] = &numbers[i];
      if (argument.slot >= 0 && !slots.find(argument.slot, &numbers[i])) return nullptr;
    }
    if (!start_kernel(*step.kernel, step.sizes, stream_handle, addresses)) return nullptr;
    Py_RETURN_NONE;
  }
  PyObject* arguments[kMostArguments + 6];
  size_t count = 0;
  arguments[count++] = nullptr;  // vectorcall may use it
  Owned numbers[5];
  if (step.sizes[0]) {  // a launch by Python
    for (int i = 0; i < 4; ++i) {
      numbers[i] = own(PyLong_FromLongLong(step.sizes[i]));
      if (!numbers[i]) return nullptr;
      arguments[count++] = numbers[i].get();
    }
    arguments[count++] = stream;
  }
  for (const Argument& argument : step.arguments)
    arguments[count++] = argument.slot >= 0 ? slots.objects[argument.slot] : argument.object.get();
  const size_t named = step.names ? PyTuple_GET_SIZE(step.names.get()) : 0;
  return PyObject_Vectorcall(step.function.get(), arguments + 1,
                             (count - 1 - named) | PY_VECTORCALL_ARGUMENTS_OFFSET,
                             step.names.get());
}

PyObject* Prepared::run(Slots slots) const {
  Owned stream;
  int64_t stream_handle = 0;
  if (device_) {
    if (current_) {
      const Owned current = own(PyObject_CallNoArgs(current_.get()));
      if (!current) return nullptr;
      const int is_here = PyObject_RichCompareBool(current.get(), device_.get(), Py_EQ);
      if (is_here < 0) return nullptr;
      if (!is_here) Py_RETURN_NONE;
    }
    stream = own(PyObject_CallOneArg(stream_.get(), device_.get()));
    if (!stream || read_address(stream.get(), &stream_handle)) return nullptr;
    if (stream_handle) {  // no graph captures the default stream
      const Owned capturing = own(PyObject_CallNoArgs(capturing_.get()));
      const int is_captured = capturing ? PyObject_IsTrue(capturing.get()) : -1;
      if (is_captured < 0) return nullptr;
      if (is_captured) Py_RETURN_NONE;
    }
  }
  Owned made[Slots::kMost];
  for (size_t i = 0; i < steps_.size(); ++i) {
    made[i] = own(take(steps_[i], slots, stream.get(), stream_handle));
    if (!made[i]) return nullptr;
    if (made[i].get() == Py_NotImplemented) Py_RETURN_NONE;
    slots.objects[kOperands + i] = made[i].get();
    for (int slot : steps_[i].last) made[slot - kOperands].reset();  // large ones: W written out
  }
  if (results_.size() == 1) return Py_NewRef(slots.objects[results_[0]]);
  Owned all = own(PyTuple_New(static_cast<Py_ssize_t>(results_.size())));
  if (!all) return nullptr;
  for (size_t i = 0; i < results_.size(); ++i)
    PyTuple_SET_ITEM(all.get(), static_cast<Py_ssize_t>(i), Py_NewRef(slots.objects[results_[i]]));
  return all.release();
}

namespace {

PyObject* prepared(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return Prepared::make(args, count);
}

PyObject* run_prepared(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const Prepared* call = count == 6 ? Prepared::of(args[0]) : nullptr;
  if (!call) {
    PyErr_SetString(PyExc_TypeError, "run_prepared: expected prepared(...) and five operands");
    return nullptr;
  }
  return call->run(Slots({args[1], args[2], args[3], args[4], args[5]}));
}

PyMethodDef functions[] = {
    {"prepared", fastcall(prepared), METH_FASTCALL,
     "prepared(device, current, stream, capturing, steps, results): a product of known steps.\n"
     "device: an index or None, False on a CPU. current, stream, capturing: what tells the "
     "current\n"
     "device, the stream of one, whether it is captured. A step is (function, sizes, arguments,\n"
     "slots, names); its result has a slot, behind those of the operands. NotImplemented ends the "
     "call."},
    {"run_prepared", fastcall(run_prepared), METH_FASTCALL,
     "run_prepared(prepared, values, a, b, row_offsets, col_indices): its results; None where it\n"
     "must not run now."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_prepared_functions(PyObject* module) {
  return PyModule_AddFunctions(module, functions) == 0;
}

}  // namespace sk
