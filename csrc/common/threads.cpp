#include "threads.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace sk {
namespace {

struct Job {
  int64_t tasks;
  void (*body)(const void*, int64_t);
  const void* context;
  std::atomic<int64_t> next{0};
  std::mutex mutex{};
  std::exception_ptr error{};  // the first; no task begins after it
};

// An exception that left a thread of the pool would end the process.
void work(void* data) {
  Job& job = *static_cast<Job*>(data);
  try {
    for (int64_t t; (t = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;)
      job.body(job.context, t);
  } catch (...) {
    job.next.store(job.tasks, std::memory_order_relaxed);
    std::lock_guard<std::mutex> lock(job.mutex);
    if (!job.error) job.error = std::current_exception();
  }
}

// Starts as many as the system has; the caller works too, so all tasks are done even with none.
void work_on_threads(Job& job, int64_t helpers) {
  std::vector<std::thread> started;
  started.reserve(std::max<int64_t>(0, helpers));
  try {
    while (static_cast<int64_t>(started.size()) < helpers) started.emplace_back(work, &job);
  } catch (const std::system_error&) {
  }
  work(&job);
  for (std::thread& helper : started) helper.join();
}

// libgomp's entry point for `#pragma omp parallel`; LLVM's and Intel's runtimes export it too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

GompParallel gomp_parallel() {
#if defined(__unix__) || defined(__APPLE__)
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

}  // namespace

const char* thread_runtime() { return gomp_parallel() ? "OpenMP of the process" : "std::thread"; }

void run_tasks(int threads, int64_t tasks, void (*body)(const void*, int64_t),
               const void* context) {
  Job job{tasks, body, context};
  // Always as many as asked for: libgomp ends the threads that a smaller team leaves over, and
  // starts new ones for the next large team (0.7 ms with 16 threads).
  if (GompParallel parallel = gomp_parallel())
    parallel(work, &job, static_cast<unsigned>(threads), 0);
  else
    work_on_threads(job, std::min<int64_t>(threads, tasks) - 1);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace sk
