#include "settings.h"

namespace async_device {

// Never destroyed: streams are threads that outlive the end of the program.
Settings& settings() {
  static auto* kept = new Settings;
  return *kept;
}

Counts& counts() {
  static auto* kept = new Counts;
  return *kept;
}

std::chrono::nanoseconds duration_of(const std::string& name) {
  const auto found = settings().takes.find(name);
  return found == settings().takes.end() ? settings().others_take : found->second;
}

}  // namespace async_device
