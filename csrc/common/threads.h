// A parallel loop over torch's own OpenMP threads.
//
// The module links no OpenMP: a second runtime would bring a second pool, whose spinning workers
// fight with torch's for the cores. The entry point of the runtime that the process has already
// loaded (torch's) is looked up when first needed. Without one, plain threads are started.
#pragma once

#include <cstdint>

namespace sk {

// Calls body(context, task) for every task in [0, tasks), by at most `threads` threads, each task
// once. Tasks are handed out in order as threads get free. An exception of a task ends the loop and
// is thrown here; of several, one.
void run_tasks(int threads, int64_t tasks, void (*body)(const void* context, int64_t task),
               const void* context);

template <class F>
void parallel_for(int threads, int64_t tasks, const F& f) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t t = 0; t < tasks; t++) f(t);
    return;
  }
  run_tasks(
      threads, tasks,
      [](const void* context, int64_t task) { (*static_cast<const F*>(context))(task); }, &f);
}

const char* thread_runtime();

}  // namespace sk
