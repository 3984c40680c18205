#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace sk {

// Grow-only scratch memory of one thread, on page boundaries.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* floats(int64_t size) {
    constexpr int64_t kMost = (PTRDIFF_MAX - 4095) / static_cast<int64_t>(sizeof(float));
    if (size > kMost) throw std::bad_alloc();
    if (size > size_) {
      std::free(data_);
      size_ = 0;
      const size_t bytes = (static_cast<size_t>(size) * sizeof(float) + 4095) / 4096 * 4096;
      data_ = static_cast<float*>(std::aligned_alloc(4096, bytes));
      if (!data_) throw std::bad_alloc();
      size_ = size;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace sk
