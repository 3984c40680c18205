// Launches of CUDA kernels from Python in one step: the addresses of tensors are read here
// (tensors.h) and the arguments collected where the driver reads them.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>

namespace sk {

// Of csrc/cuda/launch.cu.
using Launch = int(const char* kernel, unsigned grid_x, unsigned grid_y, unsigned block,
                   unsigned smem_bytes, void* stream, void** args);
using TextOf = const char*(int code);

struct Kernel {
  Launch* launch;
  TextOf* text_of;
  const char* kind_of_code;  // what a launch answers but 0: "CUDA error"
  std::string name, signature;
};

// The kernel that a function of launcher() starts; null, without an error, for any other object.
const Kernel* kernel_of(PyObject* start);

// start(grid_x, grid_y, block, smem_bytes, stream, *arguments) of this kernel.
PyObject* launcher_of(Kernel kernel);

// A number or an address that a parameter takes; -1, with or without Python's error set, for what
// it does not take.
int read_int(PyObject* object, int64_t* to);
int read_address(PyObject* object, int64_t* to);

// Starts it without the GIL. sizes: grid x, y, block, bytes of shared memory. addresses: those of
// the arguments. False with Python's error set.
bool start_kernel(const Kernel& kernel, const int64_t* sizes, int64_t stream, void** addresses);

// Adds launcher() to the module; false with Python's error set.
bool add_launch_functions(PyObject* module);

}  // namespace sk
