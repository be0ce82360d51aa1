"""Whatever the layout, type or size of a tensor that crosses a boundary, it arrives with its values and its shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import api, ranks, reference
from tests.helpers.pipelines import make_schedule, make_stages, step
from tests.helpers.reference import Batch

ROWS, WIDTH, MICROBATCHES = 6, 4, 3

# What the first stage makes of its activations (rows, 4) and hands on beside them.
PAYLOADS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x * 2,
    "transposed": lambda x: x.t(),
    "sliced": lambda x: x[:, 1:3],
    "strided": lambda x: x[:, ::2],
    "flipped": lambda x: x.flip(1),
    "permuted": lambda x: x.unflatten(1, (2, 2)).permute(2, 0, 1),
    "channels last": lambda x: x.unflatten(1, (2, 2))[None].contiguous(memory_format=torch.channels_last),
    "offset view": lambda x: x.flatten()[3:],
    "expanded": lambda x: x[:, :1].expand(-1, 5),
    "overlapping": lambda x: x.flatten().unfold(0, 3, 1),
    "diagonal": lambda x: x[:2, :2].diagonal(),
    "empty": lambda x: x[:0],
    "empty inside": lambda x: x[:, None, :0],
    "scalar": lambda x: x.sum(),
    "one element": lambda x: x.sum()[None],
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16().t(),
    "double": lambda x: x.double(),
    "complex": lambda x: torch.complex(x, x + 1),
    "complex double": lambda x: torch.complex(x, x - 1).to(torch.complex128).t(),
    "conjugated": lambda x: torch.complex(x, x + 1).conj(),
    "negated view": lambda x: torch.complex(x, x + 1).conj().imag,
    "bool": lambda x: x > 0,
    "expanded bool": lambda x: (torch.arange(WIDTH) > 1).expand(x.shape[0], 1, WIDTH),
    "bool scalar": lambda x: (x > 0).any(),
    "int8": lambda x: (x * 10).detach().to(torch.int8),
    "uint8": lambda x: torch.arange(7, dtype=torch.uint8)[::3],
    "int16": lambda x: torch.arange(7, dtype=torch.int16),
    "int32": lambda x: torch.arange(12, dtype=torch.int32).view(3, 4).t(),
    "int64": lambda x: torch.arange(7).expand(2, 7),
    "int64 empty": lambda x: torch.empty(0, 3, dtype=torch.int64),
    "detached": lambda x: x.detach(),
    "seven dimensions": lambda x: x.view(-1, 1, 2, 1, 2, 1, 1).transpose(0, 4),
    "large": lambda x: x.sum() * torch.ones(300, 1000),
    "large transposed": lambda x: (x.sum() * torch.ones(300, 1000)).t(),
}

_TORCH_CAN = {"contiguous", "flipped", "double", "bool", "int8", "int16", "large"}


class Giver(nn.Module):
    """Hands on its activations and a payload made of them."""

    def __init__(self, payload: str) -> None:
        super().__init__()
        self.linear, self.payload = nn.Linear(WIDTH, WIDTH), PAYLOADS[payload]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.linear(x)
        return x, self.payload(x)


class Taker(nn.Module):
    """Mixes the payload into its output and remembers what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(WIDTH, WIDTH), list[Tensor]()

    def forward(self, x: Tensor, payload: Tensor) -> Tensor:
        self.seen.append(payload.detach().clone())
        payload = payload.contiguous()  # a sum of strided values is rounded otherwise
        weights = torch.arange(1.0, payload.numel() + 1).view(payload.shape) / max(1, payload.numel())
        value = payload if payload.is_complex() else payload.to(torch.promote_types(payload.dtype, torch.float32))
        return self.linear(x) + (value * weights).sum().abs().float() / 100


def _cross(rank: int, payload: str, schedule: str, training: bool) -> list[str]:
    torch.manual_seed(5)
    plain = [Giver(payload), Taker()]
    mine = [Giver(payload), Taker()][rank]
    mine.load_state_dict(plain[rank].state_dict())
    stages = make_stages({rank: mine}, 2)
    pipeline = make_schedule(schedule, stages, MICROBATCHES, nn.functional.mse_loss)
    found = []
    for number in range(2):
        batch = Batch((torch.randn(ROWS, WIDTH),), torch.zeros(ROWS, WIDTH))
        mine.zero_grad()
        if training:
            expected = reference.train_step(plain, batch, nn.functional.mse_loss, MICROBATCHES)
        else:
            expected = reference.evaluate(plain, batch, MICROBATCHES, nn.functional.mse_loss)
        got = step(pipeline, stages, batch, "step" if training else "eval")
        if rank == 1:
            found += reference.differences(f"step {number} losses", got.losses, expected.losses)
            found += reference.differences(
                f"step {number} payload", mine.seen[-MICROBATCHES:], plain[1].seen[-MICROBATCHES:]
            )
        for name, parameter in mine.named_parameters():
            expected_gradient = plain[rank].get_parameter(name).grad
            found += reference.differences(f"step {number} {name}.grad", parameter.grad, expected_gradient)
    return [f"{payload}: {line}" for line in found]


def _cross_all(rank: int, payloads: list[str], schedule: str, training: bool) -> None:
    found = []
    for payload in payloads:
        try:
            found += _cross(rank, payload, schedule, training)
        except Exception as error:
            raise AssertionError(f"{payload}: {error}") from error
    assert not found, "\n".join(found)


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
@pytest.mark.parametrize("training", [True, False])
def test_every_payload_arrives_and_its_gradient_returns(schedule: str, training: bool) -> None:
    payloads = [name for name in PAYLOADS if name in _TORCH_CAN or not api.IS_TORCH]
    ranks.run(_cross_all, 2, payloads=payloads, schedule=schedule, training=training)


class Twice(nn.Module):
    """Hands the same tensor on twice, and a view of it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x * 3
        return x, x, x[:, :2]


class Sum(nn.Module):
    """Weighs what it got, so that a swap shows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.linear(x) + 2 * y + z.sum(1, keepdim=True)


def _alias(rank: int) -> list[str]:
    torch.manual_seed(5)
    entry, plain = nn.Linear(WIDTH, WIDTH), [nn.Sequential(), Twice(), Sum()]
    plain[0] = entry
    whole = [nn.Sequential(entry, plain[1]), plain[2]]
    stages = make_stages({rank: whole[rank]}, 2)
    schedule = make_schedule("1F1B", stages, MICROBATCHES, nn.functional.mse_loss)
    batch = Batch((torch.randn(ROWS, WIDTH),), torch.zeros(ROWS, WIDTH))
    expected = reference.train_step(whole, batch, nn.functional.mse_loss, MICROBATCHES)
    gradients = [parameter.grad for parameter in whole[rank].parameters()]
    whole[rank].zero_grad()
    got = step(schedule, stages, batch)
    found = reference.differences("losses", got.losses, expected.losses) if rank == 1 else []
    mine = [parameter.grad for parameter in whole[rank].parameters()]
    return found + reference.differences("gradients", mine, gradients, exact=False)


@api.ours_only("sends contiguous tensors only")
def test_one_tensor_handed_on_twice_and_as_a_view() -> None:
    assert ranks.run(_alias, 2) == [[], []]
