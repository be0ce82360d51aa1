// What is read from other processes: messages' descriptions and programs, whole, cut short and changed at random.

#include "check.h"
#include "execution/program.h"
#include "transport/message.h"

#include <ATen/Functions.h>

#include <random>
#include <stdexcept>

namespace pp_runtime {

namespace {

Message message_of(std::vector<at::Tensor> tensors) {
  Message message{.frame = {.step = 7, .microbatch = 3, .training = 1},
                  .tensors = std::move(tensors),
                  .requires_grad = {},
                  .structure = "structure"};
  message.requires_grad.assign(message.tensors.size(), 1);
  return message;
}

Message example() {
  return message_of({at::arange(12).reshape({3, 4}), at::Tensor(), at::rand({2, 3}).t(), at::empty({0, 5}),
                     at::rand({6, 2}).slice(0, 0, 6, 2), at::scalar_tensor(2.5),
                     at::ones({2, 3, 4}).permute({2, 0, 1})});
}

/// Changes a byte, cuts, repeats or inserts, a few times.
std::string changed(std::string bytes, std::mt19937& random) {
  for (uint32_t changes = random() % 4 + 1; changes > 0 && !bytes.empty(); --changes) {
    const size_t at = random() % bytes.size();
    switch (random() % 4) {
      case 0:
        bytes[at] = static_cast<char>(random());
        break;
      case 1:
        bytes.resize(at);
        break;
      case 2:
        bytes.insert(at, bytes.substr(at, 8));
        break;
      default:
        bytes[at] = static_cast<char>(random() % 2 == 0 ? 0xff : 0x7f);
    }
  }
  return bytes;
}

}  // namespace

TEST(a_message_is_read_as_it_was_written) {
  const Message message = example();
  const MessageSpec spec = MessageSpec::of(message);
  const std::string bytes = spec.encode();
  const MessageSpec read = MessageSpec::decode(bytes.data(), bytes.size());
  EXPECT(read.encode() == bytes);
  EXPECT(read.frame == spec.frame);
  EXPECT(read.payload_bytes == spec.payload_bytes);
  std::vector<char> payload(spec.payload_bytes + kPayloadAlignment);
  pack(message, read, payload.data());
  for (size_t i = 0; i < read.tensors.size(); ++i) {
    if (read.tensors[i].defined) {
      const at::Tensor view = read.tensors[i].view(payload.data(), [](void*) {}, at::TensorOptions());
      EXPECT(view.equal(message.tensors[i]));
    }
  }
}

TEST(a_description_cut_short_anywhere_is_refused) {
  const std::string bytes = MessageSpec::of(example()).encode();
  for (size_t size = 0; size < bytes.size(); ++size) {
    // On the heap and of exactly this size, so that a read past its end is seen.
    const std::vector<char> cut(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
    ERROR_OF(std::runtime_error, MessageSpec::decode(cut.data(), cut.size()));
  }
}

TEST(a_changed_description_is_refused_or_stays_inside_its_payload) {
  std::mt19937 random(1);
  const std::string good = MessageSpec::of(example()).encode();
  int read = 0;
  for (int i = 0; i < 30'000; ++i) {
    const std::string text = changed(good, random);
    const std::vector<char> bytes(text.begin(), text.end());
    try {
      const MessageSpec spec = MessageSpec::decode(bytes.data(), bytes.size());
      for (const TensorSpec& tensor : spec.tensors) {
        EXPECT(!tensor.defined || tensor.offset + tensor.bytes <= spec.payload_bytes);
      }
      if (spec.payload_bytes < 1 << 16) {
        std::vector<char> payload(spec.payload_bytes + kPayloadAlignment);
        for (const TensorSpec& tensor : spec.tensors) {
          if (tensor.defined) {
            // Touches every element where the description says that it is.
            const at::Tensor view = tensor.view(payload.data(), [](void*) {}, at::TensorOptions());
            EXPECT(view.clone().numel() == view.numel());
          }
        }
      }
      ++read;
    } catch (const std::exception&) {
    }
  }
  EXPECT(read > 100);
}

TEST(a_program_of_any_numbers_is_refused_or_within_its_limits) {
  std::mt19937 random(2);
  const ProgramLimits limits = {
      .stages = 2, .microbatches = 3, .edges = 1, .send_channels = 1, .receive_channels = 1, .callbacks = 1};
  int read = 0;
  for (int i = 0; i < 100'000; ++i) {
    std::vector<int32_t> numbers(kInstructionNumbers * (random() % 3 + 1));
    for (int32_t& number : numbers) {
      number = random() % 8 == 0 ? static_cast<int32_t>(random()) : static_cast<int32_t>(random() % 4) - 1;
    }
    try {
      for (const Instruction& instruction : read_program(numbers, limits)) {
        EXPECT(instruction.stage >= -1 && instruction.stage < 2);
        EXPECT(instruction.microbatch >= -1 && instruction.microbatch < 3);
        EXPECT(!action_text(instruction.operation, instruction.stage, instruction.microbatch).empty());
      }
      ++read;
    } catch (const std::invalid_argument&) {
    }
  }
  EXPECT(read > 100);
}

}  // namespace pp_runtime
