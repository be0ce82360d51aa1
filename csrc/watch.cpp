#include "watch.h"

#include <torch/csrc/utils/pybind.h>

#include <sstream>
#include <vector>

namespace pp_runtime {

Watch::Watch(c10::intrusive_ptr<c10d::Store> store, std::string failure_key, double deadline_seconds)
    : store_(std::move(store)), failure_key_(std::move(failure_key)), deadline_seconds_(deadline_seconds) {}

void Watch::look(Clock::time_point waiting_since) {
  {
    pybind11::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) {
      throw Interrupted();
    }
  }
  look_for_failure(waiting_since);
}

void Watch::look_for_failure(Clock::time_point waiting_since) {
  const std::string record = failure();
  if (!record.empty()) {
    throw PeerFailed(record);
  }
  const double waited = std::chrono::duration<double>(Clock::now() - waiting_since).count();
  if (waited > deadline_seconds_) {
    std::ostringstream text;
    text.precision(3);
    text << "waited " << waited << " s";
    throw WaitedTooLong(text.str());
  }
}

std::string Watch::failure() {
  const std::lock_guard lock(mutex_);
  if (seen_.empty()) {
    bool there = false;
    try {
      there = store_->check({failure_key_});
    } catch (const std::exception& error) {
      // The store's own process is gone, and with it the rank that kept it.
      throw PeerFailed(std::string("store lost: ") + error.what());
    }
    if (there) {
      const std::vector<uint8_t> bytes = store_->get(failure_key_);
      seen_.assign(bytes.begin(), bytes.end());
    }
  }
  return seen_;
}

std::string Watch::publish(const std::string& record) {
  const std::lock_guard lock(mutex_);
  if (seen_.empty()) {
    const std::vector<uint8_t> standing =
        store_->compareSet(failure_key_, std::vector<uint8_t>(), std::vector<uint8_t>(record.begin(), record.end()));
    seen_.assign(standing.begin(), standing.end());
  }
  return seen_;
}

void Watch::set_deadline(double seconds) { deadline_seconds_ = seconds; }

}  // namespace pp_runtime
