#include "calls.h"

#include <algorithm>
#include <memory>
#include <string>
#include <unordered_map>

#include "capsules.h"
#include "surroundings.h"

namespace sk {
namespace {

constexpr int kCpu = 1, kCuda = 2;  // of DLPack

enum Op : int { kSpmm, kSpmmT, kSddmm, kSpmmGradients, kSpmmTGradients, kSpmmBiasGradients, kOps };

struct Indices {
  PyObject *rows, *cols;
  bool operator==(const Indices& other) const { return rows == other.rows && cols == other.cols; }
};
struct HashIndices {
  size_t operator()(const Indices& i) const {
    return reinterpret_cast<size_t>(i.rows) * 31 + reinterpret_cast<size_t>(i.cols);
  }
};

// The calls of one pattern, as long as both of its tensors live and are what they were.
struct Pattern {
  Owned rows, cols;  // weak references
  void *row_data, *col_data;
  int64_t nnz, row_version, col_version;
  Calls calls;
};
using Patterns = std::unordered_map<Indices, std::unique_ptr<Pattern>, HashIndices>;
Patterns* patterns;

// -1, with Python's error set, where torch counts no writes.
int64_t version_of(PyObject* tensor) {
  if (PyErr_Occurred()) return -1;
  const Owned version = own(PyObject_GetAttr(tensor, around->version.get()));
  return version ? PyLong_AsLongLong(version.get()) : -1;
}

PyObject* forget_pattern(PyObject* self, PyObject*) {
  const auto* gone = static_cast<Pattern*>(PyLong_AsVoidPtr(self));
  for (auto it = patterns->begin(); it != patterns->end(); ++it)
    if (it->second.get() == gone) {
      const std::unique_ptr<Pattern> last = std::move(it->second);
      patterns->erase(it);
      break;
    }
  Py_RETURN_NONE;
}
PyMethodDef forget_method = {"forget_pattern", forget_pattern, METH_O, nullptr};

// The calls of these index tensors, empty if they are new or have changed; null with an error.
Pattern* pattern_of(PyObject* rows, PyObject* cols, const Operand& row, const Operand& col) {
  const int64_t row_version = version_of(rows), col_version = version_of(cols);
  if (PyErr_Occurred()) return nullptr;
  auto found = patterns->find({rows, cols});
  if (found != patterns->end()) {
    Pattern* known = found->second.get();
    if (known->row_data == row.data && known->col_data == col.data && known->nnz == col.shape[0] &&
        known->row_version == row_version && known->col_version == col_version)
      return known;
  }
  // A mode of torch sees this, and may let anything run: what was found may be gone.
  if (!Operand::is_whole(rows) || !Operand::is_whole(cols)) return nullptr;
  found = patterns->find({rows, cols});
  Pattern* pattern = found == patterns->end() ? nullptr : found->second.get();
  if (!pattern) {
    auto made = std::make_unique<Pattern>();
    const Owned self = own(PyLong_FromVoidPtr(made.get()));
    const Owned forget = self ? own(PyCFunction_New(&forget_method, self.get())) : nullptr;
    if (!forget) return nullptr;
    made->rows = own(PyWeakref_NewRef(rows, forget.get()));
    made->cols = own(PyWeakref_NewRef(cols, forget.get()));
    if (!made->rows || !made->cols) return nullptr;
    pattern = made.get();
    (*patterns)[{rows, cols}] = std::move(made);
  }
  Calls old;  // whose end may call anything
  old.swap(pattern->calls);
  pattern->row_data = row.data;
  pattern->col_data = col.data;
  pattern->nnz = col.shape[0];
  pattern->row_version = row_version;
  pattern->col_version = col_version;
  return pattern;
}

// op, row_offsets, col_indices, values, n, k, a, b: see call().
struct Call {
  PyObject *rows, *cols, *values, *a, *b;
  Op op;
  int64_t n, k;
  PyObject* const* args;
  int64_t addresses[kOperands] = {};  // of what find() has read

  bool read(PyObject* const* given, Py_ssize_t count) {
    if (!around || count != 8) return false;
    args = given;
    op = static_cast<Op>(PyLong_AsLong(args[0]));
    rows = args[1], cols = args[2], values = args[3], a = args[6], b = args[7];
    n = PyLong_AsLongLong(args[4]), k = PyLong_AsLongLong(args[5]);
    return op >= 0 && op < kOps && n > 0 && k > 0;
  }

  PyObject* run(PyObject* prepared) const {
    Slots slots({values, a, b, rows, cols});
    std::copy(addresses, addresses + kOperands, slots.addresses);
    return Prepared::of(prepared)->run(slots);
  }

  // The prepared call, owned; null where there is none, with or without Python's error set.
  Owned find(int most_dims = Key::kMostDims) {
    // RigL wants to see them.
    if (op >= kSddmm && PyDict_GET_SIZE(around->observations.get())) return nullptr;
    if (!agrees_with_autocast(a)) return nullptr;
    Operand row, col, first, second{}, v{};
    if (!row.read_view(rows) || !row.is_indices() || row.shape[0] - 1 != n) return nullptr;
    if (row.device_type != kCuda && row.device_type != kCpu) return nullptr;
    if (!col.read_view(cols) || !col.is_indices() || !col.is_on_device_of(row)) return nullptr;
    if (!read_fit(a, first) || !can_be_key(first) || first.ndim > most_dims) return nullptr;
    if (!first.is_on_device_of(row) || (op == kSddmm && first.ndim != 2)) return nullptr;
    const bool is_n_wide = op != kSpmm && op != kSpmmTGradients;
    const int last = first.ndim - 1;
    if (first.shape[last] != (is_n_wide ? n : k)) return nullptr;
    if (op == kSddmm ? values != Py_None : !is_vector(values, col.shape[0], first, v))
      return nullptr;
    if (op == kSpmm || op == kSpmmT) {
      if (b != Py_None && !is_vector(b, op == kSpmm ? n : k, first, second)) return nullptr;
    } else {
      if (!read_fit(b, second) || second.ndim != first.ndim || !second.has_type_of(first))
        return nullptr;
      if (!second.is_on_device_of(row)) return nullptr;
      for (int i = 0; i < last; ++i)
        if (second.shape[i] != first.shape[i]) return nullptr;
      if (second.shape[last] != (is_n_wide ? k : n)) return nullptr;
    }
    const int flags = (b != Py_None) | requires_grad(values) << 1;
    const Key key(op | flags << 8, n, k, first);
    Pattern* pattern = pattern_of(rows, cols, row, col);
    if (!pattern || PyErr_Occurred()) return nullptr;
    const auto found = pattern->calls.find(key);
    const void* data[] = {v.data, first.data, second.data, row.data, col.data};
    for (int i = 0; i < kOperands; ++i) addresses[i] = reinterpret_cast<int64_t>(data[i]);
    if (found != pattern->calls.end()) return share(found->second.get());
    return prepare(key, row, col);
  }

  Owned prepare(const Key& key, const Operand& row, const Operand& col) const {
    Owned made = own(PyObject_Vectorcall(around->prepare.get(), args, 8, nullptr));
    if (!made || !Prepared::of(made.get())) return nullptr;
    // Whatever ran in between, the pattern is looked for anew.
    Operand row_now, col_now;
    if (!row_now.read(rows) || row_now.data != row.data || !col_now.read(cols) ||
        col_now.data != col.data || col_now.shape[0] != col.shape[0])
      return nullptr;
    Pattern* pattern = pattern_of(rows, cols, row_now, col_now);
    if (!pattern) return nullptr;
    keep(pattern->calls, key, made.get());
    return made;
  }

  static bool is_vector(PyObject* object, int64_t size, const Operand& like, Operand& v) {
    return read_fit(object, v) && v.is_vector_like(like, size);
  }
};

PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call c;
  if (!c.read(args, count) || !is_alone()) return leave();
  const bool is_recording = is_grad_enabled();
  if (c.op >= kSpmmGradients && is_recording) return leave();
  const Owned found = c.find();
  if (!found || PyErr_Occurred()) return leave();
  bool wants_grad = false;
  for (PyObject* operand : {c.values, c.a, c.b}) {
    wants_grad = wants_grad || (is_recording && requires_grad(operand));
    if (PyErr_Occurred()) return leave();
  }
  if (wants_grad) {
    PyObject* arguments[] = {nullptr, found.get(), c.rows, c.cols, c.values,
                             args[4], args[5],     c.a,    c.b};
    return PyObject_Vectorcall(PyTuple_GET_ITEM(around->apply.get(), c.op), arguments + 1,
                               8 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  }
  return c.run(found.get());
}

PyObject* call_op(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call c;
  if (!c.read(args, count)) return leave();
  const Owned found = c.find(2);
  return found && !PyErr_Occurred() ? c.run(found.get()) : leave();
}

PyObject* forget_calls(PyObject*, PyObject*) {
  Patterns old;
  old.swap(*patterns);
  Py_RETURN_NONE;
}

PyObject* set_up(PyObject*, PyObject* args) {
  PyObject *watchers, *autocast, *agrees, *grad, *forward_ad, *profiler, *observations, *prepare,
      *apply;
  if (!PyArg_ParseTuple(args, "O!OOOOOO!OO!:set_up", &PyTuple_Type, &watchers, &autocast, &agrees,
                        &grad, &forward_ad, &profiler, &PyDict_Type, &observations, &prepare,
                        &PyTuple_Type, &apply))
    return nullptr;
  const auto name = [](const char* text) { return own(PyUnicode_InternFromString(text)); };
  around = new Surroundings{share(watchers),
                            share(autocast),
                            share(agrees),
                            share(grad),
                            share(forward_ad),
                            share(profiler),
                            share(observations),
                            share(prepare),
                            share(apply),
                            name("_current_level"),
                            name("_is_profiler_enabled"),
                            name("is_neg"),
                            name("requires_grad"),
                            name("_version")};
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"set_up", set_up, METH_VARARGS,
     "set_up(watchers, is_autocast, agrees, is_grad_enabled, forward_ad, profiler, observations,\n"
     "prepare, apply): what call() asks, and calls."},
    {"call", fastcall(call), METH_FASTCALL,
     "call(op, row_offsets, col_indices, values, n, k, a, b): a product of plain operands while\n"
     "nobody looks on, with autograd; None for all others. op 0, 1: spmm, spmm_t of a, with the\n"
     "bias b or None; 2: sddmm of dy a and x b; 3, 4: the gradients of 0 and 1, of h a and of the\n"
     "operand b, while no gradients of these are wanted; 5: those of 0 and of its bias."},
    {"call_op", fastcall(call_op), METH_FASTCALL,
     "call_op(..): the same of operands that an op got, below autograd and whoever looks on."},
    {"forget_calls", forget_calls, METH_NOARGS, "Prepare all calls anew."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_call_functions(PyObject* module) {
  patterns = new Patterns;
  return PyModule_AddFunctions(module, functions) == 0;
}

}  // namespace sk
