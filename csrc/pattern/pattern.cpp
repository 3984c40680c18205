#include "pattern.h"

namespace sk {

void Pattern::forget_if_changed(const Csr& w) {
  if (witness_.recognises(w)) return;
  schedules_.clear();
  compressed_.clear();
}

std::shared_ptr<const Schedule> Pattern::schedule(const Csr& w, bool transposed,
                                                  int64_t rows_per_block, int64_t cols_per_block) {
  std::lock_guard<std::mutex> lock(mutex_);
  forget_if_changed(w);
  auto& schedule = schedules_[{transposed, rows_per_block, cols_per_block}];
  if (!schedule) {
    auto make = transposed ? make_schedule_t : make_schedule;
    schedule = std::make_shared<const Schedule>(make(w, rows_per_block, cols_per_block));
  }
  return schedule;
}

std::shared_ptr<const Compressed> Pattern::compressed(const Csr& w, Format format) {
  std::lock_guard<std::mutex> lock(mutex_);
  forget_if_changed(w);
  auto& compressed = compressed_[format];
  if (!compressed) compressed = std::make_shared<const Compressed>(compress(w, format));
  return compressed;
}

}  // namespace sk
