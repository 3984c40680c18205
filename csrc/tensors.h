// What the binding reads of torch's tensors itself: where Python would ask each of them for a dozen
// attributes in every call. DLPack's table of C functions, which torch.Tensor carries, tells the
// same in one step, so nothing of torch is needed here at build time.
#pragma once

#include <Python.h>

#include <cstdint>

namespace sk {

// The part of dlpack.h, version 1, that is used here.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// A tensor whose elements lie where a kernel reads them: contiguous, in memory that is there.
struct Operand : DLTensor {
  // False, with or without Python's error set, for anything else.
  bool read(PyObject* object) { return read_view(object) && is_whole(object); }

  // The same, of what may begin behind the start of its memory.
  bool read_view(PyObject* object);

  // Whether it begins there, or is a part of memory that is there.
  static bool is_there(PyObject* object);

  // Whether it begins there. The address of a view with an offset is no null pointer where the
  // memory was freed below it.
  static bool is_whole(PyObject* object);

  bool is_indices() const {
    return ndim == 1 && type_code == 0 && type_bits == 32 && type_lanes == 1;
  }

  bool has_type_of(const DLTensor& t) const {
    return type_code == t.type_code && type_bits == t.type_bits && type_lanes == t.type_lanes;
  }

  bool is_on_device_of(const DLTensor& t) const {
    return device_type == t.device_type && device_id == t.device_id;
  }

  bool is_vector_like(const DLTensor& t, int64_t size) const {
    return ndim == 1 && shape[0] == size && has_type_of(t) && is_on_device_of(t);
  }
};

// Adds read_tensors_of() and fitting_tokens() to the module; false with Python's error set.
bool add_tensor_functions(PyObject* module);

// The address of a torch.Tensor's elements, null where it has none; false, with or without Python's
// error set, for anything else.
bool read_data(PyObject* tensor, void** address);

}  // namespace sk
