"""AdamW over the parameters of one rank, and a learning rate that warms up and falls."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn


def make_adamw(parameters: Iterable[nn.Parameter], rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    listed = list(parameters)
    groups = [
        {"params": [parameter for parameter in listed if parameter.dim() >= 2], "weight_decay": decay},
        {"params": [parameter for parameter in listed if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, betas=(0.9, 0.95))


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
