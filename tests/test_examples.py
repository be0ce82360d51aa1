"""The examples run as their users run them: under torchrun, in seconds, with results that can be checked."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lm.history import History
from lm.model import LanguageModel, ModelConfig, token_loss
from lm.optimisation import learning_rate
from lm.text import Corpus
from pp_runtime import layer_modules

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--width 32 --length 32 --batch 12 --layers 4 --data-limit 300000 --validation-batches 1 --warmup 2".split()
CONFIG = ModelConfig(vocabulary=256, length=32, width=32, layers=4, heads=4)


def torchrun(ranks: int, script: str | Path, *flags: object) -> str:
    """What the ranks of an example print."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return run_python(*launcher, ROOT / "examples" / script, *flags)


def run_python(*arguments: object, seconds: float = 100) -> str:
    """What a program prints; an error with all of it if it fails or takes too long."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # so that the ranks can be ended with their parent
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        pytest.fail(f"{arguments} took more than {seconds} s:\n{printed}")
    assert process.returncode == 0, printed
    return printed


def losses_in(folder: Path, name: str = "loss") -> list[float]:
    records = map(json.loads, (folder / "losses.jsonl").read_text().splitlines())
    return [record[name] for record in records if name in record]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(2, "--split manual"), (2, "--split tracer --schedule 1F1B"), (3, "--split manual --schedule 1F1B --batch 7")],
)
def test_tutorial_equals_the_unsplit_model(ranks: int, flags: str) -> None:
    printed = torchrun(ranks, "tutorial.py", "--check", "--dim", 16, "--vocab", 64, "--seq", 8, *flags.split())
    assert printed.count("gradients equal those of the unsplit model") == ranks
    assert "losses: " in printed


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps on two ranks that also kept its state after the fourth."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    flags = ["--steps", 8, "--save-every", 4, "--microbatches", 3, "--output", folder]
    printed = torchrun(2, "train_lm.py", *SMALL, *flags)
    assert "unigram entropy" in printed
    return folder


def test_training_lowers_the_loss_and_draws_its_pictures(uninterrupted: Path) -> None:
    losses = losses_in(uninterrupted)
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.3
    assert is_png(uninterrupted / "loss.png")
    assert is_png(uninterrupted / "timeline.png")


def test_training_equals_the_unsplit_model(uninterrupted: Path) -> None:
    corpus = Corpus.read(None, 300_000)
    model = LanguageModel(CONFIG)
    model.initialise(seed=0, layers=CONFIG.layers)
    x, y = corpus.batch(0, 12, 32)
    assert losses_in(uninterrupted)[0] == pytest.approx(token_loss(model(x), y).item(), abs=1e-5)


def test_checkpoint_is_the_unsplit_models(uninterrupted: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(uninterrupted / "checkpoints" / "step-00000008", tmp_path / "whole.pt")
    model = LanguageModel(CONFIG)
    model.load_state_dict(torch.load(tmp_path / "whole.pt")["model"])
    x, y = Corpus.read(None, 300_000).validation_batch(0, 12, 32)
    expected = losses_in(uninterrupted, "validation_loss")[-1]
    assert token_loss(model(x), y).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("ranks", "flags"), [(3, "--schedule GPipe"), (2, "--schedule Interleaved1F1B")])
def test_resuming_on_other_ranks_or_another_schedule_changes_nothing(
    uninterrupted: Path, tmp_path: Path, ranks: int, flags: str
) -> None:
    kept = Path("checkpoints") / "step-00000004"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / kept).symlink_to(uninterrupted / kept)
    (tmp_path / "losses.jsonl").write_text((uninterrupted / "losses.jsonl").read_text())
    torchrun(ranks, "train_lm.py", *SMALL, "--steps", 8, "--output", tmp_path, "--resume", *flags.split())
    assert losses_in(tmp_path) == pytest.approx(losses_in(uninterrupted), abs=1e-4)


def test_training_on_ones_own_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 200)
    flags = ["--data", text, "--steps", 3, "--schedule", "ZBVZeroBubble", "--output", tmp_path]
    torchrun(2, "train_lm.py", *SMALL, *flags)
    assert all(map(math.isfinite, losses_in(tmp_path)))


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_fine_tuning_changes_what_learns_as_the_unsplit_model_does(schedule: str) -> None:
    pytest.importorskip("transformers")
    printed = torchrun(2, "finetune_hf.py", "--check", "--steps", 4, "--schedule", schedule)
    assert printed.count("equals the unsplit model's training, and the base is as it was") == 2
    losses = [float(loss) for loss in re.search(r"losses: (.*)", printed)[1].split()]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_pipelines_of_sharded_stages_train_as_the_unsplit_model_does(schedule: str) -> None:
    printed = torchrun(4, "fsdp.py", "--check", "--steps", 3, "--schedule", schedule)
    assert printed.count("equals the unsplit model's training") == 4
    assert {"losses of replica 0", "losses of replica 1"} <= set(re.findall(r"losses of replica \d", printed))


def test_the_benchmark_measures_both_libraries(tmp_path: Path) -> None:
    flags = ["--rounds", 2, "--sizes", "linear", "--schedules", "1F1B", "ZB1P", "--microbatches", 4]
    run_python(ROOT / "benchmarks" / "step_time.py", *flags, "--csv", tmp_path / "a.csv", "--png", tmp_path / "a.png")
    with (tmp_path / "a.csv").open(newline="") as file:
        one_f_one_b, zb1p = csv.DictReader(file)
    assert float(one_f_one_b["torch_over_ours"]) == pytest.approx(
        float(one_f_one_b["torch_ms"]) / float(one_f_one_b["ours_ms"])
    )
    assert float(zb1p["ours_ms"]) > 0 and zb1p["torch_ms"] == ""  # torch has no ZB1P
    assert is_png(tmp_path / "a.png")


def test_the_checks_of_a_step_cost_next_to_nothing() -> None:
    shares = re.findall(r"checks +[\d.]+ us: ([\d.]+)%", run_python(ROOT / "benchmarks" / "checks.py"))
    assert len(shares) == 4 and max(map(float, shares)) < 2, shares


def test_stages_together_are_the_model() -> None:
    whole = LanguageModel(CONFIG)
    whole.initialise(seed=0, layers=CONFIG.layers)
    tokens = torch.arange(64).view(2, 32)
    parts = [module for module, _ in layer_modules(whole, [1, 3], [0, 1], (tokens[:1],)).values()]
    states = [part.state_dict() for part in parts]
    assert not states[0].keys() & states[1].keys()
    assert states[0].keys() | states[1].keys() == whole.state_dict().keys()
    torch.testing.assert_close(parts[1](parts[0](tokens)), whole(tokens), rtol=0, atol=0)


def test_a_model_is_the_same_whatever_was_drawn_before() -> None:
    models = [LanguageModel(CONFIG) for _ in range(2)]
    for model in models:
        torch.rand(1)
        model.initialise(seed=0, layers=CONFIG.layers)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


def test_a_batch_depends_on_its_step_alone() -> None:
    corpus = Corpus(torch.arange(5000).to(torch.uint8), torch.arange(500).to(torch.uint8))
    x, y = corpus.batch(3, 4, 16)
    again, _ = corpus.batch(3, 4, 16)
    other, _ = corpus.batch(4, 4, 16)
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert torch.equal(y[:, :-1], x[:, 1:])


def test_unigram_entropy_of_equally_frequent_bytes() -> None:
    assert Corpus(torch.arange(16).repeat(9), torch.zeros(2)).unigram_entropy() == pytest.approx(math.log(16))


def test_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_history_drops_what_came_after_the_resumed_step(tmp_path: Path) -> None:
    first = History(tmp_path / "losses.jsonl", resumed_at=0)
    for step in (1, 2, 3):
        first.add(step, loss=float(step))
    second = History(tmp_path / "losses.jsonl", resumed_at=2)
    second.add(3, loss=30.0)
    assert second.series("loss") == ([1, 2, 3], [1.0, 2.0, 30.0])
    assert losses_in(tmp_path) == [1.0, 2.0, 30.0]


@pytest.mark.parametrize("flags", ["", "--tied", "--rows 7 --microbatches 3", "--family Gemma2"])
def test_a_whole_model_trains_as_the_unsplit_one(flags: str) -> None:
    pytest.importorskip("transformers")
    printed = torchrun(2, ROOT / "benchmarks" / "from_whole_model" / "ours.py", *flags.split())
    parts = re.findall(r"(\d+) of (\d+) parameters: off by (\S+) at most, having moved ([\w.-]+)", printed)
    assert len(parts) == 2 and sum(int(held) for held, *_ in parts) >= int(parts[0][1])
    assert all(float(off) < 1e-6 < 1e-3 < float(moved) for *_, off, moved in parts)
    assert float(re.search(r"losses \[.*\]: off by (\S+)", printed)[1]) < 1e-6


def test_the_lines_that_other_libraries_take_are_those_of_the_documentation() -> None:
    page = (ROOT / "docs" / "partition.md").read_text(encoding="utf-8")
    counted = run_python(ROOT / "benchmarks" / "from_whole_model" / "lines.py").split()
    said = re.findall(r"^\|[^|]*\| `(\w+\.py)` \| (\d+) \|", page, re.M)
    assert dict(said) == dict(zip(counted[::2], counted[1::2], strict=True)) and len(said) > 1
