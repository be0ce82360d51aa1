"""The command line's ``advise``."""

from __future__ import annotations

import argparse

import torch

from pp_runtime.advising.advice import Setting, advise_for
from pp_runtime.advising.advise import counts_to_try, training_schedule
from pp_runtime.advising.decoder import DecoderShape
from pp_runtime.advising.stage_costs import LinkSpeed
from pp_runtime.advising.tally import DeviceSpeed
from pp_runtime.errors import PipelineUsageError


def print_advice(options: argparse.Namespace, dtype: torch.dtype) -> None:
    """Print the advice for a decoder that the command line names."""
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
