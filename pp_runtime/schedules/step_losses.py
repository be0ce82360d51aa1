"""The losses that custom functions compute in a step: a list as they come, as torch has it, and whose each is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch


class StepLosses:
    """``values`` in order of arrival. Programs may append to it; whose loss that is, is known after their function."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self._place_of: dict[int, int] = {}  # microbatch -> place in values

    def clear(self) -> None:
        """Forget all, in the list that programs may hold."""
        self.values.clear()
        self._place_of.clear()

    def add(self, microbatch: int, loss: torch.Tensor) -> None:
        """Keep a microbatch's loss."""
        self._place_of[microbatch] = len(self.values)
        self.values.append(loss)

    def claim(self, microbatches: Iterable[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Take losses that a program appended as those of these microbatches, in turn; gives each with its own."""
        if len(self.values) == len(self._place_of):
            return
        known = set(self._place_of.values())
        unclaimed = [place for place in range(len(self.values)) if place not in known]
        without_loss = [microbatch for microbatch in microbatches if microbatch not in self._place_of]
        for microbatch, place in zip(without_loss, unclaimed, strict=False):
            self._place_of[microbatch] = place
            yield microbatch, self.values[place]

    def of(self, microbatch: int) -> torch.Tensor | None:
        """A microbatch's loss, if it is here."""
        place = self._place_of.get(microbatch, -1)
        return self.values[place] if 0 <= place < len(self.values) else None

    def in_order(self) -> list[torch.Tensor]:
        """All of them, by microbatch as far as that is known."""
        places = [place for _, place in sorted(self._place_of.items()) if place < len(self.values)]
        return [self.values[place] for place in (*places, *sorted(set(range(len(self.values))) - set(places)))]
