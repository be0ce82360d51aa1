"""Make docs/images/step.png: one step of a V schedule, as it was planned and as it ran, in a picture.

    torchrun --nproc_per_node 2 docs/make_pictures.py

The step is the shortest of thirty. The plan is the schedule's order at the median times that its actions took there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from pp_runtime import PipelineStage, ScheduleZBVZeroBubble
from pp_runtime.__main__ import main as pp_runtime

WIDTH, ROWS = 512, 128
STEPS = 30  # the shortest is shown: the least disturbed by what else the machine does


def stage_module() -> nn.Module:
    """A stage of matrix products: F, I and W take about as long."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())


def record(trace: Path, microbatches: int) -> None:
    """Train some steps; rank 0 writes all ranks' timeline of the shortest."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    indices = (rank, 2 * world - 1 - rank)  # down the ranks and up again
    stages = [PipelineStage(stage_module(), index, 2 * world, device) for index in indices]
    schedule = ScheduleZBVZeroBubble(stages, microbatches, loss_fn=nn.functional.mse_loss)
    schedule.record_timeline = True
    # Both ends of a V are on rank 0, which has the inputs and the targets.
    x = torch.randn(microbatches * ROWS, WIDTH)
    timelines = []
    for _ in range(STEPS):
        if rank == 0:
            schedule.step(x, target=x, return_outputs=False)
        else:
            schedule.step()
        timelines.append(schedule.timeline().gather())
    if rank == 0:
        shortest = min(timelines, key=lambda timeline: timeline.makespan)
        print(f"measured: {1000 * shortest.makespan:.1f} ms")
        shortest.to_chrome(trace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images" / "step.png")
    parser.add_argument("--microbatches", type=int, default=4)
    flags = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "step.json"
        record(trace, flags.microbatches)
        if dist.get_rank() == 0:
            setting = ["--ranks", str(dist.get_world_size()), "--microbatches", str(flags.microbatches)]
            pp_runtime(["show", "ZBVZeroBubble", *setting, "--measured", str(trace), "--png", str(flags.output)])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
