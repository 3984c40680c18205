// What calls from Python (calls.cpp, packed_calls.cpp) ask before they take the short way, and by
// what they find the steps.
#pragma once

#include <Python.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>

#include "prepared.h"
#include "tensors.h"

namespace sk {

constexpr size_t kMostCalls = 256;  // of a weight: those of many prompts are dropped together

// What torch and the package tell about who looks on; set_up() has the names.
struct Surroundings {
  Owned watchers;  // a tuple of functions: nothing may look on
  Owned is_autocast, agrees, is_grad_enabled;
  Owned forward_ad, profiler;  // modules
  Owned observations;          // a dict
  Owned prepare, apply;
  Owned current_level, is_profiling, is_neg, requires_grad, version;  // names
};
extern Surroundings* around;  // null before set_up()

// Of these, a false answer may come with Python's error set.

// Whether nothing but autograd would see a product.
bool is_alone();
// Whether torch's autocast leaves products in the dtype of the tensor alone.
bool agrees_with_autocast(PyObject* tensor);
bool is_grad_enabled();
bool requires_grad(PyObject* tensor);  // None does not
// Reads what kernels may read as it is: its memory is there, for those of a GPU on a multiple of 16
// bytes, and no negation is still to be done, which only the dispatcher sees.
bool read_fit(PyObject* tensor, Operand& t);

// What a call answers that goes the long way: None, past any error, which comes there again. What
// is no Exception, as Ctrl-C, does not: it goes on.
PyObject* leave();

// What the choice of a kernel and the steps of a call depend on, beside the weight.
struct Key {
  static constexpr int kMostDims = 5;
  std::array<int64_t, 5 + kMostDims> numbers{};

  Key(int64_t what, int64_t n, int64_t k, const Operand& x)
      : numbers{what, n, k, x.type_code << 8 | x.type_bits, x.ndim} {
    for (int i = 0; i < x.ndim - 1; ++i) numbers[5 + i] = x.shape[i];
  }
  bool operator==(const Key& other) const { return numbers == other.numbers; }
};
struct HashKey {
  size_t operator()(const Key& key) const {
    size_t hash = 0;
    for (int64_t number : key.numbers)
      hash = (hash ^ static_cast<size_t>(number)) * 0x9e3779b97f4a7c15ull;
    return hash ^ hash >> 29;
  }
};
using Calls = std::unordered_map<Key, Owned, HashKey>;  // capsules of Prepared

inline bool can_be_key(const Operand& x) { return x.ndim >= 2 && x.ndim <= Key::kMostDims; }

// Keeps one more call; those before are dropped where there are many.
inline void keep(Calls& calls, const Key& key, PyObject* call) {
  Calls old;  // whose end may call anything
  if (calls.size() >= kMostCalls) old.swap(calls);
  calls[key] = share(call);
}

}  // namespace sk
