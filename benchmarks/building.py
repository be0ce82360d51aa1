"""What a rank takes to have its stage of a model in a checkpoint: the whole model first, or its own layers alone.

    python benchmarks/building.py
    python benchmarks/building.py --width 2048 --blocks 16 --ranks 8

The model is an embedding, equal transformer blocks and a head over the vocabulary, in safetensors with a file for every
block. Each figure is one of a new process that makes one stage: the peak of what it had in use (VmHWM, file pages
included, less what was in use before), and the seconds until the stage is there. Medians of repeats that alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from language_model import LanguageModel
from memory import forget_peak, peak_bytes
from pp_runtime import PipelineStage, layer_stages, partition, without_weights

INDEX = "model.safetensors.index.json"


def make_model(flags: argparse.Namespace) -> LanguageModel:
    return LanguageModel(flags.blocks, flags.width, 8, flags.vocabulary, bias=False)


def write(flags: argparse.Namespace, folder: Path) -> int:
    """The model's checkpoint, a file for each child and each block; its bytes."""
    torch.manual_seed(0)
    files: dict[str, dict[str, Tensor]] = {}
    for name, value in make_model(flags).state_dict().items():
        parts = name.split(".")
        files.setdefault(f"{'-'.join(parts[: 2 if parts[0] == 'blocks' else 1])}.safetensors", {})[name] = value
    for file, held in files.items():
        save_file(held, folder / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return sum(value.numel() * value.element_size() for held in files.values() for value in held.values())


def whole_first(flags: argparse.Namespace, folder: Path) -> PipelineStage:
    """The model with all its weights, then a stage of it."""
    model = make_model(flags)
    for file in folder.glob("*.safetensors"):
        model.load_state_dict(load_file(file), strict=False)
    return stage_of(model, flags)


def own_layers(flags: argparse.Namespace, folder: Path) -> PipelineStage:
    """The model without weights, and those of one stage."""
    with without_weights():
        model = make_model(flags)
    return stage_of(model, flags, weights=folder / INDEX)


def stage_of(model: nn.Module, flags: argparse.Namespace, **options: Any) -> PipelineStage:
    sizes = partition([1.0] * flags.blocks, flags.ranks)
    (stage,) = layer_stages(model, sizes, [dist.get_rank()], "cpu", (torch.zeros(1, 8, dtype=torch.long),), **options)
    return stage


WAYS: dict[str, Callable[[argparse.Namespace, Path], PipelineStage]] = {
    "the whole model first": whole_first,
    "its own layers": own_layers,
}


def measure(rank: int, way: str, flags: argparse.Namespace, folder: Path, answer: Any) -> None:
    """In a process of its own: the peak in bytes, the seconds, and the sum of the stage's weights."""
    dist.init_process_group("fake", rank=rank, world_size=flags.ranks, store=FakeStore())
    before, begin = forget_peak(), time.perf_counter()
    stage = WAYS[way](flags, folder)
    peak, seconds = peak_bytes() - before, time.perf_counter() - begin
    total = sum(parameter.double().sum().item() for parameter in stage.submod.parameters())
    answer.put((peak, seconds, total))


def measured(rank: int, way: str, flags: argparse.Namespace, folder: Path) -> tuple[int, float, float]:
    """By a new process."""
    context = mp.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=measure, args=(rank, way, flags, folder, answer))
    process.start()
    found = answer.get(timeout=flags.timeout)
    process.join()
    return found


def main(flags: argparse.Namespace) -> None:
    """Write the checkpoint, measure, print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write(flags, folder)
        print(f"{size / 1e6:,.0f} MB of weights, {flags.ranks} ranks, torch {torch.__version__}\n")
        print("| rank | | peak, MB | seconds |\n|---|---|---|---|")
        for rank in flags.of_ranks:
            found: dict[str, list[tuple[int, float, float]]] = {way: [] for way in WAYS}
            for _ in range(flags.repeats):
                for way, results in found.items():
                    results.append(measured(rank, way, flags, folder))
            if len({total for results in found.values() for _, _, total in results}) != 1:
                raise RuntimeError(f"the weights of rank {rank} are not the same")
            for way, results in found.items():
                peak, seconds, _ = (statistics.median(each) for each in zip(*results, strict=True))
                print(f"| {rank} | {way} | {peak / 1e6:,.0f} | {seconds:.2f} |")


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--of-ranks", type=int, nargs="+", default=[0, 1], help="which of them are measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a process may take")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_flags())
