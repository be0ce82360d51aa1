"""Gradient scaling over a pipeline: an infinity on any rank skips the update on all, and all scales stay equal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from pp_runtime.running.agreement import group_or_world
from pp_runtime.running.values import is_dtensor, local_part


class PipelineGradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` for the stages of a pipeline. The backward is inside ``step()``, so wrap the loss::

        scaler = PipelineGradScaler("cuda")
        schedule = Schedule1F1B(stage, 8, loss_fn=scaler.scale_loss(loss_fn))
        ...
        schedule.step(...)
        scaler.unscale_(optimizer)                 # where gradients are clipped
        clip_grad_norm_([stage], 1.0)
        scaler.step(optimizer)
        scaler.update()

    Every rank makes one with the same arguments and calls the same methods, also one whose stages have no gradients:
    ``unscale_``, or ``step`` without it, is collective over ``group``. That is the default process group if not given,
    and must have all ranks that train one model, data- and tensor-parallel ones too.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._group = group

    def scale_loss(self, loss_fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """A loss function with the same losses, whose gradients are scaled as ``scale`` scales those of a loss.

        ``loss_fn=lambda output, target: scaler.scale(loss(output, target))`` trains alike; ``losses`` are scaled then.
        """
        return partial(_scaled_loss, self, loss_fn)  # by which a schedule finds a loss function that is a module

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide this rank's gradients by the scale, and learn from all ranks whether any had an infinity or NaN."""
        if self._enabled:
            self._begin(optimizer)
        super().unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """As in torch: unscale unless done, then ``optimizer.step()`` unless any rank had an infinity or NaN."""
        if self._enabled:
            self._begin(optimizer)
        return super().step(optimizer, *args, **kwargs)

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        # Ranks without the loss never call scale().
        if self._scale is None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self._lazy_init_scale_growth_tracker(parameters[0].device if parameters else torch.device(self._device))

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        """torch's, of the rank's own elements of DTensors, and with the found infinities of all ranks."""
        alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    elements = _elements(parameter)
                    alike.setdefault((elements.device, elements.dtype), []).append(elements)
        half = not allow_fp16 and any(dtype == torch.float16 for _, dtype in alike)
        found = {found_inf.device: found_inf} | {
            device: found_inf.to(device) for device, _ in alike if device != found_inf.device
        }
        if not half:
            for (device, _), tensors in alike.items():
                torch._amp_foreach_non_finite_check_and_unscale_(tensors, found[device], inv_scale.to(device))
        self._share(found, half)
        return found

    def _share(self, found: dict[torch.device, torch.Tensor], half: bool) -> None:
        """Write to each device whether any rank found an infinity; an error on all where one has float16 gradients."""
        first = next(iter(found.values()))
        any_inf = torch.stack([each.to(first.device) for each in found.values()]).amax()
        told = torch.stack([any_inf, torch.full_like(any_inf, float(half))])
        if dist.is_initialized():
            dist.all_reduce(told, dist.ReduceOp.MAX, group=group_or_world(self._group))
        if told[1].item():
            raise ValueError(
                "a rank's parameters are float16, whose gradients cannot be unscaled without loss: keep parameters in "
                "float32 and let torch.autocast compute in float16"
            )
        for each in found.values():
            each.copy_(told[0])


def _elements(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter's gradient, to be scaled in place."""
    gradient: Any = parameter.grad
    if is_dtensor(gradient):
        return local_part(gradient)
    if gradient.is_sparse:
        parameter.grad = gradient = gradient.coalesce()  # sums of repeated indices are looked at, not their parts
        return gradient._values()
    return gradient


def _scaled_loss(
    scaler: PipelineGradScaler, loss_fn: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    loss = loss_fn(*args, **kwargs)
    if not scaler.is_enabled() or not loss.requires_grad:
        return loss
    return _ScaledGradient.apply(loss, scaler.scale(torch.ones((), device=loss.device)))


class _ScaledGradient(torch.autograd.Function):
    """The same value, with a gradient that is multiplied."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ctx.factor = factor
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.factor, None
