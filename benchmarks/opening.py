"""What the first step of a pipeline takes beside its second, and what a rank opens before it.

    python benchmarks/opening.py                      # on the CPU and on the asynchronous device, 2 and 4 ranks
    python benchmarks/opening.py --ranks 16 --count   # only counts, for any number of ranks: nothing is opened

The first step plans, exchanges words with the other ranks, opens the channels and runs; the second runs. Seconds, the
slowest rank's, median over turns. Ranks are forked from a process that has torch loaded.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pp_runtime.orders.catalogue import build_order
from pp_runtime.orders.edges import adjacent_edges
from pp_runtime.planning import Channel, insert_communication
from pp_runtime.running.communicators import fewest_communicators, key_of
from tests.async_device import device
from tests.helpers import ranks
from tests.helpers.pipelines import Setting, Twins, step

SETTINGS = (("1F1B", 1), ("Interleaved1F1B", 4), ("ZBVZeroBubble", 2))
WAYS = (
    ("CPU, shared memory", "cpu", "auto", "auto"),
    ("CPU, gloo", "cpu", "c10d", "auto"),
    ("device, its memory", "sim", "auto", "auto"),
    ("device, communicators", "sim", "c10d", "auto"),
    ("device, one communicator a channel", "sim", "c10d", "edge"),
)


def _open(rank: int, setting: Setting, transport: str, communicators: str) -> tuple[float, float]:
    os.environ["PP_RUNTIME_TRANSPORT"], os.environ["PP_RUNTIME_COMMUNICATORS"] = transport, communicators
    twins = Twins(rank, setting)
    took = []
    for number in range(2):
        batch = twins.example.batch(2 * setting.microbatches, number)
        since = time.perf_counter()
        step(twins.schedule, twins.stages, batch)
        took.append(time.perf_counter() - since)
    return took[0], took[1]


def measure(count: int, turns: int) -> None:
    for schedule, stages in SETTINGS:
        setting = Setting(schedule, 2 * count, stages)
        for name, where, transport, communicators in WAYS:
            options = {"setting": setting, "transport": transport, "communicators": communicators}
            found = []
            for _ in range(turns):
                opened = ranks.run if where == "cpu" else functools.partial(device.run, delay_us=0)
                each = opened(_open, count, **options)
                found.append([max(times) for times in zip(*each, strict=True)])
            first, second = (statistics.median(column) for column in zip(*found, strict=True))
            label = f"{schedule:>16} x{stages} {count:>3} ranks  {name:<36}"
            print(f"{label} first step {first:.3f} s, second {second:.3f} s")


def counts(count: int) -> None:
    """What the middle rank opens. Words are exchanged a fixed number of times, whatever the channels."""
    for schedule, stages in SETTINGS:
        order, placement = build_order(schedule, count, count * stages, 2 * count)
        edges = adjacent_edges(count * stages)
        kind = fewest_communicators([insert_communication(order, placement)], placement, edges)
        channels = [
            Channel(edge.source, edge.destination, backward, *ends)
            for edge in edges
            for backward, ends in enumerate(_both(placement[edge.source], placement[edge.destination]))
            if placement[edge.source] != placement[edge.destination]
        ]
        own = [channel for channel in channels if count // 2 in (channel.sender, channel.receiver)]
        made = {way: len({key_of(way, channel) for channel in own}) for way in (kind, "edge")}
        print(
            f"{schedule:>16} x{stages} {count:>3} ranks: {len(own)} channels; communicators: {made[kind]} ({kind}), "
            f"one a channel would be {made['edge']}; exchanges: claim, offer, reach, opened"
        )


def _both(source: int, destination: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (source, destination), (destination, source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--count", action="store_true", help="only counts")
    options = parser.parse_args()
    for count in options.ranks:
        counts(count)
        if not options.count:
            measure(count, options.turns)


if __name__ == "__main__":
    main()
