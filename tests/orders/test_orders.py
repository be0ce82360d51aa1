"""Orders: torch's own where torch has them, the papers' bubbles and activation peaks elsewhere."""

import pytest

from pp_runtime.orders.catalogue import ORDERS, build_order
from pp_runtime.orders.ir import BACKWARD_WEIGHT, FORWARD, FULL_BACKWARD, from_torch_form, leaves, to_torch_form
from pp_runtime.orders.placement import looped, v_shaped
from pp_runtime.planning.verifier import verify
from tests.helpers.torch_orders import torch_schedule

STAGES_PER_RANK = {name: spec.stages_per_rank_allowed or (1, 2, 3) for name, spec in ORDERS.items()}
TORCH_NAMES = ["GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]


def counts_of(ranks):
    return sorted({1, 2, 3, ranks, ranks + 1, 2 * ranks, 3 * ranks - 1, 2 * ranks + 3, 4 * ranks, max(ranks - 1, 1)})


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_orders_are_torch_orders_wherever_torch_has_one(name, monkeypatch):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    # Only the order is wanted, and lowering it takes torch most of the time.
    monkeypatch.setattr(schedules._PipelineScheduleRuntime, "_prepare_schedule_with_comms", lambda *_, **__: None)
    single = STAGES_PER_RANK[name] == (1,)
    compared = 0
    for ranks in (1, 2, 3, 4, 6):
        for per_rank in STAGES_PER_RANK[name]:
            for microbatches in counts_of(ranks):
                schedule = torch_schedule(name, ranks, ranks * per_rank, microbatches)
                if schedule is None:
                    continue
                ours, _ = build_order(name, ranks, ranks * per_rank, microbatches)
                theirs = from_torch_form(schedule._get_pipeline_order() if single else schedule.pipeline_order)
                if name == "1F1B":  # torch counts the forwards of the last rank from 1, in its text only
                    ours[ranks - 1] = theirs[ranks - 1] = []
                assert {rank: [str(a) for a in actions] for rank, actions in ours.items()} == {
                    rank: [str(a) for a in actions if "REDUCE" not in str(a)] for rank, actions in theirs.items()
                }, (ranks, per_rank, microbatches)
                compared += 1
    assert compared >= 10


@pytest.mark.parametrize("name", ORDERS)
def test_every_count_of_microbatches_makes_an_order_that_ends(name):
    for ranks in (1, 2, 3, 4, 7):
        for per_rank in STAGES_PER_RANK[name]:
            for microbatches in counts_of(ranks):
                order, placement = build_order(name, ranks, ranks * per_rank, microbatches)
                verify(order, placement, microbatches, forward_only=ORDERS[name].forward_only)


@pytest.mark.parametrize("name", ["LoopedBFS", "ForwardOnly"])
def test_ranks_may_hold_unequally_many_stages(name):
    for ranks, stages in ((2, 3), (3, 7), (4, 5)):
        order, placement = build_order(name, ranks, stages, 5)
        verify(order, placement, 5, forward_only=ORDERS[name].forward_only)


@pytest.mark.parametrize(
    ("name", "counts", "mend"),
    [
        ("1F1B", (2, 4, 4), "split the model into 2 stages"),
        ("GPipe", (2, 2, 0), "at least 1"),
        ("ZBVZeroBubble", (2, 2, 4), "split the model into 4 stages"),
        ("Interleaved1F1B", (2, 5, 4), "into 4 or 6 stages"),
        ("LoopedBFS", (4, 3, 4), "at most 3 ranks"),
        ("VHalf", (0, 0, 4), "give at least 1"),
        ("Unknown", (2, 2, 4), "the orders are GPipe, 1F1B"),
    ],
)
def test_counts_that_an_order_cannot_have_are_refused_with_the_mend(name, counts, mend):
    with pytest.raises(ValueError, match=mend):
        build_order(name, *counts)


def test_placements_loop_or_turn_round():
    assert looped(3, 7) == (0, 1, 2, 0, 1, 2, 0)
    assert v_shaped(3, 9) == (0, 1, 2, 2, 1, 0, 0, 1, 2)
    with pytest.raises(ValueError, match="multiple of 2"):
        v_shaped(2, 3)


@pytest.mark.parametrize("name", ["GPipe", "1F1B", "LoopedBFS", "ZB1P", "VHalf"])
def test_torch_form_keeps_the_order(name):
    order, _ = build_order(name, 4, 4 * STAGES_PER_RANK[name][0], 8)
    assert from_torch_form(to_torch_form(order)) == order


def peak_activations(order):
    """The most forwards on any rank whose weight gradients are still to come."""
    peaks = []
    for actions in order.values():
        held = [0]
        for action in leaves(actions):
            change = {FORWARD: 1, FULL_BACKWARD: -1, BACKWARD_WEIGHT: -1}.get(action.computation_type, 0)
            held.append(held[-1] + change)
        peaks.append(max(held))
    return max(peaks)


def idle_steps(order, num_stages):
    """(makespan less work, most idle time between a rank's own first and last action), F, I and W of one unit."""
    finished = {}
    clock, first, work, place = (dict.fromkeys(order, 0) for _ in range(4))
    moving = True
    while moving:
        moving = False
        for rank, actions in order.items():
            while place[rank] < len(actions):
                needed, made, cost = [], [], 0
                for stage, kind, microbatch, _ in leaves([actions[place[rank]]]):
                    way = 1 if kind is FORWARD else -1
                    if kind is not BACKWARD_WEIGHT:
                        made.append((way, stage, microbatch))
                        if 0 <= stage - way < num_stages:
                            needed.append((way, stage - way, microbatch))
                    cost += 2 if kind is FULL_BACKWARD else 1
                if any(event not in finished for event in needed):
                    break
                start = max([clock[rank], *(finished[event] for event in needed)])
                if place[rank] == 0:
                    first[rank] = start
                clock[rank] = start + cost
                work[rank] += cost
                finished.update(dict.fromkeys(made, clock[rank]))
                place[rank] += 1
                moving = True
    return max(clock.values()) - max(work.values()), max(clock[r] - first[r] - work[r] for r in order)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bubbles_are_the_papers(ranks):
    microbatches = 4 * ranks
    idle = {}
    for name in ("1F1B", "ZB1P", "ZB2P", "ZBVZeroBubble", "VHalf", "VMin"):
        stages = ranks * STAGES_PER_RANK[name][0]
        idle[name] = idle_steps(build_order(name, ranks, stages, microbatches)[0], stages)
    assert idle["1F1B"] == (3 * (ranks - 1), 3 * (ranks - 1))  # (p-1)(F+B)
    assert idle["ZB1P"] == (ranks - 1, ranks - 1)  # (p-1)(F+I-W)
    assert idle["ZB2P"] == (ranks - 1, 0)  # (p-1)(F+I-2W), each rank as late as its first activation
    assert idle["ZBVZeroBubble"] == (ranks - 1, 0)
    # Stages of a V are half as long, so 1F1B's idle time is 6(p-1) of their units.
    assert idle["VHalf"][0] <= 0.5 * 6 * (ranks - 1)
    assert idle["VMin"][0] <= 0.67 * 6 * (ranks - 1)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8, 12, 16])
def test_activation_peaks_are_the_papers(ranks):
    peak = {
        name: peak_activations(build_order(name, ranks, ranks * STAGES_PER_RANK[name][0], 6 * ranks)[0])
        for name in ("1F1B", "ZB1P", "ZB2P", "ZBVZeroBubble", "VHalf", "VMin")
    }
    assert peak["1F1B"] == peak["ZB1P"] == ranks
    assert peak["ZB2P"] == 2 * ranks - 1
    # In stage activations, two to a rank of 1F1B.
    assert peak["ZBVZeroBubble"] <= 2 * ranks
    assert peak["VHalf"] <= ranks + 3
    assert peak["VMin"] <= 2 * ranks / 3 + 3
