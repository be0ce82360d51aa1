"""Train a small language model on real text with pipeline parallelism.

    torchrun --nproc_per_node 2 examples/train_lm.py
    torchrun --nproc_per_node 4 examples/train_lm.py --schedule Interleaved1F1B --layers 8 --data my_text/
    torchrun --nproc_per_node 3 examples/train_lm.py --resume --steps 900     # goes on with another number of ranks

The text is, unless --data names another, the source of Python's standard library; a token is a byte. It runs on CUDA
with NCCL where every rank has a GPU, else on CPUs with gloo. Checkpoints have the unsplit model's parameter names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from lm import checkpoints
from lm.history import History
from lm.model import ModelConfig, token_loss
from lm.optimisation import learning_rate, make_adamw
from lm.stages import SCHEDULES, Rank, build_stages
from lm.text import VOCABULARY, Corpus, bits
from pp_runtime import clip_grad_norm_
from pp_runtime.schedules import PipelineScheduleMulti, get_schedule_class


class Trainer:
    """One rank's share of the training: its stages, their optimizer, and the schedule over all ranks."""

    def __init__(self, flags: argparse.Namespace, rank: Rank) -> None:
        self.flags = flags
        self.rank = rank
        self.corpus = Corpus.read(flags.data, flags.data_limit)
        config = ModelConfig(VOCABULARY, flags.length, flags.width, flags.layers, flags.heads, flags.dropout)
        self.stages = build_stages(rank, flags.schedule, flags.stages_per_rank, config)
        self.modules = [stage.submod for stage in self.stages]
        self.has_first = any(stage.is_first for stage in self.stages)
        self.has_last = any(stage.is_last for stage in self.stages)
        schedule_class = get_schedule_class(flags.schedule)
        takes_many = issubclass(schedule_class, PipelineScheduleMulti)
        self.schedule = schedule_class(
            self.stages if takes_many else self.stages[0], flags.microbatches, loss_fn=token_loss
        )
        self.optimizer = make_adamw(self.modules, flags.rate, flags.decay)

    def train_step(self, step: int) -> float:
        """Forward, backward, clip, update; the mean loss where the last stage is, else nan."""
        for module in self.modules:
            module.train()
        x, y = self.corpus.batch(step, self.flags.batch, self.flags.length)
        args, targets, losses = self._handed_in(x, y)
        self.schedule.step(*args, target=targets, losses=losses, return_outputs=False)
        clip_grad_norm_(self.stages, self.flags.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.flags.steps, self.flags.rate, self.flags.warmup)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return _mean(losses)

    def validate(self) -> float:
        """The mean loss over the fixed validation batches where the last stage is, else nan."""
        for module in self.modules:
            module.eval()
        losses: list[torch.Tensor] = []
        for index in range(self.flags.validation_batches):
            x, y = self.corpus.validation_batch(index, self.flags.batch, self.flags.length)
            args, targets, batch_losses = self._handed_in(x, y)
            self.schedule.eval(*args, target=targets, losses=batch_losses)
            losses += batch_losses or []
        return _mean(losses)

    def _handed_in(
        self, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None, list[torch.Tensor] | None]:
        """What this rank hands the schedule: tokens to the first stage, targets and a list for losses to the last."""
        args = (x.to(self.rank.device),) if self.has_first else ()
        return args, y.to(self.rank.device) if self.has_last else None, [] if self.has_last else None


def train(flags: argparse.Namespace) -> None:
    """Train from the start, or from the newest checkpoint, to the last step."""
    rank = Rank.join()
    trainer = Trainer(flags, rank)
    folder = flags.output / "checkpoints"
    begin = resume(trainer, folder) if flags.resume else 0
    entropy = trainer.corpus.unigram_entropy()
    # The loss is known where the last stage is, so that rank keeps the history and talks.
    history = History(flags.output / "losses.jsonl", begin) if trainer.has_last else None
    if history is not None:
        print(
            f"{rank.count} ranks on {rank.device.type}, {flags.schedule}, {flags.microbatches} microbatches; "
            f"{len(trainer.corpus.training):,} bytes to learn, unigram entropy {entropy:.3f} nats a byte",
            flush=True,
        )
    tokens = flags.batch * flags.length
    bar = progress_bar(begin * tokens, flags.steps * tokens, shown=trainer.has_last)
    for step in range(begin, flags.steps):
        # The timeline is recorded in the last step, when nothing is new any more.
        trainer.schedule.record_timeline = step == flags.steps - 1
        loss, done = trainer.train_step(step), step + 1
        if history is not None:
            history.add(done, loss=loss)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update(tokens)
        if done == flags.steps:
            timeline = trainer.schedule.timeline().gather()
            if trainer.has_last:
                timeline.save_png(flags.output / "timeline.png")
        if done == flags.steps or done % flags.validate_every == 0:
            validation = trainer.validate()
            if history is not None:
                history.add(done, validation_loss=validation)
        if done == flags.steps or (flags.save_every and done % flags.save_every == 0):
            checkpoints.save(folder, done, trainer.modules, trainer.optimizer)
    bar.close()
    if history is not None:
        history.save_png(flags.output / "loss.png", entropy)
        report(history, entropy, flags.output)
    dist.destroy_process_group()


def resume(trainer: Trainer, folder: Path) -> int:
    """Load the newest checkpoint and return its step."""
    path = checkpoints.newest(folder)
    if path is None:
        raise SystemExit(f"--resume: there is no checkpoint under {folder}.")
    step = checkpoints.load(path, trainer.modules, trainer.optimizer)
    if step >= trainer.flags.steps:
        raise SystemExit(f"--resume: {path} has done {step} steps already; give --steps more than that.")
    return step


def progress_bar(done: int, total: int, *, shown: bool) -> tqdm:
    """Tokens learnt, and how many a second; without a terminal a line every few seconds is enough."""
    seconds = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(initial=done, total=total, unit="tok", unit_scale=True, mininterval=seconds, disable=not shown)


def report(history: History, entropy: float, output: Path) -> None:
    """Say how well it went."""
    loss, validation = history.series("loss")[1][-1], history.series("validation_loss")[1][-1]
    print(
        f"training loss {loss:.3f}, validation loss {validation:.3f} nats a byte ({bits(validation):.2f} bits); "
        f"unigram entropy {entropy:.3f} ({bits(entropy):.2f} bits)\n"
        f"{output}: loss.png, timeline.png, losses.jsonl, checkpoints/",
        flush=True,
    )


def _mean(losses: list[torch.Tensor] | None) -> float:
    return torch.stack(losses).mean().item() if losses else float("nan")


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
