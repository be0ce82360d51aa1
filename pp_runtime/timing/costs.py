"""How long each kind of action takes, constant or stage by stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from pp_runtime.orders import Action

PerStage = float | tuple[float, ...]
"""One number for all stages, or one for each."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Times of the actions, in any one unit (seconds where they were measured).

    Each time is one number for all stages or a tuple with one number a stage. The defaults are those that papers on
    schedules compare with: a forward, a backward for the inputs and one for the weights take equally long, messages
    take no time.
    """

    forward: PerStage = 1.0
    backward_input: PerStage = 1.0
    backward_weight: PerStage = 1.0
    full_backward: PerStage | None = None  # None: backward_input + backward_weight
    transfer: PerStage = 0.0  # of one message between ranks, by the lower stage of its edge; one at a time a channel
    overlap: float = 1.0  # what an OVERLAP_F_B takes, as a share of the sum of its parts
    unshard: PerStage = 0.0
    reshard: PerStage = 0.0
    reduce_grad: PerStage = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "full_backward":
                continue
            if not isinstance(value, (int, float)):
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or any(not math.isfinite(number) or number < 0 for number in numbers):
                raise ValueError(f"The cost {field.name}={value} is not a time: give numbers that are not negative.")
        if isinstance(self.overlap, tuple):
            raise ValueError("The cost overlap is one share for all stages, not one a stage.")

    def by_stage(self, name: str, num_stages: int) -> tuple[float, ...]:
        """The times of one kind, one a stage; ValueError if there are fewer than the stages."""
        value = getattr(self, name)
        if value is None:
            halves = zip(
                self.by_stage("backward_input", num_stages), self.by_stage("backward_weight", num_stages), strict=True
            )
            return tuple(first + second for first, second in halves)
        if not isinstance(value, tuple):
            return (float(value),) * num_stages
        if len(value) < num_stages:
            raise ValueError(
                f"The cost {name} has {len(value)} numbers for {num_stages} stages; give one a stage. "
                f"A timeline that was not gathered has those of its own rank only: call its gather() first."
            )
        return value[:num_stages]

    def table(self, num_stages: int) -> dict[str, tuple[float, ...]]:
        """Times by the text of the action's type, then by stage; sends and receives take a rank no time."""
        free = (0.0,) * num_stages
        table = {text: self.by_stage(name, num_stages) for text, name in _FIELD_OF_TYPE.items()}
        return table | {"SEND_F": free, "RECV_F": free, "SEND_B": free, "RECV_B": free}

    def of(self, action: Action) -> float:
        """How long one action takes."""
        stage, kind, _, parts = action
        if parts is not None:
            return self.overlap * sum(self.of(part) for part in parts)
        name = _FIELD_OF_TYPE.get(kind.value)
        return self.by_stage(name, stage + 1)[stage] if name is not None else 0.0

    def with_overrides(self, **times: Any) -> Costs:
        """These costs with some of them replaced."""
        return replace(self, **times)

    def recut(self, num_stages: int, new_num_stages: int) -> Costs:
        """Costs of the same model cut into another number of stages: neighbours as one, or each in equal pieces.

        A message takes as long wherever the cut is. ValueError if neither number divides the other.
        """
        if num_stages == new_num_stages:
            return self
        joined, pieces = num_stages // new_num_stages, new_num_stages // num_stages
        if num_stages % new_num_stages and new_num_stages % num_stages:
            raise ValueError(
                f"Costs of {num_stages} stages say nothing about {new_num_stages}; neither divides the other."
            )
        recut: dict[str, PerStage] = {}
        for name in (
            "forward",
            "backward_input",
            "backward_weight",
            "full_backward",
            "unshard",
            "reshard",
            "reduce_grad",
        ):
            times = self.by_stage(name, num_stages)
            if joined:
                recut[name] = tuple(sum(times[first : first + joined]) for first in range(0, num_stages, joined))
            else:
                recut[name] = tuple(time / pieces for time in times for _ in range(pieces))
        transfer = self.by_stage("transfer", num_stages)
        # A message is named by the stage below the cut.
        last_of = [(stage + 1) * joined - 1 if joined else stage // pieces for stage in range(new_num_stages)]
        return self.with_overrides(**recut, transfer=tuple(transfer[stage] for stage in last_of))

    def to_text(self) -> str:
        """The form that :meth:`from_text` reads: ``F=1,I=1,W=1/2,transfer=0.1``."""
        default = Costs()
        parts = []
        for key, name in _FIELD_OF_KEY.items():
            value = getattr(self, name)
            if value != getattr(default, name) or key in "FIW":
                numbers = value if isinstance(value, tuple) else (value,)
                parts.append(f"{key}={'/'.join(f'{number:.6g}' for number in numbers)}")
        return ",".join(parts)

    @staticmethod
    def from_text(text: str) -> Costs:
        """Costs from ``F=1,I=1,W=1,B=2,transfer=0.1``; ``W=1/2/1`` gives one number a stage."""
        times: dict[str, PerStage] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, _, numbers = part.partition("=")
            name = _field_name(key.strip())
            try:
                values = tuple(float(number) for number in numbers.split("/"))
            except ValueError:
                raise ValueError(f"'{part}' is not a cost; write F=1 or, one a stage, F=1/2/1.") from None
            times[name] = values if len(values) > 1 else values[0]
        return Costs(**times)  # type: ignore[arg-type]

    @staticmethod
    def from_mapping(times: Mapping[str, float | Sequence[float]]) -> Costs:
        """Costs from ``{"F": 1.0, "W": [1.0, 2.0]}``; keys as in :meth:`from_text` or the field names."""
        values = {
            _field_name(key): float(value) if isinstance(value, (int, float)) else tuple(value)
            for key, value in times.items()
        }
        return Costs(**values)  # type: ignore[arg-type]


_FIELD_OF_TYPE = {
    "F": "forward",
    "I": "backward_input",
    "W": "backward_weight",
    "B": "full_backward",
    "UNSHARD": "unshard",
    "RESHARD": "reshard",
    "REDUCE_GRAD": "reduce_grad",
}
_FIELD_OF_KEY = _FIELD_OF_TYPE | {"transfer": "transfer", "overlap": "overlap"}


def _field_name(key: str) -> str:
    name = _FIELD_OF_KEY.get(key, key)
    if name not in _FIELD_OF_KEY.values():
        raise ValueError(f"'{key}' is not a cost; the costs are {', '.join(_FIELD_OF_KEY)}.")
    return name
