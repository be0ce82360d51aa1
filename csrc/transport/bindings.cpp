#include "bindings.h"
#include "transport/c10d.h"
#include "transport/communicator_channel.h"
#include "transport/confirmation.h"
#include "transport/device_memory.h"
#include "transport/shared_memory.h"
#include "transport/token.h"

#include <torch/csrc/utils/pybind.h>

namespace py = pybind11;

namespace pp_runtime {

namespace {

void bind_message(py::module_& m) {
  m.def("can_travel", &can_travel, py::arg("tensor"));
  m.def(
      "describe_message",
      [](const std::string& description) {
        return MessageSpec::decode(description.data(), description.size()).describe();
      },
      py::arg("description"));
}

void bind_shared_memory(py::module_& m) {
  py::class_<Token>(m, "Token")
      .def(py::init<uint64_t>(), py::arg("value"))
      .def_property_readonly("fd", &Token::fd)
      .def_static("matches", &Token::matches, py::arg("pid"), py::arg("fd"), py::arg("value"));
  py::class_<SharedSendChannel, SendChannel, std::shared_ptr<SharedSendChannel>>(m, "SharedSendChannel")
      .def(py::init<uint32_t, uint32_t, std::string, std::shared_ptr<Watch>>(), py::arg("credits"), py::arg("ahead"),
           py::arg("name"), py::arg("watch"))
      .def_property_readonly("fd", &SharedSendChannel::fd)
      .def(
          "connect",
          [](SharedSendChannel& channel, int rank, int64_t pid, int64_t spin_ns) {
            channel.connect({.rank = rank, .pid = pid}, {.value = std::chrono::nanoseconds(spin_ns)});
          },
          py::arg("rank"), py::arg("pid"), py::arg("spin_ns"));
  py::class_<SharedReceiveChannel, ReceiveChannel, std::shared_ptr<SharedReceiveChannel>>(m, "SharedReceiveChannel")
      .def(py::init([](int rank, int64_t pid, int fd, std::string name, std::shared_ptr<Watch> watch, int64_t spin_ns) {
             return std::make_shared<SharedReceiveChannel>(Peer{.rank = rank, .pid = pid}, fd, std::move(name),
                                                           std::move(watch),
                                                           SpinTime{.value = std::chrono::nanoseconds(spin_ns)});
           }),
           py::arg("rank"), py::arg("pid"), py::arg("fd"), py::arg("name"), py::arg("watch"), py::arg("spin_ns"));
  py::class_<SharedConfirmation, Confirmation, std::shared_ptr<SharedConfirmation>>(m, "SharedConfirmation")
      .def(py::init(
               [](int64_t pid, int fd, size_t ranks, size_t own_rank, std::shared_ptr<Watch> watch, int64_t spin_ns) {
                 return std::make_shared<SharedConfirmation>(Segment::open(pid, fd, SharedConfirmation::bytes(ranks)),
                                                             ranks, own_rank, std::move(watch),
                                                             SpinTime{.value = std::chrono::nanoseconds(spin_ns)});
               }),
           py::arg("pid"), py::arg("fd"), py::arg("ranks"), py::arg("own_rank"), py::arg("watch"), py::arg("spin_ns"))
      .def_static("make", &SharedConfirmation::make, py::arg("ranks"));
}

void bind_c10d(py::module_& m) {
  py::class_<WaitGuard, std::shared_ptr<WaitGuard>>(m, "WaitGuard")
      .def(py::init<std::shared_ptr<Watch>>(), py::arg("watch"));
  const auto path = [](c10::intrusive_ptr<c10d::ProcessGroup> group, int peer, int tag, std::string name,
                       size_t ahead) { return C10dPath{std::move(group), peer, tag, std::move(name), ahead}; };
  py::class_<C10dPath>(m, "C10dPath")
      .def(py::init(path), py::arg("group"), py::arg("peer"), py::arg("tag"), py::arg("name"), py::arg("ahead") = 0);
  py::class_<C10dSendChannel, SendChannel, std::shared_ptr<C10dSendChannel>>(m, "C10dSendChannel")
      .def(py::init<C10dPath, std::shared_ptr<Watch>, std::shared_ptr<WaitGuard>>(), py::arg("path"), py::arg("watch"),
           py::arg("guard"));
  py::class_<C10dReceiveChannel, ReceiveChannel, std::shared_ptr<C10dReceiveChannel>>(m, "C10dReceiveChannel")
      .def(py::init<C10dPath, std::shared_ptr<Watch>, std::shared_ptr<WaitGuard>>(), py::arg("path"), py::arg("watch"),
           py::arg("guard"));
  py::class_<C10dConfirmation, Confirmation, std::shared_ptr<C10dConfirmation>>(m, "C10dConfirmation")
      .def(py::init<C10dPath, int, int, std::shared_ptr<WaitGuard>>(), py::arg("path"), py::arg("ranks"),
           py::arg("own_rank"), py::arg("guard"));
}

void bind_communicators(py::module_& m) {
  py::class_<CommunicatorPath>(m, "CommunicatorPath")
      .def(py::init([](std::shared_ptr<Lanes> lanes, std::string name, at::Device memory,
                       c10::intrusive_ptr<c10d::Backend> communicator, int peer, int tag, size_t slots, bool owned) {
             return CommunicatorPath{
                 std::move(lanes), std::move(name), memory, std::move(communicator), peer, tag, slots, owned};
           }),
           py::arg("lanes"), py::arg("name"), py::arg("memory"), py::arg("communicator"), py::arg("peer"),
           py::arg("tag"), py::arg("slots"), py::arg("owned"));
  py::class_<CommunicatorSendChannel, SendChannel, std::shared_ptr<CommunicatorSendChannel>>(m,
                                                                                             "CommunicatorSendChannel")
      .def(py::init<std::shared_ptr<SendChannel>, CommunicatorPath, std::shared_ptr<Watch>,
                    std::shared_ptr<WaitGuard>>(),
           py::arg("host"), py::arg("path"), py::arg("watch"), py::arg("guard"));
  py::class_<CommunicatorReceiveChannel, ReceiveChannel, std::shared_ptr<CommunicatorReceiveChannel>>(
      m, "CommunicatorReceiveChannel")
      .def(py::init<std::shared_ptr<ReceiveChannel>, CommunicatorPath, std::shared_ptr<Watch>,
                    std::shared_ptr<WaitGuard>>(),
           py::arg("host"), py::arg("path"), py::arg("watch"), py::arg("guard"));
}

void bind_device_memory(py::module_& m) {
  py::class_<DevicePath>(m, "DevicePath")
      .def(py::init([](std::shared_ptr<Lanes> lanes, std::string name, at::Device memory,
                       std::shared_ptr<PeerMemory> peer_memory) {
             return DevicePath{std::move(lanes), std::move(name), memory, std::move(peer_memory)};
           }),
           py::arg("lanes"), py::arg("name"), py::arg("memory"), py::arg("peer_memory"));
  py::class_<DeviceSendChannel, SendChannel, std::shared_ptr<DeviceSendChannel>>(m, "DeviceSendChannel")
      .def(py::init([](std::shared_ptr<SendChannel> host, DevicePath path, std::shared_ptr<Segment> control,
                       std::string receiver_device, uint32_t credits, std::shared_ptr<Watch> watch, int64_t spin_ns) {
             return std::make_shared<DeviceSendChannel>(std::move(host), std::move(path), std::move(control),
                                                        std::move(receiver_device), credits, std::move(watch),
                                                        SpinTime{.value = std::chrono::nanoseconds(spin_ns)});
           }),
           py::arg("host"), py::arg("path"), py::arg("control"), py::arg("receiver_device"), py::arg("credits"),
           py::arg("watch"), py::arg("spin_ns"))
      .def_static("make_control", &DeviceSendChannel::make_control);
  py::class_<DeviceReceiveChannel, ReceiveChannel, std::shared_ptr<DeviceReceiveChannel>>(m, "DeviceReceiveChannel")
      .def(py::init([](std::shared_ptr<ReceiveChannel> host, DevicePath path, int rank, int64_t pid, int control_fd,
                       std::shared_ptr<Watch> watch) {
             return std::make_shared<DeviceReceiveChannel>(
                 std::move(host), std::move(path), Peer{.rank = rank, .pid = pid}, control_fd, std::move(watch));
           }),
           py::arg("host"), py::arg("path"), py::arg("rank"), py::arg("pid"), py::arg("control_fd"), py::arg("watch"));
}

}  // namespace

void bind_transport(py::module_& m) {
  py::class_<SendChannel, std::shared_ptr<SendChannel>>(m, "SendChannel");
  py::class_<ReceiveChannel, std::shared_ptr<ReceiveChannel>>(m, "ReceiveChannel");
  py::class_<Confirmation, std::shared_ptr<Confirmation>>(m, "Confirmation")
      .def("confirm", &Confirmation::confirm, py::call_guard<py::gil_scoped_release>());
  bind_message(m);
  bind_shared_memory(m);
  bind_c10d(m);
  bind_communicators(m);
  bind_device_memory(m);
}

}  // namespace pp_runtime
