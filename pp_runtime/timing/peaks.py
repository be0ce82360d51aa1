"""How many activations and how many message slots each rank holds at its fullest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pp_runtime.orders import Action, ir, leaves
from pp_runtime.timing.network import Network


def activation_peaks(order: Mapping[int, Sequence[Action]], kept_for_weight: float = 1.0) -> dict[int, float]:
    """The most activations that a rank holds at once; one is what one forward of one stage keeps.

    A forward adds one, a full backward frees it. Where the backward is split, ``kept_for_weight`` is the share that
    stays from I to W: 1, the default, counts an activation in full until its W, as the caps of papers do.
    """
    trains = any(
        kind is not ir.FORWARD for actions in order.values() for _, kind, _, _ in leaves(actions) if kind in _KEPT
    )
    peaks = {}
    for rank, actions in order.items():
        held = peak = 0.0
        for _, kind, _, _ in leaves(actions):
            if kind is ir.FORWARD:
                held += 1.0
                peak = max(peak, held)
                if not trains:
                    held -= 1.0
            elif kind is ir.FULL_BACKWARD:
                held -= 1.0
            elif kind is ir.BACKWARD_INPUT:
                held -= 1.0 - kept_for_weight
            elif kind is ir.BACKWARD_WEIGHT:
                held -= kept_for_weight
        peaks[rank] = peak
    return peaks


_KEPT = frozenset({ir.FORWARD, ir.FULL_BACKWARD, ir.BACKWARD_INPUT, ir.BACKWARD_WEIGHT})


def slot_peaks(
    order: Mapping[int, Sequence[Action]],
    starts: Mapping[int, Sequence[float]],
    ends: Mapping[int, Sequence[float]],
    network: Network,
) -> dict[int, int]:
    """The most received messages that a rank holds at once, at the given times of its actions.

    A message takes a slot of its receiver when it leaves its sender. An activation keeps it until the stage's B or W
    (its F, where nothing is trained), a gradient until the stage's B or I.
    """
    trains = any(
        kind is not ir.FORWARD for actions in order.values() for _, kind, _, _ in leaves(actions) if kind in _KEPT
    )
    changes: dict[int, list[tuple[float, int]]] = {rank: [] for rank in order}
    sends_forward = ir.SEND_F if network.explicit else ir.FORWARD
    for rank, actions in order.items():
        freed = changes[rank]
        for place, action in enumerate(actions):
            end = ends[rank][place]
            for stage, kind, _, _ in action.sub_actions or (action,):
                if kind is ir.RECV_F or kind is ir.RECV_B:
                    continue
                if kind is sends_forward:
                    for channel in network.remote_forward[stage]:
                        changes[channel.receiver].append((end, 1))
                elif kind is ir.SEND_B or (
                    not network.explicit and (kind is ir.FULL_BACKWARD or kind is ir.BACKWARD_INPUT)
                ):
                    for channel in network.remote_backward[stage]:
                        changes[channel.receiver].append((end, 1))
                freed_here = 0
                if kind is ir.FULL_BACKWARD or kind is ir.BACKWARD_INPUT:
                    freed_here = network.remote_gradients_in[stage]
                if kind is ir.FULL_BACKWARD or kind is ir.BACKWARD_WEIGHT or (kind is ir.FORWARD and not trains):
                    freed_here += network.remote_activations_in[stage]
                if freed_here:
                    freed.append((end, -freed_here))
    return {rank: _peak(found) for rank, found in changes.items()}


def _peak(changes: list[tuple[float, int]]) -> int:
    """The highest running sum; what is freed at a moment is free for what comes at that moment."""
    changes.sort()
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
