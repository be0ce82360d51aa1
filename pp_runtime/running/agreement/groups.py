"""Process groups: which one a pipeline runs on, and whether its other ranks exist."""

from __future__ import annotations

import weakref

import torch.distributed as dist

from pp_runtime.errors import PipelineModeError, PipelineUsageError

# Those that stages were made for in this process.
_of_stages: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def group_or_world(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group, or the default one."""
    world = group if group is not None else dist.group.WORLD
    if world is None:
        raise PipelineUsageError("there is no process group: call torch.distributed.init_process_group() first")
    return world


def remember_group(group: dist.ProcessGroup | None) -> None:
    """A stage was made for this group."""
    _of_stages.add(group_or_world(group))


def groups_of_stages() -> list[dist.ProcessGroup]:
    """The groups that stages were made for in this process, without those that were destroyed since."""
    known = dist.distributed_c10d._world.pg_map
    return [group for group in _of_stages if group in known]


def is_dry_run(group: dist.ProcessGroup) -> bool:
    """Whether this is a group of torch's ``fake`` backend, whose other ranks do not exist."""
    return "fake" in dist.get_backend(group)


def check_ranks_exist(group: dist.ProcessGroup) -> None:
    """PipelineModeError in a dry run of several ranks: no message can come from the others."""
    size = dist.get_world_size(group)
    if size > 1 and is_dry_run(group):
        raise PipelineModeError(
            f"rank {dist.get_rank(group)} cannot run a step: the other {size - 1} of the pipeline's {size} ranks do "
            "not exist, since its process group is of the 'fake' backend. What needs no other rank works: "
            "schedule.memory_report(signature), schedule.pipeline_order, python -m pp_runtime simulate, and steps of a "
            "pipeline whose group has one rank"
        )
