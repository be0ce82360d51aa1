#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace pp_runtime {

/// A piece of memory that several processes map.
///
/// It is a memfd, reached by peers through /proc/<pid>/fd/<fd>: it has no name in any file system, only processes of
/// the same user that may look at this process can open it, and the kernel frees it with its last mapping, whatever
/// happens to the processes. The creator keeps the descriptor open so that peers can open it later; a peer closes its
/// own at once. A process that opens a segment of its own gets the one that it made.
class Segment {
 public:
  static std::shared_ptr<Segment> create(size_t bytes);
  /// Throws std::runtime_error where the peer's memory cannot be reached or is smaller than `bytes`.
  static std::shared_ptr<Segment> open(int64_t pid, int fd, size_t bytes);

  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  ~Segment();

  /// Gives whole pages back to the system; who reads them later reads zeros. By the segment's maker only.
  void drop_pages(size_t offset, size_t bytes) const;

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  int fd() const { return fd_; }

 private:
  Segment(char* data, size_t bytes, int fd) : data_(data), bytes_(bytes), fd_(fd) {}

  char* data_;
  size_t bytes_;
  int fd_;
};

}  // namespace pp_runtime
