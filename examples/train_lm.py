"""Train a small language model on real text with pipeline parallelism.

    torchrun --nproc_per_node 2 examples/train_lm.py
    torchrun --nproc_per_node 4 examples/train_lm.py --schedule Interleaved1F1B --layers 8 --data my_text/
    torchrun --nproc_per_node 3 examples/train_lm.py --resume --steps 900     # goes on with another number of ranks

The text is, unless --data names another, the source of Python's standard library; a token is a byte. It runs on CUDA
with NCCL where every rank has a GPU, else on CPUs with gloo. Checkpoints have the unsplit model's parameter names.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from lm import checkpoints
from lm.history import History
from lm.model import LanguageModel, ModelConfig, token_loss
from lm.optimisation import learning_rate, make_adamw
from lm.text import VOCABULARY, Corpus, bits
from pp_runtime import BuiltPipeline, RunRecord, build_pipeline
from pp_runtime.orders import ORDERS

SCHEDULES = tuple(name for name, spec in ORDERS.items() if not spec.forward_only)


def join() -> torch.device:
    """Join the ranks that torchrun started: CUDA and NCCL where each has a GPU of its own, else CPU and gloo."""
    if "RANK" not in os.environ:
        raise SystemExit("Start this with torchrun: torchrun --nproc_per_node 2 examples/train_lm.py")
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def build(flags: argparse.Namespace, device: torch.device) -> BuiltPipeline:
    """The model, the same on every rank, and of it this rank's share."""
    model = LanguageModel(ModelConfig(VOCABULARY, flags.length, flags.width, flags.layers, flags.heads, flags.dropout))
    model.initialise(seed=0, layers=flags.layers)
    return build_pipeline(
        model,
        flags.schedule,
        microbatches=flags.microbatches,
        loss_fn=token_loss,
        example=(torch.zeros(1, flags.length, dtype=torch.long),),
        device=device,
        num_stages=flags.stages_per_rank and flags.stages_per_rank * dist.get_world_size(),
    )


def train(flags: argparse.Namespace) -> None:
    """Train from the start, or from the newest checkpoint, to the last step."""
    device = join()
    corpus, pipeline = Corpus.read(flags.data, flags.data_limit), build(flags, device)
    optimizer = make_adamw(pipeline.parameters(), flags.rate, flags.decay)
    folder, sizes = flags.output / "checkpoints", (flags.batch, flags.length)
    begin = resume(folder, pipeline, optimizer, flags.steps) if flags.resume else 0
    entropy = corpus.unigram_entropy()
    # The loss is known where the last stage is, so that rank keeps the history and talks.
    history = History(flags.output / "losses.jsonl", begin) if pipeline.holds_last else None
    if history is not None:
        learnt = f"{len(corpus.training):,} bytes to learn, unigram entropy {entropy:.3f} nats a byte"
        print(f"{pipeline.report()}\non {device.type}; {learnt}", flush=True)
    bar = progress_bar(begin, flags, shown=pipeline.holds_last)
    run = RunRecord(pipeline)
    for step in range(begin, flags.steps):
        done = step + 1
        is_last = done == flags.steps
        # The timeline is recorded in the last step, when nothing is new any more.
        pipeline.schedule.record_timeline = is_last
        pipeline.train()
        loss = mean_loss(pipeline.step, [corpus.batch(step, *sizes)], device, return_outputs=False)
        pipeline.clip_grad_norm_(flags.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, flags.steps, flags.rate, flags.warmup)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update(flags.batch * flags.length)
        if history is not None:
            history.add(done, loss=loss)
        run.add(done, tokens=flags.batch * flags.length, loss=loss)
        if is_last:
            timeline = pipeline.schedule.timeline().gather()
        if is_last or done % flags.validate_every == 0:
            pipeline.train(False)
            batches = [corpus.validation_batch(index, *sizes) for index in range(flags.validation_batches)]
            validation = mean_loss(pipeline.eval, batches, device)
            run.add(done, validation_loss=validation)
            if history is not None:
                history.add(done, validation_loss=validation)
        if is_last or (flags.save_every and done % flags.save_every == 0):
            checkpoints.save(folder, done, pipeline, optimizer)
    bar.close()
    run.save(flags.output / "run.json")
    if history is not None:
        timeline.save_png(flags.output / "timeline.png")
        history.save_png(flags.output / "loss.png", entropy)
        report(history, entropy, flags.output)
    dist.destroy_process_group()


def mean_loss(run: Callable, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, **options: bool) -> float:
    """Run batches through the pipeline; their mean loss where the last stage is, else nan."""
    losses: list[Tensor] = []
    for x, y in batches:
        of_batch: list[Tensor] = []
        run(x.to(device), target=y.to(device), losses=of_batch, **options)
        losses += of_batch
    return torch.stack(losses).mean().item() if losses else float("nan")


def resume(folder: Path, pipeline: BuiltPipeline, optimizer: torch.optim.Optimizer, steps: int) -> int:
    """Load the newest checkpoint and return its step."""
    path = checkpoints.newest(folder)
    if path is None:
        raise SystemExit(f"--resume: there is no checkpoint under {folder}.")
    step = checkpoints.load(path, pipeline, optimizer)
    if step >= steps:
        raise SystemExit(f"--resume: {path} has done {step} steps already; give --steps more than that.")
    return step


def progress_bar(done: int, flags: argparse.Namespace, *, shown: bool) -> tqdm:
    """Tokens learnt, and how many a second; without a terminal a line every few seconds is enough."""
    seconds, tokens = 0.2 if sys.stderr.isatty() else 10.0, flags.batch * flags.length
    sizes = {"initial": done * tokens, "total": flags.steps * tokens, "unit": "tok", "unit_scale": True}
    return tqdm(**sizes, mininterval=seconds, disable=not shown)


def report(history: History, entropy: float, output: Path) -> None:
    """Say how well it went."""
    loss, validation = history.series("loss")[1][-1], history.series("validation_loss")[1][-1]
    print(
        f"training loss {loss:.3f}, validation loss {validation:.3f} nats a byte ({bits(validation):.2f} bits); "
        f"unigram entropy {entropy:.3f} ({bits(entropy):.2f} bits)\n"
        f"{output}: loss.png, timeline.png, losses.jsonl, checkpoints/, run.json\n"
        f"python -m pp_runtime report {output / 'run.json'} makes a page of it",
        flush=True,
    )


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FILE_OR_DIR", help="the text, instead of Python's own source")
    parser.add_argument("--data-limit", type=int, default=20_000_000, help="bytes of it to read at most")
    parser.add_argument("--output", type=Path, default=Path("runs/train"))
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")

    pipeline = parser.add_argument_group("pipeline")
    pipeline.add_argument("--schedule", choices=SCHEDULES, default="1F1B")
    pipeline.add_argument("--stages-per-rank", type=int, help="where the schedule leaves a choice")
    pipeline.add_argument("--microbatches", type=int, default=4)

    model = parser.add_argument_group("model")
    model.add_argument("--layers", type=int, default=4)
    model.add_argument("--width", type=int, default=128)
    model.add_argument("--heads", type=int, default=4)
    model.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    model.add_argument("--dropout", type=float, default=0.0)

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=500)
    training.add_argument("--batch", type=int, default=32, help="sequences in a step, over all microbatches")
    training.add_argument("--rate", type=float, default=3e-3, help="peak of the learning rate")
    training.add_argument("--warmup", type=int, default=20, help="steps")
    training.add_argument("--decay", type=float, default=0.1, help="weight decay of matrices")
    training.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient of all stages")
    training.add_argument("--validate-every", type=int, default=50, help="steps")
    training.add_argument("--validation-batches", type=int, default=4)
    training.add_argument(
        "--save-every", type=int, default=0, help="steps between checkpoints; the last is kept anyway"
    )
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_flags())
