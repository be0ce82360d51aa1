"""What operators do, counted as they run: bytes alive, the most of them at a time, and how long a device would take."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pp_runtime.errors import PipelineUsageError
from pp_runtime.splitting import tensors_of


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """What a rank's device reaches in practice: an operator takes as long as its FLOPs or its bytes, whichever is more.

    ``flops`` and ``bytes`` are a second's; ``bytes``, those that operators read and write in the device's memory.
    """

    flops: float
    bytes: float = math.inf

    def __post_init__(self) -> None:
        for name in ("flops", "bytes"):
            if not getattr(self, name) > 0:
                raise PipelineUsageError(f"a device's {name} a second are more than 0, not {getattr(self, name)}")

    def seconds(self, flops: float, moved: float) -> float:
        """Of one operator."""
        return max(flops / self.flops, moved / self.bytes)


class Tally(TorchDispatchMode):
    """Watches operators on this thread, those of backwards too, on any device; on meta nothing is computed."""

    def __init__(self, device: DeviceSpeed | None = None) -> None:
        super().__init__()
        self._device = device
        self._alive: dict[int, int] = {}
        self.live = 0
        """Bytes of the memory that operators made since this began and that still is."""
        self.most = 0
        """The most that ``live`` has been since :meth:`mark`."""
        self.seconds = 0.0
        """What the device would have taken for the operators so far; 0 without one."""

    def mark(self) -> int:
        """Forget the most; what is alive now."""
        self.most = self.live
        return self.live

    def memory_of(self, tensors: Iterable[Tensor]) -> frozenset[int]:
        """The memory of these tensors, as far as operators made it since this began: for :meth:`size_of`."""
        return frozenset(id(tensor.untyped_storage()) for tensor in tensors) & self._alive.keys()

    def size_of(self, memory: Iterable[int]) -> int:
        """Bytes of what is left of it, while nothing new is made."""
        return sum(self._alive.get(key, 0) for key in memory)

    def charge(self, flops: float, moved: float) -> None:
        """Count an operator that is not seen by itself."""
        if self._device is not None:
            self.seconds += self._device.seconds(flops, moved)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        result = func(*args, **named)
        given, made = tensors_of((args, named)), tensors_of(result)
        before = {id(tensor.untyped_storage()) for tensor in given}
        for tensor in made:
            storage = tensor.untyped_storage()
            if id(storage) not in before and id(storage) not in self._alive:
                self._note(storage)
        if self._device is not None and not func.is_view:
            count = flop_registry.get(func._overloadpacket)
            flops = 0 if count is None else count(*args, **named, out_val=result)
            self.charge(flops, sum(map(_size, (*given, *made))))
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._alive[id(storage)] = size
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._forget, id(storage))

    def _forget(self, key: int) -> None:
        self.live -= self._alive.pop(key)


@contextlib.contextmanager
def tallied(tally: Tally) -> Iterator[Tally]:
    """Count within; attention on meta tensors is that of a fused kernel, which keeps no scores."""
    with _FusedAttention(tally), tally:
        yield tally


class _FusedAttention(TorchFunctionMode):
    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func is scaled_dot_product_attention:
            query, key, value = (*args, *(named[name] for name in ("query", "key", "value") if name in named))[:3]
            if query.device.type == "meta":
                return _Attention.apply(query, key, value, self._tally)
        return func(*args, **named)


class _Attention(torch.autograd.Function):
    """The sizes, and the work as torch's counter of FLOPs has it, of a fused attention."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tally: Tally) -> Tensor:
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, sums)
        ctx.tally = tally
        scores = 2 * query.shape[:-1].numel() * key.shape[-2]
        ctx.flops = scores * query.shape[-1], scores * value.shape[-1]
        tally.charge(sum(ctx.flops), sum(map(_size, (query, key, value, result))))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        found = tuple(torch.empty_like(tensor) for tensor in saved[:3])
        by_key, by_value = ctx.flops
        moved = sum(map(_size, (*saved, *gradients, *found)))
        # Scores and their gradients' halves for query and key, and those of the value and of the probabilities.
        ctx.tally.charge(3 * by_key + 2 * by_value, moved)
        return *found, None


def _size(tensor: Tensor) -> int:
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())
