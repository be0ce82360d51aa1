"""Inputs of traced models are bound by the names of the model's forward, whatever the order of the example or call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pp_runtime.errors import PipelineUsageError
from pp_runtime.planning.topology import traced_topology
from pp_runtime.splitting.tracing import SplitPoint, pipeline


class Affine(nn.Module):
    """Uses its inputs in another order than it names them, in both stages."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, power: int = 1, extra: Tensor | None = None) -> Tensor:
        x = self.first((x + shift) * scale) ** power
        x = x if extra is None else x + extra
        return (self.second(x) - shift) / scale


class Nested(Affine):
    def forward(self, x: Tensor, *others: Tensor, batch: dict[str, Any], **named: Tensor) -> Tensor:
        x = self.first((x + batch["shift"]) * batch["scales"][1] + others[1])
        return self.second(x * batch["scales"][0] - others[0]) * named["last"]


SPLIT = {"second": SplitPoint.BEGINNING}
X, SCALE, SHIFT = torch.rand(2, 4), torch.rand(2, 4) + 1, torch.rand(2, 4)
ORDERS = [
    ((X,), {"shift": SHIFT, "scale": SCALE}),
    ((X, SCALE, SHIFT), {}),
    ((), {"shift": SHIFT, "scale": SCALE, "x": X}),
]


def trace(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, nn.Module]:
    model = Affine()
    return pipeline(model, args, kwargs, split_spec=SPLIT), model


@pytest.mark.parametrize("example", ORDERS)
@pytest.mark.parametrize("call", [*ORDERS, ((X, SCALE), {"shift": SHIFT})])
def test_calls_in_any_order_equal_the_model(example: Any, call: Any) -> None:
    pipe, model = trace(*example)
    (output,) = pipe(*call[0], **call[1])
    assert torch.equal(output, model(X, SCALE, SHIFT))


def test_leaves_of_containers_are_bound_by_their_path() -> None:
    model = Nested()
    scales, others, last = [SCALE, SHIFT + 3], (X * 2, X * 3), torch.rand(4)
    example = {"batch": {"scales": scales, "shift": SHIFT}, "last": last}
    pipe = pipeline(model, (X, *others), example, split_spec=SPLIT)
    (output,) = pipe(X, *others, last=last, batch={"shift": SHIFT, "scales": scales})
    assert torch.equal(output, model(X, *others, **example))
    with pytest.raises(PipelineUsageError, match=r"no input 'batch\['other'\]'.*name one of them"):
        pipe(X, *others, last=last, batch={"other": SHIFT, "scales": scales})
    with pytest.raises(
        PipelineUsageError, match=r"stage 0 uses the model's input 'batch\['shift'\]', which was not given"
    ):
        pipe(X, *others, last=last, batch={"scales": scales})


def test_a_later_stage_takes_the_inputs_it_uses_and_no_others() -> None:
    pipe, model = trace(*ORDERS[0])
    hidden = pipe.get_stage_module(0)(X, SCALE, SHIFT)
    received = [hidden[source.output] for source in traced_topology(pipe).inputs[1]]
    second = pipe.get_stage_module(1)
    assert torch.equal(second(*received, x=X + 1, extra=None), model(X, SCALE, SHIFT))
    assert torch.equal(
        second(*received, scale=SCALE * 2, shift=SHIFT * 3),
        (model.second(model.first((X + SHIFT) * SCALE)) - SHIFT * 3) / (SCALE * 2),
    )
    with pytest.raises(PipelineUsageError, match="stage 1: the traced model has no input 'scael'"):
        second(*received, scael=SCALE)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X,), {"scale": SCALE}, "stage 0 uses the model's input 'shift', which was not given: pass it to step()"),
        ((X, SCALE), {"shift": SHIFT, "scael": SCALE}, "no input 'scael'; its inputs are 'x', 'shift', 'scale'"),
        ((X, SCALE), {"shift": SHIFT, "scale": SCALE}, "'scale' was given twice"),
        ((X, SCALE, SHIFT, 1, None, X), {}, "takes 5 positional inputs .* but 6 were given"),
        ((X, SCALE, SHIFT, 2), {}, "traced without 'power' and is given 2: trace the model again"),
        ((X, SCALE, SHIFT), {"extra": X}, r"traced without 'extra' and is given a tensor of shape \(2, 4\)"),
        ((X, SCALE, None), {}, "traced with a tensor as 'shift' and is given None"),
    ],
)
def test_calls_that_do_not_fit_the_trace_are_refused(args: Any, kwargs: Any, message: str) -> None:
    pipe, _ = trace(*ORDERS[0])
    with pytest.raises(PipelineUsageError, match=message):
        pipe(*args, **kwargs)


def test_a_constant_of_the_trace_may_be_left_out_and_not_changed() -> None:
    pipe, model = trace((X, SCALE), {"power": 2, "shift": SHIFT})
    expected = model(X, SCALE, SHIFT, power=2)
    assert torch.equal(pipe(X, SCALE, SHIFT)[0], expected)
    assert torch.equal(pipe(X, SCALE, SHIFT, 2, extra=None)[0], expected)
    with pytest.raises(PipelineUsageError, match="traced with power=2, which the graph has as a constant"):
        pipe(X, SCALE, SHIFT, power=3)


def test_an_input_for_a_later_stage_alone_is_missed_there_only() -> None:
    class Late(Affine):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.second(self.first(x)) * scale

    pipe = pipeline(Late(), (X, SCALE), split_spec=SPLIT)
    first, second = pipe.get_stage_module(0), pipe.get_stage_module(1)
    hidden = [first(X)[source.output] for source in traced_topology(pipe).inputs[1]]
    assert torch.equal(second(*hidden, scale=SCALE), second(*first(X, SCALE)))
    with pytest.raises(PipelineUsageError, match="stage 1 uses the model's input 'scale'.*or by keyword on this one"):
        second(*hidden)


def test_sizes_unlike_those_of_the_trace_are_warned_of() -> None:
    class Averages(Affine):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) / x.shape[0]

    model = Averages()
    pipe = pipeline(model, (X,), split_spec=SPLIT)
    with pytest.warns(UserWarning, match=r"traced with 'x' of shape \(2, 4\) and torch.float32 and is given \(1, 4\)"):
        (output,) = pipe(X[:1])
    assert not torch.allclose(output, model(X[:1]))
