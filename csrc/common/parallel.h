// Loops over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusedattn {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(first, last) over [0, tasks), on torch's threads; grain is how many tasks are worth a thread. Tasks may
// differ in cost (lengths, causal masks): a thread that is done with its own share, the same at every call and so
// perhaps still in its cache, takes from those of others. Which thread runs a task is left to chance. An error of
// the body is thrown here: torch's C interface would put words of its own in place of the message.
template <typename Body>
void parallel_for(int64_t tasks, int64_t grain, const Body& body) {
  if (tasks == 0) return;
  if (tasks <= grain) return body(0, tasks);
  const int64_t threads =
      std::min<int64_t>(torch::stable::get_num_threads(), (tasks + grain - 1) / std::max<int64_t>(grain, 1));
  const int64_t step = std::max<int64_t>(1, tasks / (threads * 16));
  std::vector<std::atomic<int64_t>> next(threads);  // task of each share
  for (int64_t share = 0; share < threads; ++share) next[share] = share * tasks / threads;
  std::mutex mutex;
  std::optional<std::string> message;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    try {
      for (int64_t n = 0; n < threads; ++n) {
        const int64_t share = (own + n) % threads, end = (share + 1) * tasks / threads;
        for (int64_t first; (first = next[share].fetch_add(step, std::memory_order_relaxed)) < end;)
          body(first, std::min(first + step, end));
      }
    } catch (const std::exception& error) {
      for (auto& task : next) task = tasks;
      const std::lock_guard<std::mutex> lock(mutex);
      if (!message) message = error.what();
    }
  });
  if (message) throw std::runtime_error(*message);
}

}  // namespace fusedattn
