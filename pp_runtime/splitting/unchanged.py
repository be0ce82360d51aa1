"""A model may be run to see what it does; its user must not notice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def unchanged(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run modules within, and leave their buffers, gradients and the generators of random numbers as they were.

    Within, there are no gradients yet.
    """
    modules = list(modules)
    owners = list(dict.fromkeys(part for module in modules for part in module.modules()))
    buffers = [
        (owner, name, buffer, buffer.clone())
        for owner in owners
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    parameters = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    devices = {each.device for each in (*parameters, *(buffer for _, _, buffer, _ in buffers))}
    try:
        with _random_numbers_kept(devices):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for owner, name, buffer, value in buffers:
                owner._buffers[name] = buffer
                if not buffer.is_meta and not torch.equal(buffer, value):  # or graphs that saved it took it for changed
                    buffer.copy_(value)


@contextlib.contextmanager
def _random_numbers_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=()))
        for device in devices:
            if device.type not in ("cpu", "meta"):
                stack.enter_context(torch.random.fork_rng(devices=(device,), device_type=device.type))
        yield
