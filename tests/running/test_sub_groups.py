"""Pipelines over parts of the world, where group ranks are not global ranks; several at once, overlapping ones."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.helpers import ranks
from tests.helpers.pipelines import LOOPED, V_SHAPED, Setting, Twins, compare, stages_allowed


def _two_halves(rank: int, schedule: str, stages_per_rank: int) -> list[str]:
    """Ranks 0 and 2 train one pipeline while 1 and 3 train another."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[rank % 2]
    setting = Setting(schedule, 4, stages_per_rank, model=["mlp", "uneven"][rank % 2])
    return compare(dist.get_rank(group), setting, group)


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", *LOOPED, *V_SHAPED])
def test_two_pipelines_on_halves_of_the_world(schedule: str) -> None:
    stages_per_rank = stages_allowed(schedule, 2)[-1]
    assert ranks.run(_two_halves, 4, schedule=schedule, stages_per_rank=stages_per_rank) == [[]] * 4


def _on_some(rank: int, members: list[int]) -> list[str]:
    group = dist.new_group(members)
    if rank not in members:
        return []
    return compare(dist.get_rank(group), Setting("1F1B", 5, model="tuples"), group)


@pytest.mark.parametrize("members", [[1, 2], [0, 2, 3], [3]])
def test_ranks_outside_the_group_need_do_nothing(members: list[int]) -> None:
    assert ranks.run(_on_some, 4, members=members) == [[]] * 4


def _on_a_mesh(rank: int) -> list[str]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    group = mesh.get_group("pp")
    return compare(dist.get_rank(group), Setting("Interleaved1F1B", 4, 2), group)


def test_a_dimension_of_a_mesh() -> None:
    assert ranks.run(_on_a_mesh, 4) == [[]] * 4


def _take_turns(rank: int) -> list[str]:
    """Two pipelines on the same ranks, steps interleaved; a third runs the other way on an equal group."""
    again = dist.new_group([0, 1, 2])
    several = [
        Twins(rank, Setting("1F1B", 4, model="uneven")),
        Twins(rank, Setting("Interleaved1F1B", 3, 2)),
        Twins(rank, Setting("GPipe", 5, model="tuples"), again),
    ]
    return [
        line
        for number in range(3)
        for place, twins in enumerate(several)
        for line in twins.train(f"pipeline {place} step {number}", twins.example.batch(60, number))
    ]


def test_several_pipelines_on_the_same_ranks_take_turns() -> None:
    assert ranks.run(_take_turns, 3) == [[]] * 3


def _overlap(rank: int) -> list[str]:
    """Rank 1 is the last of one pipeline and the first of another."""
    found = []
    groups = {(0, 1): dist.new_group([0, 1]), (1, 2): dist.new_group([1, 2])}
    mine = [
        Twins(dist.get_rank(group), Setting("1F1B", 4), group) for members, group in groups.items() if rank in members
    ]
    for number in range(3):
        for place, twins in enumerate(mine):
            found += twins.train(f"pipeline {place} step {number}", twins.example.batch(8, number))
    return found


def test_pipelines_on_overlapping_groups() -> None:
    assert ranks.run(_overlap, 3) == [[]] * 3


def _beside_collectives(rank: int) -> list[str]:
    """The user's own messages on the same group, between and in the middle of steps, do not mix with ours."""
    import torch

    twins = Twins(rank, Setting("1F1B", 4))
    found = []
    for number in range(3):
        found += twins.train(f"step {number}", twins.example.batch(8, number))
        value = torch.tensor([float(rank)])
        dist.all_reduce(value)
        received = torch.zeros(1)
        request = dist.isend(torch.tensor([float(rank)]), (rank + 1) % 3)
        dist.recv(received, (rank - 1) % 3)
        request.wait()
        if value.item() != 3 or received.item() != (rank - 1) % 3:
            found.append(f"step {number}: {value.item()} and {received.item()} in the user's own messages")
    return found


def test_the_users_own_messages_on_the_same_group() -> None:
    assert ranks.run(_beside_collectives, 3) == [[]] * 3
