"""The command line's ``advise``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

import torch

from pp_runtime.advising.advice import Setting, advise_for
from pp_runtime.advising.advise import counts_to_try, training_schedule
from pp_runtime.advising.decoder import DecoderShape
from pp_runtime.advising.stage_costs import LinkSpeed
from pp_runtime.advising.tally import DeviceSpeed
from pp_runtime.errors import PipelineUsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def add_advise_arguments(command: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """What ``advise`` takes."""
    shape = command.add_argument_group("the model, a decoder as Llama's")
    shape.add_argument("--layers", type=count, required=True)
    shape.add_argument("--hidden", type=count, required=True)
    shape.add_argument("--heads", type=count, help="without it, of size 128")
    shape.add_argument("--kv-heads", type=count, help="without it, as many as heads")
    shape.add_argument("--feed-forward", type=count, help="without it, 8/3 of hidden, in multiples of 256")
    shape.add_argument("--vocabulary", type=count, default=32_000, help="(%(default)s)")
    shape.add_argument("--tied", action="store_true", help="the head is the embedding")
    shape.add_argument("--recompute", action="store_true", help="layers keep their input alone, and run again")
    shape.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    batch = command.add_argument_group("a step")
    batch.add_argument("--batch", type=count, required=True, help="sequences in it")
    batch.add_argument("--sequence", type=count, default=4096, help="tokens in each (%(default)s)")
    batch.add_argument(
        "--microbatches", type=count, nargs="+", default=[], help="numbers to try; without it 1, 2, 4, 8 x ranks"
    )
    batch.add_argument("--schedules", nargs="+", default=[], help="to try; without it, all")
    machine = command.add_argument_group("the machines")
    machine.add_argument("--ranks", type=count, required=True)
    machine.add_argument("--memory", type=_size, help="that a rank has, as 80GiB")
    machine.add_argument(
        "--flops", type=_size, help="that a rank's device reaches in a second, as 400T; without it, times are relative"
    )
    machine.add_argument("--memory-bandwidth", type=_size, help="bytes a second that the device reaches, as 2.5T")
    machine.add_argument("--link", type=_size, help="bytes a second between ranks, as 40G")
    machine.add_argument("--latency", type=float, default=0.0, help="seconds that a message takes beside its bytes")
    machine.add_argument(
        "--optimizer", type=float, default=2.0, help="its state, in sizes of the parameters; Adam's is 2 (%(default)s)"
    )


def print_advice(options: argparse.Namespace) -> None:
    """Print the advice."""
    dtype = getattr(torch, options.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise PipelineUsageError(f"'{options.dtype}' is not a dtype of torch; one is bfloat16")
    if options.flops is None and (options.memory_bandwidth or options.link or options.latency):
        raise PipelineUsageError("bandwidths and latencies need --flops, too: without it there are no seconds")
    heads = options.heads or max(1, options.hidden // 128)
    shape = DecoderShape(
        layers=options.layers,
        hidden=options.hidden,
        heads=heads,
        kv_heads=options.kv_heads or heads,
        feed_forward=options.feed_forward or -(-options.hidden * 8 // 3 // 256) * 256,
        vocabulary=options.vocabulary,
        tied=options.tied,
        recompute=options.recompute,
        dtype=dtype,
    )
    device = DeviceSpeed(options.flops or 1e12, options.memory_bandwidth or float("inf"))
    link = LinkSpeed(options.latency, options.link or float("inf"))
    names = tuple(map(training_schedule, options.schedules)) or Setting.schedules
    setting = Setting(options.ranks, options.memory, names, link, options.optimizer)
    counts = options.microbatches or counts_to_try(options.batch, options.ranks)
    units = shape.units(options.batch, options.sequence, counts, device)
    print(advise_for(units, setting, in_seconds=options.flops is not None).table())


def _size(text: str) -> int:
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([kmgt]i?|)b?", text, re.IGNORECASE)
    try:
        value = float(found[1]) * _UNITS[found[2].upper()] if found else 0.0
    except ValueError:
        value = 0.0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not an amount: write it as 80GiB, 400T or 4e14")
    return int(value)
