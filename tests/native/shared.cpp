// What threads and processes share: segments, doorbells, rings, the end of a step, the board, the watch.

#include "check.h"
#include "oversight/segment.h"
#include "oversight/watch.h"
#include "oversight/whereabouts.h"
#include "transport/confirmation.h"
#include "transport/doorbell.h"
#include "transport/shared_memory.h"

#include <ATen/Functions.h>
#include <torch/csrc/distributed/c10d/HashStore.hpp>

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstring>
#include <random>
#include <thread>

namespace pp_runtime {

namespace {

constexpr SpinTime kNoSpin{};
constexpr double kLong = 60;

std::shared_ptr<Watch> watch_of(const c10::intrusive_ptr<c10d::Store>& store, double deadline = kLong) {
  return std::make_shared<Watch>(store, "failure", deadline, [] {});
}

std::shared_ptr<Watch> new_watch(double deadline = kLong) {
  return watch_of(c10::make_intrusive<c10d::HashStore>(), deadline);
}

/// What can be checked at the other end: its size and every element say which message it is.
Message numbered(int64_t number) {
  return {.frame = {.step = static_cast<uint64_t>(number)},
          .tensors = {at::full({number % 37 + 1, number % 5}, number, at::kLong), at::Tensor(),
                      at::full({number % 900}, number, at::kInt)},
          .requires_grad = {0, 0, 1},
          .structure = std::to_string(number)};
}

void check_numbered(const Message& message, int64_t number) {
  EXPECT(message.frame.step == static_cast<uint64_t>(number));
  EXPECT(message.structure == std::to_string(number));
  EXPECT(message.tensors.size() == 3 && !message.tensors[1].defined());
  EXPECT(message.tensors[0].sizes() == at::IntArrayRef({number % 37 + 1, number % 5}));
  for (const size_t i : {0, 2}) {
    EXPECT(message.tensors[i].eq(number).all().item<bool>());
  }
}

void send_all(SharedSendChannel& channel, int64_t messages) {
  for (int64_t number = 0; number < messages; ++number) {
    channel.send(numbered(number));
  }
  channel.finish_step();
}

/// Keeps some messages for a while, so that blocks come back late and in another order.
void receive_all(SharedReceiveChannel& channel, int64_t messages) {
  std::mt19937 random(3);
  std::vector<std::pair<int64_t, Message>> kept;
  for (int64_t number = 0; number < messages; ++number) {
    kept.emplace_back(number, channel.receive());
    check_numbered(kept.back().second, number);
    while (kept.size() > random() % 4) {
      const size_t at = random() % kept.size();
      check_numbered(kept[at].second, kept[at].first);
      kept.erase(kept.begin() + static_cast<std::ptrdiff_t>(at));
    }
  }
}

/// A process of its own that does `work` and leaves with 0.
template <typename Work>
pid_t start_process(const Work& work) {
  const pid_t child = fork();
  EXPECT(child >= 0);
  if (child == 0) {
    work();
    // Not exit(): what the parent had opened is the parent's to close.
    _exit(0);
  }
  return child;
}

int status_of(pid_t child) {
  int status = 0;
  EXPECT(waitpid(child, &status, 0) == child);
  return status;
}

struct Pipe {
  Pipe() { EXPECT(pipe(ends) == 0); }
  void write_number(int number) const { EXPECT(write(ends[1], &number, sizeof(number)) == sizeof(number)); }
  int read_number() const {
    int number = -1;
    EXPECT(read(ends[0], &number, sizeof(number)) == sizeof(number));
    return number;
  }
  int ends[2];
};

}  // namespace

TEST(a_ring_between_processes) {
  constexpr int64_t kMessages = 3000;
  const Pipe to_parent;
  const Pipe to_child;
  const pid_t parent = getpid();
  const pid_t child = start_process([&] {
    SharedSendChannel channel(3, 4, "test", new_watch());
    to_parent.write_number(channel.fd());
    channel.connect({.rank = 0, .pid = parent}, kNoSpin);
    send_all(channel, kMessages);
    to_child.read_number();  // the memory is this process's until the last message was read
  });
  {
    SharedReceiveChannel channel({.rank = 1, .pid = child}, to_parent.read_number(), "test", new_watch(), kNoSpin);
    receive_all(channel, kMessages);
  }
  to_child.write_number(0);
  EXPECT(status_of(child) == 0);
}

TEST(a_killed_process_is_noticed_by_who_waits_for_it) {
  const Pipe to_parent;
  const pid_t child = start_process([&] {
    SharedSendChannel channel(3, 4, "test", new_watch());
    to_parent.write_number(channel.fd());
    channel.connect({.rank = 0, .pid = getppid()}, kNoSpin);
    channel.send(numbered(5));
    pause();
  });
  const auto watch = new_watch();
  watch->watch_process(1, child);
  SharedReceiveChannel channel({.rank = 1, .pid = child}, to_parent.read_number(), "test", watch, kNoSpin);
  const Message first = channel.receive();
  EXPECT(!watch->ended());
  EXPECT(kill(child, SIGKILL) == 0);
  EXPECT(ERROR_OF(PeerLost, channel.receive()).find("rank 1") != std::string::npos);
  EXPECT(watch->ended() == 1);
  EXPECT(WIFSIGNALED(status_of(child)));
  check_numbered(first, 5);  // its memory outlives the process
}

TEST(the_end_of_steps_among_processes) {
  constexpr size_t kRanks = 3;
  const auto segment = SharedConfirmation::make(kRanks);
  const auto steps = [&](size_t rank) {
    SharedConfirmation confirmation(segment, kRanks, rank, new_watch(), kNoSpin);
    for (int step = 0; step < 500; ++step) {
      confirmation.confirm();
    }
  };
  const pid_t first = start_process([&] { steps(1); });
  const pid_t second = start_process([&] { steps(2); });
  steps(0);
  EXPECT(status_of(first) == 0 && status_of(second) == 0);
}

TEST(a_segment_is_refused_where_it_is_too_small_or_not_one) {
  const auto segment = Segment::create(100);
  EXPECT(Segment::open(getpid(), segment->fd(), 100)->bytes() == 100);
  EXPECT(ERROR_OF(std::runtime_error, Segment::open(getpid(), segment->fd(), 101)).find("101") != std::string::npos);
  ERROR_OF(std::runtime_error, Segment::open(getpid(), 9999, 1));
  const Pipe pipe;
  ERROR_OF(std::runtime_error, Segment::open(getpid(), pipe.ends[0], 1));
  const int unsealed = memfd_create("test", MFD_CLOEXEC);
  EXPECT(ftruncate(unsealed, 100) == 0);
  ERROR_OF(std::runtime_error, Segment::open(getpid(), unsealed, 100));
  close(unsealed);
}

TEST(dropped_pages_are_given_back) {
  constexpr size_t kPage = 4096;
  const auto segment = Segment::create(8 * kPage);
  std::memset(segment->data(), 1, segment->bytes());
  const auto pages = [&segment] {
    struct stat status = {};
    EXPECT(fstat(segment->fd(), &status) == 0);
    return static_cast<size_t>(status.st_blocks) * 512 / kPage;
  };
  EXPECT(pages() == 8);
  segment->drop_pages(2 * kPage, 5 * kPage);
  EXPECT(pages() == 3);
  EXPECT(segment->data()[2 * kPage - 1] == 1 && segment->data()[2 * kPage] == 0 && segment->data()[7 * kPage] == 1);
}

TEST(a_channel_whose_numbers_were_changed_is_refused) {
  const auto refusal = [](size_t at, uint32_t number) {
    const SharedSendChannel sender(3, 4, "test", new_watch());
    const auto control = Segment::open(getpid(), sender.fd(), 64);
    std::memcpy(control->data() + at, &number, sizeof(number));
    return ERROR_OF(std::runtime_error,
                    SharedReceiveChannel({.rank = 0, .pid = getpid()}, sender.fd(), "test", new_watch(), kNoSpin));
  };
  EXPECT(refusal(0, 7).find("was not made by pp_runtime") != std::string::npos);
  EXPECT(refusal(8, 1U << 20).find("1048576 credits") != std::string::npos);
  for (const uint32_t descriptors : {0U, 3U, 1U << 20, ~0U}) {
    EXPECT(refusal(12, descriptors).find(std::to_string(descriptors) + " descriptors") != std::string::npos);
  }
}

TEST(a_ring_between_threads) {
  constexpr int64_t kMessages = 3000;
  for (const int64_t spin_ns : {0, 20'000}) {
    const SpinTime spin{std::chrono::nanoseconds(spin_ns)};
    SharedSendChannel sender(3, 4, "test", new_watch());
    sender.connect({.rank = 1, .pid = getpid()}, spin);
    std::thread other([&] { send_all(sender, kMessages); });
    SharedReceiveChannel receiver({.rank = 0, .pid = getpid()}, sender.fd(), "test", new_watch(), spin);
    receive_all(receiver, kMessages);
    other.join();
  }
}

TEST(tensors_that_die_on_other_threads_give_their_blocks_back) {
  constexpr int64_t kMessages = 2000;
  SharedSendChannel sender(8, 3, "test", new_watch());
  sender.connect({.rank = 1, .pid = getpid()}, kNoSpin);
  std::thread sending([&] { send_all(sender, kMessages); });
  std::array<std::atomic<Message*>, 4> handed{};
  std::atomic<bool> done{false};
  std::vector<std::thread> dropping;
  for (auto& slot : handed) {
    dropping.emplace_back([&] {
      while (!done) {
        delete slot.exchange(nullptr);
        std::this_thread::yield();
      }
      delete slot.exchange(nullptr);
    });
  }
  SharedReceiveChannel receiver({.rank = 0, .pid = getpid()}, sender.fd(), "test", new_watch(), kNoSpin);
  for (int64_t number = 0; number < kMessages; ++number) {
    auto message = std::make_unique<Message>(receiver.receive());
    check_numbered(*message, number);
    delete handed[static_cast<size_t>(number) % handed.size()].exchange(message.release());
  }
  done = true;
  for (std::thread& thread : dropping) {
    thread.join();
  }
  sending.join();
}

TEST(a_doorbell_never_loses_a_ring) {
  constexpr uint32_t kRings = 20'000;
  Doorbell there;
  Doorbell back;
  std::thread other([&] {
    for (uint32_t ring = 0; ring < kRings; ++ring) {
      while (there.count.load() == ring) {
        there.wait(ring, std::chrono::nanoseconds(0), std::chrono::seconds(10));
      }
      back.raise();
    }
  });
  const auto begin = std::chrono::steady_clock::now();
  for (uint32_t ring = 0; ring < kRings; ++ring) {
    there.raise();
    while (back.count.load() == ring) {
      back.wait(ring, std::chrono::nanoseconds(0), std::chrono::seconds(10));
    }
  }
  other.join();
  // A lost ring would cost ten seconds.
  EXPECT(std::chrono::steady_clock::now() - begin < std::chrono::seconds(10) * 6);
}

TEST(the_end_of_steps_among_threads) {
  constexpr size_t kRanks = 4;
  const auto segment = SharedConfirmation::make(kRanks);
  std::array<int, kRanks> steps{};
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      SharedConfirmation confirmation(segment, kRanks, rank, new_watch(), kNoSpin);
      for (int step = 1; step <= 300; ++step) {
        steps[rank] = step;
        confirmation.confirm();
        for (const int others : steps) {
          EXPECT(others == step);  // what the others did before the end of the step is seen after it
        }
        confirmation.confirm();
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

TEST(a_step_ends_alike_for_all_also_where_one_gives_up) {
  constexpr size_t kRanks = 3;
  int failed = 0;
  for (int round = 0; round < 60; ++round) {
    const auto segment = SharedConfirmation::make(kRanks);
    const auto store = c10::make_intrusive<c10d::HashStore>();
    std::array<bool, kRanks> done{};
    std::vector<std::thread> threads;
    for (size_t rank = 0; rank < kRanks; ++rank) {
      threads.emplace_back([&, rank] {
        // Rank 2 comes when the others' time is over, or just not.
        const auto watch = watch_of(store, rank == 2 ? kLong : 0.005);
        SharedConfirmation confirmation(segment, kRanks, rank, watch, kNoSpin);
        std::this_thread::sleep_for(std::chrono::microseconds(rank == 2 ? 49'000 + 50 * round : 0));
        try {
          confirmation.confirm();
          done[rank] = true;
        } catch (const std::exception& error) {
          watch->publish(error.what());
        }
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    EXPECT(done[0] == done[1] && done[1] == done[2]);
    failed += done[0] ? 0 : 1;
  }
  std::cout << "failed " << failed << " of 60: ";
}

TEST(a_failure_wakes_who_waits) {
  const auto store = c10::make_intrusive<c10d::HashStore>();
  SharedSendChannel sender(3, 4, "test", watch_of(store));
  sender.connect({.rank = 1, .pid = getpid()}, kNoSpin);
  const auto watch = watch_of(store);
  std::thread other([&] { EXPECT(watch->publish("the reason") == "the reason"); });
  SharedReceiveChannel receiver({.rank = 0, .pid = getpid()}, sender.fd(), "test", watch_of(store), kNoSpin);
  EXPECT(ERROR_OF(PeerFailed, receiver.receive()) == "the reason");
  other.join();
  EXPECT(watch_of(store)->publish("a later one") == "the reason");
}

TEST(a_wait_ends_at_its_deadline) {
  SharedSendChannel sender(3, 4, "test", new_watch());
  sender.connect({.rank = 1, .pid = getpid()}, kNoSpin);
  SharedReceiveChannel receiver({.rank = 0, .pid = getpid()}, sender.fd(), "test", new_watch(0.1), kNoSpin);
  EXPECT(ERROR_OF(WaitedTooLong, receiver.receive()).find("waited ") == 0);
}

TEST(the_board_is_read_while_it_is_written) {
  const auto segment = Board::make(2);
  Board own(segment, 2, 0);
  const Board others(segment, 2, 1);
  std::atomic<bool> done{false};
  std::thread writer([&] {
    for (int32_t i = 0; i < 20'000; ++i) {
      own.begin({.operation = i % 10, .stage = i, .microbatch = i, .peer = 1, .other_stage = i + 1});
      own.begin_call("0UNSHARD", {.operation = static_cast<int32_t>(Operation::kCall)}, std::chrono::nanoseconds(i));
    }
    done = true;
  });
  while (!done) {
    const Whereabouts found = others.read(0);
    EXPECT(found.activity.stage == found.activity.microbatch);
    EXPECT(found.activity.operation >= 0 && found.activity.operation <= kEndOfStep);
    EXPECT(found.name.empty() || found.name == "0UNSHARD");
  }
  writer.join();
  EXPECT(others.read(0).name == "0UNSHARD");
}

TEST(a_reporter_tells_of_a_long_stay_and_takes_it_back) {
  const auto store = c10::make_intrusive<c10d::HashStore>();
  const auto board = std::make_shared<Board>(Board::make(1), 1, 0);
  Reporter reporter(board, store, "where", std::chrono::milliseconds(20));
  const auto told = [&] {
    const std::vector<uint8_t> bytes = store->get("where");
    return std::string(bytes.begin(), bytes.end());
  };
  board->begin({.operation = 1, .stage = 2, .microbatch = 3});
  while (!store->check({"where"}) || told().find("1 2 3 -1 -1 ") != 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  while (!told().empty()) {
    board->begin({.operation = 1, .stage = 2, .microbatch = 4});
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

TEST(a_reporter_says_again_that_it_is_there_and_takes_it_back_when_the_step_ends) {
  const auto store = c10::make_intrusive<c10d::HashStore>();
  const auto board = std::make_shared<Board>(Board::make(1), 1, 0);
  Reporter reporter(board, store, "where", std::chrono::milliseconds(20));
  const auto told = [&] {
    const std::vector<uint8_t> bytes = store->check({"where"}) ? store->get("where") : std::vector<uint8_t>();
    return std::string(bytes.begin(), bytes.end());
  };
  board->begin({.operation = 1, .stage = 2, .microbatch = 3});
  std::string first;
  while ((first = told()).empty()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  while (told() == first) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT(told().find("1 2 3 -1 -1 ") == 0);
  reporter.set_patience(std::chrono::hours(1));
  board->begin({});
  reporter.end_step();
  while (!told().empty()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace pp_runtime
