#include "oversight/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

namespace pp_runtime {

namespace {

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

char* map(int fd, size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  return data == MAP_FAILED ? nullptr : static_cast<char*>(data);
}

/// The segments that this process made, by descriptor; entries of some that are gone may be among them.
class OwnSegments {
 public:
  void add(const std::shared_ptr<Segment>& segment) {
    const std::lock_guard lock(mutex_);
    segments_[segment->fd()] = segment;
  }

  std::shared_ptr<Segment> find(int fd) {
    const std::lock_guard lock(mutex_);
    const auto found = segments_.find(fd);
    return found == segments_.end() ? nullptr : found->second.lock();
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int, std::weak_ptr<Segment>> segments_;
};

OwnSegments& own_segments() {
  static OwnSegments segments;
  return segments;
}

}  // namespace

std::shared_ptr<Segment> Segment::create(size_t bytes) {
  const int fd = memfd_create("pp_runtime", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) {
    fail("cannot make shared memory");
  }
  char* data = nullptr;
  if (fchmod(fd, S_IRUSR | S_IWUSR) != 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0 ||
      fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0 || (data = map(fd, bytes)) == nullptr) {
    const int cause = errno;
    close(fd);
    errno = cause;
    fail("cannot make " + std::to_string(bytes) + " bytes of shared memory");
  }
  const std::shared_ptr<Segment> segment(new Segment(data, bytes, fd));
  own_segments().add(segment);
  return segment;
}

std::shared_ptr<Segment> Segment::open(int64_t pid, int fd, size_t bytes) {
  if (pid == getpid()) {
    if (auto own = own_segments().find(fd); own && own->bytes() >= bytes) {
      return own;
    }
  }
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  const int own = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (own < 0) {
    fail("cannot open " + path);
  }
  struct stat status = {};
  const bool large_enough = fstat(own, &status) == 0 && static_cast<size_t>(status.st_size) >= bytes;
  // Sealed against shrinking by its maker, so a mapped byte stays a byte.
  const int seals = fcntl(own, F_GET_SEALS);
  char* data = large_enough && seals >= 0 && (seals & F_SEAL_SHRINK) != 0 ? map(own, bytes) : nullptr;
  close(own);
  if (data == nullptr) {
    throw std::runtime_error(path + " is not a segment of at least " + std::to_string(bytes) + " bytes");
  }
  return std::shared_ptr<Segment>(new Segment(data, bytes, -1));
}

void Segment::drop_pages(size_t offset, size_t bytes) const {
  // Where the kernel will not, they stay until the segment goes.
  fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset), static_cast<off_t>(bytes));
}

Segment::~Segment() {
  munmap(data_, bytes_);
  if (fd_ >= 0) {
    close(fd_);
  }
}

}  // namespace pp_runtime
