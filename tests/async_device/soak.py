"""Many steps, and many killed ranks, through the asynchronous device's memory under random delays.

    python -m tests.async_device.soak                  # 1,000 steps on 4 ranks, 50 kills: about two minutes
    python -m tests.async_device.soak --steps 5000 --kills 200

Every loss and gradient is compared with the plain model's; after a kill every other rank must raise, name the rank,
keep its parameters and get its streams back.
"""

from __future__ import annotations

import argparse
import time

from tests.async_device import device
from tests.async_device.test_device_channels import _die_with_work_queued
from tests.helpers.pipelines import Setting, Twins
from tests.running import test_step_failure

SETTINGS = (("1F1B", 1), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2), ("DualPipeV", 2))


def _train(rank: int, schedule: str, stages_per_rank: int, steps: int) -> list[str]:
    twins = Twins(rank, Setting(schedule, 6, stages_per_rank))
    found: list[str] = []
    for number in range(steps):
        found += twins.train(f"step {number}", twins.example.batch(12 if number % 7 else 24, number))
        if number % 10 == 9:
            found += twins.evaluate(f"evaluation {number}", twins.example.batch(12, number))
        if found:
            break
    return found[:2]


def soak(steps: int) -> None:
    for schedule, stages in SETTINGS:
        since = time.monotonic()
        options = {"schedule": schedule, "stages_per_rank": stages, "steps": steps // len(SETTINGS)}
        found = device.run(_train, 4, 60 + steps, delay_us=1000, seed=5, **options)
        wrong = [line for lines in found for line in lines]
        took = time.monotonic() - since
        print(f"{schedule}: {options['steps']} steps on 4 ranks, {took:.0f} s, wrong: {wrong or 'none'}", flush=True)


def kill(times: int) -> None:
    wrong, slowest = [], 0.0
    for seed in range(times):
        schedule, stages = SETTINGS[seed % len(SETTINGS)]
        if seed % 5 == 4:
            (met, streams), _ = device.run(_die_with_work_queued, 2, deaths=[1], delay_us=0, seed=seed)
            wrong += [f"seed {seed}: {met}, streams {streams:.1f} s"] if met is None or streams > 5 else []
            continue
        options = {"schedule": schedule, "stages_per_rank": stages, "stage": 1, "way": "death"}
        ranks = test_step_failure.RANKS
        found = device.run(test_step_failure._fail, ranks, deaths=[1], delay_us=2000, seed=seed, **options)
        for rank in (0, 2):
            met, unchanged = found[rank]
            slowest = max(slowest, 0.0 if met is None else met.seconds)
            if met is None or not met.is_a("PipelineError") or "rank 1" not in met.text or not unchanged:
                wrong.append(f"seed {seed}, {schedule}, rank {rank}: {met}")
    print(f"{times} kills, slowest to raise {slowest:.2f} s, wrong: {wrong or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=50)
    options = parser.parse_args()
    soak(options.steps)
    kill(options.kills)


if __name__ == "__main__":
    main()
