"""What each layer of a model costs: parameters, FLOPs, measured time, memory."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pp_runtime.errors import PipelineUsageError
from pp_runtime.splitting.rehearsal import first_of
from pp_runtime.splitting.skeleton import tensors_of
from pp_runtime.splitting.unchanged import unchanged


def layer_costs(
    layers: Iterable[nn.Module], by: str = "parameters", inputs: Sequence[Any] = (), *, repeats: int = 5
) -> list[float]:
    """The cost of each layer, for :func:`pp_runtime.partition`.

    Args:
        by: "parameters", their number; "flops", of a forward's products and attention, counted on the meta device, so
            that nothing is computed; "time", the seconds of a forward and a backward, measured on the layers' device,
            the median of ``repeats``; "memory", the bytes of parameters and gradients and of what one microbatch's
            forward keeps for its backward.
        inputs: of the first layer, a microbatch's, for all but parameters. What a layer returns, or the first of what
            it returns, is the next one's first input; the others go to every layer.

    Raises PipelineUsageError for another ``by``, and where inputs are needed and not given.
    """
    layers = list(layers)
    if by == "parameters":
        return [float(sum(parameter.numel() for parameter in layer.parameters())) for layer in layers]
    measure = _MEASURES.get(by)
    if measure is None:
        raise PipelineUsageError(f"layers cost parameters, {', '.join(_MEASURES)}, not {by!r}")
    if not inputs:
        raise PipelineUsageError(f"costs by {by} need the first layer's inputs: layer_costs(layers, {by!r}, (x,))")
    costs = []
    inputs = tuple(inputs)
    with unchanged(layers):
        for layer in layers:
            cost, output = measure(layer, inputs, repeats)
            costs.append(cost)
            inputs = (first_of(output), *inputs[1:])
    return costs


def _flops(layer: nn.Module, inputs: Sequence[Any], _: int) -> tuple[float, Any]:
    from torch.utils.flop_counter import FlopCounterMode

    on_meta = copy.deepcopy(layer).to("meta")
    moved = tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), tuple(inputs))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = on_meta(*moved)
    return float(counter.get_total_flops()), output


def _time(layer: nn.Module, inputs: Sequence[Any], repeats: int) -> tuple[float, Any]:
    devices = {part.device for part in tensors_of(inputs)}
    found = []
    for _ in range(repeats + 1):  # the first warms up
        begin = moment(devices)
        output = _run(layer, inputs)
        _backward(output)
        found.append(moment(devices) - begin)
    return statistics.median(found[1:]), output


def _memory(layer: nn.Module, inputs: Sequence[Any], _: int) -> tuple[float, Any]:
    with noted_saves(layer) as kept:
        output = _run(layer, inputs)
    return float(weights_and_gradients(layer.parameters()) + sum(each.nbytes() for each in kept.values())), output


@contextlib.contextmanager
def noted_saves(module: nn.Module) -> Iterator[dict[int, torch.UntypedStorage]]:
    """The memory that graphs made within save, the module's parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that none has another one's address

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept.setdefault(storage._cdata, storage)
        return tensor.detach()  # the tensor itself would hold the node that holds it

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def weights_and_gradients(parameters: Iterable[nn.Parameter]) -> int:
    """Their bytes, with those of the gradients of what is trained."""
    return sum(parameter.nbytes * (1 + parameter.requires_grad) for parameter in parameters)


def moment(devices: Iterable[torch.device]) -> float:
    """Seconds on the host's clock, once the devices have done what was queued."""
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)
    return time.perf_counter()


def _run(layer: nn.Module, inputs: Sequence[Any]) -> Any:
    return layer(*tree_map_only(Tensor, _as_received, tuple(inputs)))


def _as_received(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point() or tensor.is_complex())


def _backward(output: Any) -> None:
    roots = [part for part in tensors_of(output) if part.requires_grad]
    if roots:
        torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])


_Measure = Callable[[nn.Module, Sequence[Any], int], tuple[float, Any]]
_MEASURES: dict[str, _Measure] = {
    "flops": _flops,
    "time": _time,
    "memory": _memory,
}
