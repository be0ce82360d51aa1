#pragma once

#include "oversight/segment.h"

#include <cstdint>
#include <memory>

namespace pp_runtime {

/// The word by which ranks find out whether they share memory: a random token in a segment that a peer tries to read.
class Token {
 public:
  explicit Token(uint64_t value);
  int fd() const;
  static bool matches(int64_t pid, int fd, uint64_t value);

 private:
  std::shared_ptr<Segment> segment_;
};

}  // namespace pp_runtime
