// The C interface of `_sk_cuda.so`: names, signatures and launches of the kernels in launch.cuh's
// table. It holds no kernel, so NVRTC never compiles it.
#include <cuda_runtime_api.h>

#include <cstring>
#include <mutex>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "launch.cuh"

#define SK_EXPORT extern "C" __attribute__((visibility("default")))

namespace sk {
namespace {

struct Table {
  std::vector<KernelEntry*> entries;
  std::unordered_map<std::string_view, KernelEntry*> by_name;
};

// A function's static: the constructors that fill it run in no known order.
Table& table() {
  static Table table;
  return table;
}

KernelEntry* find(const char* kernel) {
  const auto found = table().by_name.find(kernel);
  return found == table().by_name.end() ? nullptr : found->second;
}

// Lets `entry` have this much dynamic shared memory on the current device. A limit is never
// lowered, and one that was raised before costs no call of the runtime but that for the device.
cudaError_t raise_smem_limit(KernelEntry& entry, unsigned smem_bytes) {
  int device;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  std::atomic<unsigned>& limit = entry.smem_limit_bytes[device];
  if (smem_bytes <= limit.load(std::memory_order_acquire)) return cudaSuccess;

  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (smem_bytes <= limit.load(std::memory_order_relaxed)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      entry.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
  if (error == cudaSuccess) limit.store(smem_bytes, std::memory_order_release);
  return error;
}

// Whether the current device has sm_90's way to start a kernel before the last one has ended.
bool can_start_early() {
  static std::atomic<signed char> known[kMaxDevices] = {};
  int device, major = 0;
  if (cudaGetDevice(&device) || device >= kMaxDevices) return false;
  if (!known[device]) {
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return false;
    known[device] = major >= 9 ? 1 : -1;
  }
  return known[device] > 0;
}

}  // namespace

KernelEntry::KernelEntry(const char* name, const void* kernel, const char* signature, bool is_early)
    : name(name), kernel(kernel), signature(signature), is_early(is_early) {
  table().entries.push_back(this);
  table().by_name.emplace(name, this);
}

}  // namespace sk

// Launches `kernel` on `stream`, a stream of the current device. args[i] points to the i-th
// argument. Returns a cudaError_t; an error that comes up only while the kernel runs is not in it.
SK_EXPORT int sk_launch(const char* kernel, unsigned grid_x, unsigned grid_y, unsigned block,
                        unsigned smem_bytes, void* stream, void** args) {
  constexpr unsigned kEveryKernelSmemBytes = 48 * 1024;
  sk::KernelEntry* entry = sk::find(kernel);
  if (!entry) return cudaErrorInvalidDeviceFunction;
  cudaError_t error = cudaSuccess;
  if (smem_bytes > kEveryKernelSmemBytes) error = sk::raise_smem_limit(*entry, smem_bytes);
  if (error == cudaSuccess) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid_x, grid_y);
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = smem_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &early;
    config.numAttrs = entry->is_early && sk::can_start_early();
    error = cudaLaunchKernelExC(&config, entry->kernel, args);
  }
  if (error != cudaSuccess) cudaGetLastError();  // it is reported here and not at the next launch
  return error;
}

// One character for each parameter, P a pointer and i an int; null if there is no such kernel.
SK_EXPORT const char* sk_signature(const char* kernel) {
  const sk::KernelEntry* entry = sk::find(kernel);
  return entry ? entry->signature : nullptr;
}

// The name of the index-th kernel; null past the last one.
SK_EXPORT const char* sk_kernel(unsigned index) {
  const auto& entries = sk::table().entries;
  return index < entries.size() ? entries[index]->name : nullptr;
}

SK_EXPORT const char* sk_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
