// Stands before torch's header: what the CPU launchers take from it, on threads that ThreadSanitizer sees. It knows
// nothing of the barriers of torch's own thread pool, and would report races that are none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline thread_local uint32_t threads = 4;

inline uint32_t get_num_threads() { return threads; }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  const int64_t size = end - begin, tasks = std::min<int64_t>(size, threads);
  std::vector<std::thread> others;
  for (int64_t task = 1; task < tasks; ++task) {
    others.emplace_back([&, task] { f(begin + size * task / tasks, begin + size * (task + 1) / tasks); });
  }
  if (tasks > 0) f(begin, begin + size / tasks);
  for (std::thread& other : others) other.join();
}

}  // namespace torch::stable
