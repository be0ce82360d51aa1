"""torch's own schedules over stages that exist in name only."""

from types import SimpleNamespace

from pytest import importorskip


def torch_schedule(name, ranks, stages, microbatches):
    """torch's schedule as rank 0 makes it, or None where torch refuses the setting with ValueError."""
    schedules = importorskip("torch.distributed.pipelining.schedules")
    schedule_class = schedules.get_schedule_class(name)
    fake = [
        SimpleNamespace(
            stage_index=index, num_stages=stages, group_size=ranks, group_rank=0, is_last=False, submod=None,
            has_backward=True, is_first=index == 0, group=None, device=None
        )
        for index in range(stages // ranks)
    ]  # fmt: skip
    try:
        single = issubclass(schedule_class, schedules.PipelineScheduleSingle)
        return schedule_class(fake[0] if single else fake, microbatches)
    except ValueError:
        return None
