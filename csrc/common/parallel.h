// Loops over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

namespace fusedattn {

// body(first, last) over [0, tasks), on torch's threads; grain is how many tasks are worth a thread. An error of
// the body is thrown here: torch's C interface would put words of its own in place of the message.
template <typename Body>
void parallel_for(int64_t tasks, int64_t grain, const Body& body) {
  if (tasks == 0) return;
  if (tasks <= grain) return body(0, tasks);
  std::mutex mutex;
  std::optional<std::string> message;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t first, int64_t last) {
    try {
      body(first, last);
    } catch (const std::exception& error) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!message) message = error.what();
    }
  });
  if (message) throw std::runtime_error(*message);
}

}  // namespace fusedattn
