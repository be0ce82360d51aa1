#include "transport/token.h"

#include <cstring>
#include <stdexcept>

namespace pp_runtime {

Token::Token(uint64_t value) : segment_(Segment::create(sizeof(uint64_t))) {
  std::memcpy(segment_->data(), &value, sizeof(value));
}

int Token::fd() const { return segment_->fd(); }

bool Token::matches(int64_t pid, int fd, uint64_t value) {
  try {
    const auto segment = Segment::open(pid, fd, sizeof(uint64_t));
    return std::memcmp(segment->data(), &value, sizeof(value)) == 0;
  } catch (const std::runtime_error&) {
    return false;
  }
}

}  // namespace pp_runtime
