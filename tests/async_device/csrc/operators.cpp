// Every operator on the device: the shapes of its outputs are worked out on meta tensors, the outputs are allocated,
// and the CPU's own kernel is queued on the current stream over the same memory.

#include "log.h"
#include "settings.h"
#include "tensors.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <string>
#include <unordered_set>
#include <utility>

namespace async_device {

namespace {

using Values = std::vector<c10::IValue>;

/// An operator and what it was called with.
struct Call {
  const c10::OperatorHandle& op;
  const c10::FunctionSchema& schema;
  const std::string& name;
  Values arguments;
};

bool is_written(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}
bool is_view(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && !argument.alias_info()->isWrite();
}

/// The value with every tensor in it changed, and our device where one is named.
template <typename Change>
c10::IValue changed(const c10::IValue& value, c10::DeviceType device, const Change& change) {
  if (value.isTensor()) {
    return change(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) {
      list.push_back(change(tensor));
    }
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& item : value.toOptionalTensorList()) {
      const std::optional<at::Tensor> tensor = item;
      list.push_back(tensor ? std::optional<at::Tensor>(change(*tensor)) : std::nullopt);
    }
    return list;
  }
  if (value.isDevice() && value.toDevice().type() == kType) {
    return c10::Device(device);
  }
  return value;
}

template <typename Use>
void for_each_tensor(const c10::IValue& value, const Use& use) {
  changed(value, kType, [&](const at::Tensor& tensor) {
    use(tensor);
    return tensor;
  });
}

/// What a kernel gets: the memory of a tensor of ours; of a number on the host, what it is now.
at::Tensor for_kernel(const at::Tensor& tensor) {
  if (!tensor.defined() || is_ours(tensor)) {
    return on_cpu(tensor);
  }
  return number_like(tensor, tensor.detach().clone());
}

at::Tensor on_meta(const at::Tensor& tensor) {
  if (!is_ours(tensor)) {
    return tensor;
  }
  return number_like(
      tensor, at::empty_strided(tensor.sizes(), tensor.strides(), at::TensorOptions(tensor.dtype()).device(at::kMeta)));
}

/// The shapes depend on the data, or the host reads the result, or draws random numbers: it waits, as it may for CUDA.
bool needs_host(const Call& call) {
  static const std::unordered_set<std::string> names = {"aten::nonzero",
                                                        "aten::masked_select",
                                                        "aten::_unique2",
                                                        "aten::unique_dim",
                                                        "aten::equal",
                                                        "aten::is_nonzero",
                                                        "aten::bincount",
                                                        "aten::_unique",
                                                        "aten::repeat_interleave",
                                                        "aten::histc",
                                                        "aten::unique_consecutive",
                                                        "aten::_linalg_check_errors"};
  return names.count(call.name) != 0 || call.op.hasTag(at::Tag::nondeterministic_seeded);
}

/// The argument that a result is, where an operator returns what it wrote into.
const c10::IValue& argument_of(const Call& call, const c10::Argument& result) {
  for (size_t i = 0; i < call.arguments.size(); ++i) {
    const c10::Argument& argument = call.schema.arguments()[i];
    if (is_written(argument) && argument.alias_info()->beforeSets() == result.alias_info()->beforeSets()) {
      return call.arguments[i];
    }
  }
  TORCH_CHECK(false, call.name, " returns what none of its arguments is");
}

/// A view that has no kernel of its own: the CPU's says where it lies.
void view(const Call& call, torch::jit::Stack& stack) {
  at::Tensor base;
  torch::jit::Stack cpu;
  for (const c10::IValue& argument : call.arguments) {
    if (!base.defined() && argument.isTensor() && is_ours(argument.toTensor())) {
      base = argument.toTensor();
    }
    cpu.push_back(changed(argument, at::kCPU, on_cpu));
  }
  const auto* begin = static_cast<const char*>(on_cpu(base).const_data_ptr());
  call.op.callBoxed(&cpu);
  for (const c10::IValue& result : cpu) {
    stack.push_back(changed(result, kType, [&](const at::Tensor& made) {
      TORCH_CHECK(made.dtype() == base.dtype(), call.name, " changes the dtype of a view");
      const auto bytes = static_cast<const char*>(made.const_data_ptr()) - begin;
      return at::as_strided(base, made.sizes(), made.strides(),
                            base.storage_offset() + bytes / static_cast<int64_t>(base.element_size()));
    }));
  }
}

/// The host waits for the stream, runs the kernel itself and copies what it made.
void run_on_host(const Call& call, torch::jit::Stack& stack) {
  ++counts().synchronous;
  synchronize_current();
  torch::jit::Stack cpu;
  for (const c10::IValue& argument : call.arguments) {
    cpu.push_back(changed(argument, at::kCPU, on_cpu));
  }
  call.op.callBoxed(&cpu);
  for (size_t i = 0; i < call.schema.returns().size(); ++i) {
    const c10::Argument& result = call.schema.returns()[i];
    if (is_written(result)) {
      stack.push_back(argument_of(call, result));
      continue;
    }
    stack.push_back(changed(cpu[i], kType, [](const at::Tensor& made) {
      if (!made.defined()) {
        return made;
      }
      at::Tensor ours = empty_as(made);
      on_cpu(ours).copy_(made);
      return ours;
    }));
  }
}

bool is_out(const Call& call, size_t argument) {
  return call.schema.arguments()[argument].is_out() && call.arguments[argument].isTensor();
}

/// What the operator makes, on meta tensors; gives empty out arguments their shapes. False where there is no such
/// kernel.
bool make_on_meta(const Call& call, torch::jit::Stack& made) {
  Values given;
  for (const c10::IValue& argument : call.arguments) {
    given.push_back(changed(argument, at::kMeta, on_meta));
  }
  made = given;
  try {
    call.op.callBoxed(&made);
  } catch (const c10::NotImplementedError&) {
    return false;
  }
  for (size_t i = 0; i < given.size(); ++i) {
    if (is_out(call, i) && given[i].toTensor().sizes() != call.arguments[i].toTensor().sizes()) {
      const at::Tensor& out = given[i].toTensor();
      call.arguments[i].toTensor().set_(empty_as(out).storage(), 0, out.sizes(), out.strides());
    }
  }
  return true;
}

/// What a queued kernel works on: its arguments, and which of its results goes where.
struct Kernel {
  c10::OperatorHandle op;
  torch::jit::Stack stack;
  /// Out arguments may take other shapes on the way (mse_loss), so the kernel gets new ones, copied in the end.
  std::vector<std::pair<at::Tensor, at::Tensor>> outs;
  std::vector<std::pair<size_t, std::vector<at::Tensor>>> results;

  void operator()() {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(&stack);
    for (const auto& [into, from] : outs) {
      into.copy_(from);
    }
    for (const auto& [place, into] : results) {
      auto next = into.begin();
      for_each_tensor(stack[place], [&](const at::Tensor& from) {
        if (next->defined()) {
          next->copy_(from);
        }
        ++next;
      });
    }
  }
};

void queue(const Call& call, const torch::jit::Stack& made, torch::jit::Stack& stack) {
  Kernel kernel{.op = call.op, .stack = {}, .outs = {}, .results = {}};
  std::vector<const void*> reads;
  std::vector<const void*> writes;
  for (size_t i = 0; i < call.arguments.size(); ++i) {
    const bool written = is_written(call.schema.arguments()[i]);
    for_each_tensor(call.arguments[i], [&](const at::Tensor& tensor) {
      if (is_ours(tensor)) {
        (written ? writes : reads).push_back(address_of(tensor));
      }
    });
    if (is_out(call, i)) {
      const at::Tensor into = on_cpu(call.arguments[i].toTensor());
      kernel.outs.emplace_back(into, at::empty({0}, into.options()));
      kernel.stack.push_back(kernel.outs.back().second);
    } else {
      kernel.stack.push_back(changed(call.arguments[i], at::kCPU, for_kernel));
    }
  }
  for (size_t i = 0; i < call.schema.returns().size(); ++i) {
    const c10::Argument& result = call.schema.returns()[i];
    if (is_written(result)) {
      stack.push_back(argument_of(call, result));
      continue;
    }
    std::vector<at::Tensor> into;
    stack.push_back(changed(made[i], kType, [&](const at::Tensor& meta) {
      at::Tensor ours = meta.defined() ? empty_as(meta) : at::Tensor();
      into.push_back(on_cpu(ours));
      if (ours.defined()) {
        writes.push_back(address_of(ours));
      }
      return ours;
    }));
    kernel.results.emplace_back(i, std::move(into));
  }
  launch(call.name.c_str(), std::move(kernel), reads, writes);
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto& schema = op.schema();
  const Call call{op, schema, schema.name(), torch::jit::pop(*stack, schema.arguments().size())};
  if (!schema.returns().empty() && is_view(schema.returns()[0])) {
    view(call, *stack);
    return;
  }
  bool makes = false;
  for (const c10::Argument& result : schema.returns()) {
    makes = makes || !is_written(result);
  }
  for (size_t i = 0; i < call.arguments.size(); ++i) {
    makes = makes || (is_out(call, i) && call.arguments[i].toTensor().numel() == 0);
  }
  torch::jit::Stack made;
  if (needs_host(call) || (makes && !make_on_meta(call, made))) {
    run_on_host(call, *stack);
  } else {
    queue(call, made, *stack);
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

}  // namespace

}  // namespace async_device
