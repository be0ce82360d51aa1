"""How long an order takes to build, lower, prove and simulate, beside torch's own builder, and that it grows linearly.

    python benchmarks/orders.py            # 16 to 128 ranks x 4 stages x 1024 microbatches
    python benchmarks/orders.py --quick    # an eighth of the microbatches
    python benchmarks/orders.py --torch    # and torch's builder at 32 ranks x 4 stages x 256 microbatches

One process, one core; Interleaved1F1B. "lower" inserts the communication, "room" counts what channels must hold.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pp_runtime.orders.catalogue import build_order
from pp_runtime.planning.passes.communication import insert_communication
from pp_runtime.planning.passes.credits import peak_messages
from pp_runtime.planning.verifier import verify, verify_communication
from pp_runtime.timing.simulation import simulate

STAGES_PER_RANK = 4
COLUMNS = ("build", "verify", "lower", "verify all", "room", "simulate")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def measure(ranks: int, microbatches: int) -> tuple[int, list[float]]:
    """(compute actions, seconds of each column)."""
    stages = ranks * STAGES_PER_RANK
    build, (order, placement) = timed(lambda: build_order("Interleaved1F1B", ranks, stages, microbatches))
    prove, _ = timed(lambda: verify(order, placement, microbatches))
    lower, whole = timed(lambda: insert_communication(order, placement))
    prove_all, _ = timed(lambda: verify_communication(whole, placement, microbatches))
    room, _ = timed(lambda: peak_messages(whole, placement))
    play, _ = timed(lambda: simulate(order, placement=placement))
    return sum(map(len, order.values())), [build, prove, lower, prove_all, room, play]


def torch_seconds(ranks: int, microbatches: int) -> float:
    """torch's builder, which lowers as well; it proves nothing."""
    from torch.distributed.pipelining import ScheduleInterleaved1F1B

    stages = ranks * STAGES_PER_RANK
    fake: list[Any] = [
        SimpleNamespace(stage_index=rank, num_stages=stages, group_size=ranks, group_rank=0, is_last=False)
        for rank in range(0, stages, ranks)
    ]
    return timed(lambda: ScheduleInterleaved1F1B(fake, microbatches))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="128 microbatches instead of 1024")
    parser.add_argument(
        "--torch", action="store_true", help="time torch's builder for 32 ranks and 256 microbatches too"
    )
    options = parser.parse_args()
    microbatches = 128 if options.quick else 1024
    print(f"{'ranks':>5} {'actions':>9} " + " ".join(f"{name:>10}" for name in COLUMNS) + f" {'us/action':>10}")
    for ranks in (16, 32, 64, 128):
        actions, seconds = measure(ranks, microbatches)
        each = 1e6 * sum(seconds) / actions
        print(f"{ranks:5} {actions:9} " + " ".join(f"{s:9.2f}s" for s in seconds) + f" {each:10.2f}")
    if options.torch:
        _, seconds = measure(32, 256)
        print(f"32 x 4 x 256: build and lower {seconds[0] + seconds[2]:.2f} s, torch {torch_seconds(32, 256):.2f} s")


if __name__ == "__main__":
    main()
