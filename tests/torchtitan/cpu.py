"""What torchtitan takes from an accelerator and from the network, from the CPU and from a generator."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from matrix import ROWS, SEQUENCE, VOCABULARY, ignored
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.data import IterableDataset

_IGNORED = -100


def use_cpu() -> None:
    """Have torchtitan compute on the CPU, over gloo. Before any module of it is imported."""
    found = torch._utils._get_available_device_type, torch._utils._get_device_module
    # The first import asks which device there is, once for all modules.
    torch._utils._get_available_device_type, torch._utils._get_device_module = lambda: "cpu", lambda name: _CPU
    from torchtitan.distributed import utils as distributed
    from torchtitan.tools import utils

    torch._utils._get_available_device_type, torch._utils._get_device_module = found
    utils.get_peak_flops = lambda name: 1e12
    # It sets time limits behind a barrier with device_ids, which gloo refuses.
    distributed.set_pg_timeouts = lambda *args, **kwargs: None
    # FSDP divides by torchtitan's factor, 1, in an operation of NCCL's; this has it sum and divide.
    set_factor = FSDPModule.set_gradient_divide_factor
    FSDPModule.set_gradient_divide_factor = lambda module, factor: (
        set_factor(module, factor),
        module.set_force_sum_reduction_for_comms(True),
    )
    # 0.2.2 runs DualPipeV's pairs of forward and backward in two threads, on one stream.
    torch.accelerator.current_stream = lambda device=None: None


_CPU = SimpleNamespace(
    set_device=lambda device: None,
    set_stream=lambda stream: None,
    current_device=lambda: 0,
    device_count=lambda: 1,
    get_device_name=lambda device=None: "CPU",
    get_device_properties=lambda device=None: SimpleNamespace(total_memory=2**34),
    memory_stats=lambda device=None: {},
    reset_peak_memory_stats=lambda: None,
    empty_cache=lambda: None,
    synchronize=lambda: None,
)


class RandomRows(IterableDataset):
    """Rows of tokens that depend on the step and on the row's place in the global batch, and on nothing else.

    A data-parallel rank takes its part of every global batch, so that all layouts train on the same rows. Some labels
    are ignored, more in one row than in another: the loss is a mean over tokens of the whole batch.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self._first, self._rows, self._taken = rank * ROWS // ranks, ROWS // ranks, 0

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            step, place = divmod(self._taken, self._rows)
            self._taken += 1
            yield _row(step * ROWS + self._first + place)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._taken = state["taken"]


def _row(number: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(VOCABULARY, (SEQUENCE + 1,), generator=generator)
    labels = tokens[1:].clone()
    labels[: ignored(number % ROWS)] = _IGNORED
    return {"input": tokens[:-1]}, labels


def initialize(part: torch.nn.Module) -> None:
    """Give parameters values that depend on their names only, in whichever stage and shard they are."""
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            value = _value(name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""), parameter.shape)
            if isinstance(parameter, DTensor):
                shape, offset = compute_local_shape_and_global_offset(
                    value.shape, parameter.device_mesh, parameter.placements
                )
                for dimension, (size, begin) in enumerate(zip(shape, offset, strict=True)):
                    value = value.narrow(dimension, begin, size)
                parameter.to_local().copy_(value)
            else:
                parameter.copy_(value)


def _value(name: str, shape: torch.Size) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if noise.dim() == 1:
        return 1 + 0.1 * noise
    return noise if name.startswith("tok_embeddings") else noise * shape[-1] ** -0.5
