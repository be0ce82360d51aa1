"""From a whole model to a pipeline in one call: the unsplit model's training, names and checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from pp_runtime import BuiltPipeline, build_pipeline, without_weights
from pp_runtime.errors import PipelineUsageError
from tests.helpers import api, ranks
from tests.helpers.checkpoints import write
from tests.helpers.layered_huggingface import LAYERS, MODELS, inputs_of

pytestmark = api.ours_only("builds nothing in one call")
WARM = "transformers.models.llama.modeling_llama transformers.models.gpt2.modeling_gpt2 torch.distributed.checkpoint"


def loss_of(output: Any, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), target.flatten())


def build(name: str, schedule: str, seed: int = 0, **options: Any) -> tuple[BuiltPipeline, nn.Module]:
    """The pipeline, and the plain model that it began as."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    plain = copy.deepcopy(model)
    built = build_pipeline(model, schedule, microbatches=4, loss_fn=loss_of, example=(inputs_of(name, 1),), **options)
    return built, plain


def _train(rank: int, name: str, schedule: str, options: dict[str, Any]) -> list[str]:
    built, plain = build(name, schedule, **options)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (plain, built)]  # type: ignore[attr-defined]
    found = []
    for number in range(2):
        tokens = inputs_of(name, 8 * (1 + number))[:8]
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected = []
        for part in tokens.chunk(4):
            expected.append(loss_of(plain(part), part))
            (expected[-1] / 4).backward()
        losses: list[Tensor] = []
        output = built.step(tokens, target=tokens, losses=losses)
        wanted = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        got = built.clip_grad_norm_(0.5)
        if not torch.allclose(got, wanted):
            found.append(f"norm {got} for {wanted}")
        if built.holds_last and not torch.allclose(torch.stack(losses), torch.stack(expected)):
            found.append(f"losses {losses} for {expected}")
        if (output is not None) != built.holds_last:
            found.append("outputs elsewhere than on the last stage")
        for optimizer in optimizers:
            optimizer.step()
    if ("bubble" in built.report()) == (schedule == "Auto"):
        found.append(built.report())
    whole = plain.state_dict()
    found += [key for key, value in built.state_dict().items() if not torch.allclose(value, whole[key], atol=1e-6)]
    with torch.no_grad():
        output = built.eval(inputs_of(name, 4))
        if built.holds_last and not torch.allclose(output.logits, plain(inputs_of(name, 4)).logits, atol=1e-5):
            found.append("evaluation")
    return found


@pytest.mark.parametrize(
    ("name", "schedule", "options"),
    [
        ("Llama", "ZBVZeroBubble", {}),
        ("GPT-2", "1F1B", {"partition": "time"}),
        ("Llama, tied", "interleaved1f1b", {"partition": [1, 2, 1, 1]}),
        ("Llama", "Auto", {"num_stages": 4}),
        ("Llama", "DualPipeV", {"compile": {"options": {"compiler": "aot_eager"}}}),
    ],
    ids=str,
)
def test_training_equals_the_unsplit_model(name: str, schedule: str, options: dict[str, Any]) -> None:
    results = ranks.run(_train, 2, timeout=100, name=name, schedule=schedule, options=options)
    assert results == [[], []], results


def _cut_without_values(rank: int) -> list[Any]:
    weights = MODELS["Llama"]().state_dict()
    found: list[Any] = []
    for by in ("parameters", "flops", "memory", "time"):
        with without_weights():
            model = MODELS["Llama"]().eval()
        options: dict[str, Any] = {"microbatches": 4, "example": (inputs_of("Llama", 1),), "weights": weights}
        try:
            built = build_pipeline(model, partition=by, **options)
        except PipelineUsageError as error:
            found.append(str(error))
        else:
            found.append(tuple(built.partition))
    return found


def test_a_model_without_values_is_cut_by_what_it_costs() -> None:
    for *cuts, refusal in ranks.run(_cut_without_values, 2, timeout=60):
        assert cuts == [(3, 2)] * 3  # the head weighs on the last stage
        assert "no time to measure" in refusal


def weighted_loss(output: Any, target: Tensor, weight: float = 1.0) -> Tensor:
    return weight * loss_of(output, target)


def _options(rank: int) -> list[bool]:
    torch.manual_seed(0)
    tokens = inputs_of("Llama", 8)
    built = build_pipeline(MODELS["Llama"]().eval(), microbatches=4, loss_fn=weighted_loss, example=(tokens[:1],))
    plain: list[Tensor] = []
    weighted: list[Tensor] = []
    cut: list[Tensor] = []
    outputs = [
        built.step(tokens, target=tokens, losses=plain),
        built.step(tokens, target=tokens, losses=weighted, loss_kwargs={"weight": 2.0}, return_outputs=False),
    ]
    parts = list(tokens.chunk(4))
    built.step(arg_mbs=[(part,) for part in parts], target_mbs=parts, losses=cut)
    if not built.holds_last:
        return [outputs == [None, None] and not (plain or weighted or cut)]
    same, doubled = torch.stack(cut), torch.stack(weighted)
    return [outputs[0] is not None, outputs[1] is None, *(torch.stack(plain) == same), *(doubled == 2 * same)]


def test_the_options_of_a_step_reach_the_ranks_that_they_are_for() -> None:
    first, last = ranks.run(_options, 2, timeout=60)
    assert first == [True]
    assert all(last), last


def _write(rank: int, folder: str) -> None:
    built, _ = build("Llama, tied", "ZBVZeroBubble")
    tokens = inputs_of("Llama", 8)
    built.step(tokens, target=tokens)
    for parameter in built.parameters():
        parameter.data.sub_(parameter.grad)  # type: ignore[arg-type]
    dcp.save({"model": built}, checkpoint_id=f"{folder}/checkpoint")
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, built.state_dict())
    if rank == 0:
        torch.save({key: value for part in parts for key, value in part.items()}, f"{folder}/whole.pt")


def _read(rank: int, folder: str, schedule: str) -> list[str]:
    """By torch.distributed.checkpoint and from the whole state; what is not the same, bit for bit."""
    whole = torch.load(f"{folder}/whole.pt")
    found = []
    for how in ("checkpoint", "whole"):
        built, _ = build("Llama, tied", schedule, seed=1)
        if how == "whole":
            built.load_state_dict(whole)
        else:
            dcp.load({"model": built}, checkpoint_id=f"{folder}/checkpoint")
        found += [f"{how}: {key}" for key, value in built.state_dict().items() if not torch.equal(value, whole[key])]
    return found


@pytest.mark.parametrize(("schedule", "count"), [("1F1B", 2), ("GPipe", 3), ("Interleaved1F1B", 2)])
def test_a_checkpoint_of_one_layout_is_read_by_others_bit_for_bit(tmp_path: Path, schedule: str, count: int) -> None:
    ranks.run(_write, 2, timeout=60, folder=str(tmp_path))
    assert ranks.run(_read, count, timeout=60, folder=str(tmp_path), schedule=schedule) == [[]] * count


def _errors(rank: int) -> list[str]:
    said = []

    def refused(**options: Any) -> None:
        with pytest.raises(PipelineUsageError) as error:
            build("Llama", options.pop("schedule", "1F1B"), **options)
        said.append(str(error.value))

    refused(schedule="Interleaved1F1B", num_stages=6)
    refused(partition="weight")
    refused(partition=[1, 1])
    refused(group=dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "pipe")))
    built, plain = build("Llama", "1F1B", group=dist.init_device_mesh("cpu", (2,)))
    state = plain.state_dict()
    del state["model.layers.1.mlp.up_proj.weight" if rank == 0 else "lm_head.weight"]
    with pytest.raises(PipelineUsageError) as error:
        built.load_state_dict(state)
    return [*said, str(error.value), built.report()]


def test_what_cannot_be_built_is_said_and_what_was_is_reported() -> None:
    first, second = ranks.run(_errors, 2, timeout=60)
    words = [
        f"{LAYERS} layers do not make 6 parts",
        "partition is 'layers', 'time', 'parameters', 'flops', 'memory' or sizes, not 'weight'",
        "2 stages 2 layers, and there are 2 stages and 5 layers",
        "the mesh has the axes data, pipe, and none is 'pp'",
    ]
    for said in (first, second):
        assert all(word in line for word, line in zip(words, said, strict=False)), said
    assert "lacks 1 names of stages [0], model.layers.1.mlp.up_proj.weight the first" in first[4]
    assert "lacks 1 names of stages [1], lm_head.weight the first" in second[4]
    assert first[5].splitlines() == [
        "1F1B, 2 ranks, 2 stages, 4 microbatches",
        "  stage 0: layers 0 to 1, load 2, on this rank",
        "  stage 1: layers 2 to 4, load 3",
        "balance 0.833, bubble 0.286 if F, I and W take as long",  # of 42: 2 to begin with, 4 x 9, 4 at the end
    ]


def _without_values(rank: int, name: str, schedule: str, folder: str, form: str) -> list[str]:
    """A step of a pipeline whose weights were read, beside one of the same model in memory; what differs."""
    built, whole = build(name, schedule)
    weights = Path(folder) / f"{rank}"
    weights.mkdir()
    with without_weights():
        model = MODELS[name]().eval()
    read = build_pipeline(
        model,
        schedule,
        microbatches=4,
        loss_fn=loss_of,
        example=(inputs_of(name, 1),),
        weights=write(form, whole.state_dict(), weights),
    )
    tokens = inputs_of(name, 8)
    for each in (built, read):
        each.step(tokens, target=tokens)
    pairs = zip(read.named_parameters(), built.named_parameters(), strict=True)
    found = [key for (key, one), (_, other) in pairs if not (one.equal(other) and torch.equal(one.grad, other.grad))]
    held = set(read.parameters())
    return found + [key for key, each in model.named_parameters() if (each in held) == each.is_meta]


TIED = "Llama, tied"


@pytest.mark.parametrize(
    ("name", "schedule", "form"),
    [
        ("Llama", "1F1B", "distributed"),
        (TIED, "1F1B", "torch file"),
        (TIED, "ZBVZeroBubble", "mapping"),
        ("GPT-2", "Interleaved1F1B", "torch file"),
        ("Qwen2", "1F1B", "safetensors index"),
    ],
)
def test_a_model_that_is_never_whole_trains_as_the_whole_one(
    tmp_path: Path, name: str, schedule: str, form: str
) -> None:
    run = {"name": name, "schedule": schedule, "form": form, "folder": str(tmp_path)}
    assert ranks.run(_without_values, 2, timeout=100, **run) == [[], []]


def _sharded_ties(rank: int) -> list[str]:
    """One rank that holds first and last stage, each sharded; what differs from the plain model after two steps."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("pp", "dp"))
    built, plain = build(TIED, "ZBVZeroBubble", group=mesh, parallelize=lambda m: fully_shard(m, mesh=mesh["dp"]))
    tokens = inputs_of(TIED, 8)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (plain, built)]  # type: ignore[attr-defined]
    for _ in range(2):
        for part in tokens.chunk(4):
            (loss_of(plain(part), part) / 4).backward()
        built.step(tokens, target=tokens)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    whole = dict(plain.named_parameters(remove_duplicate=False))
    return [
        key for key, each in built.named_parameters() if not torch.allclose(each.full_tensor(), whole[key], atol=1e-5)
    ]


def test_what_two_stages_of_a_rank_share_stays_tied_when_they_are_sharded() -> None:
    assert ranks.run(_sharded_ties, 1, timeout=60) == [[]]


LAYOUTS = [("ZBVZeroBubble", 2), ("1F1B", 2), ("GPipe", 1), ("Interleaved1F1B", 2)]
STEPS = 2  # of each layout, one after the other


def optimizer_of(named: Any, kind: str) -> torch.optim.Optimizer:
    """Of two groups, as decay is left out for what has one dimension."""
    many, one = [], []
    for _, each in named:
        (many if each.dim() > 1 else one).append(each)
    groups = [{"params": many, "weight_decay": 0.1}, {"params": one, "weight_decay": 0.0}]
    if kind == "AdamW":
        return torch.optim.AdamW(groups, 1e-2)
    return torch.optim.SGD(groups, 0.1, momentum=0.9, dampening=0.5)


def _go_on(rank: int, name: str, kind: str, number: int, folder: str, sharded: bool = False) -> dict[str, Tensor]:
    """Read what the layout before wrote, make some steps, write; this rank's parameters then."""
    schedule, count = LAYOUTS[number]
    options: dict[str, Any] = {}
    if sharded:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (count, 2 // count), mesh_dim_names=("pp", "dp"))
        options = {"group": mesh, "parallelize": lambda module: fully_shard(module, mesh=mesh["dp"])}
    built, _ = build(name, schedule, seed=number, **options)
    optimizer = optimizer_of(built.named_parameters(), kind)
    if number:
        for group in optimizer.param_groups:
            group["lr"] = 7.0  # what was written counts
    state = {"model": built, "optimizer": built.stateful(optimizer)}
    if number:
        dcp.load(state, checkpoint_id=f"{folder}/{number - 1}")
    for step in range(STEPS):
        tokens = inputs_of(name, 100 + number * STEPS + step)[:8]
        built.step(tokens, target=tokens)
        optimizer.step()
        optimizer.zero_grad()
    dcp.save(state, checkpoint_id=f"{folder}/{number}")
    values = {key: value.detach() for key, value in built.named_parameters()}
    return {key: value.full_tensor() if sharded else value for key, value in values.items()}  # type: ignore[operator]


def uninterrupted(name: str, kind: str) -> nn.Module:
    """The plain model after the steps of all layouts."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    optimizer = optimizer_of(model.named_parameters(), kind)
    for step in range(len(LAYOUTS) * STEPS):
        tokens = inputs_of(name, 100 + step)[:8]
        for part in tokens.chunk(4):
            loss_of(model(part), part).backward()
        for parameter in model.parameters():
            parameter.grad.div_(4)  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    ("name", "kind", "tolerance"),
    [
        ("Llama", "AdamW", 0.0),
        ("Llama", "SGD", 0.0),
        (TIED, "AdamW", 1e-6),
    ],  # the tied one's gradients add up otherwise
)
def test_training_goes_on_in_other_layouts_as_if_it_had_not_been_stopped(
    tmp_path: Path, name: str, kind: str, tolerance: float
) -> None:
    for number, (_, count) in enumerate(LAYOUTS):
        found = ranks.run(_go_on, count, timeout=60, name=name, kind=kind, number=number, folder=str(tmp_path))
    torch.set_num_threads(1)
    whole = dict(uninterrupted(name, kind).named_parameters(remove_duplicate=False))
    for key, value in {key: value for part in found for key, value in part.items()}.items():
        torch.testing.assert_close(value, whole[key].detach(), rtol=0, atol=tolerance, msg=key)


def test_sharded_states_are_laid_anew(tmp_path: Path) -> None:
    """From two stages on two ranks to one stage that two ranks shard, and back."""
    run = {"name": TIED, "kind": "AdamW", "folder": str(tmp_path), "sharded": True}
    for number in range(len(LAYOUTS)):
        found = ranks.run(_go_on, 2, timeout=60, number=number, **run)
    whole = dict(uninterrupted(TIED, "AdamW").named_parameters(remove_duplicate=False))
    for key, value in {key: value for part in found for key, value in part.items()}.items():
        torch.testing.assert_close(value, whole[key].detach(), rtol=0, atol=1e-5, msg=key)


def _wrapped(rank: int, kind: str) -> list[str]:
    """Names of a wrapped pipeline that the unsplit model lacks, and values that are not loaded."""
    mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "dp"))

    def wrap(module: nn.Module) -> nn.Module:
        if kind == "compiled":
            return torch.compile(module, backend="eager")  # type: ignore[return-value]
        return nn.parallel.DistributedDataParallel(module, process_group=mesh["dp"].get_group())

    built, plain = build("Llama", "1F1B", group=mesh, parallelize=wrap)
    whole = {name: torch.full_like(value, rank) for name, value in plain.state_dict().items()}
    built.load_state_dict(whole)
    optimizer = torch.optim.SGD(built.parameters(), 0.1, momentum=0.5)
    names = [name.removeprefix("has_state.") for name in built.optim_state_dict(optimizer) if "has_state" in name]
    found = [name for name in [*names, *dict(built.named_parameters())] if name not in whole]
    return found + [name for name, value in built.state_dict().items() if not torch.equal(value, whole[name])]


@pytest.mark.parametrize("kind", ["compiled", "replicated"])
def test_wrapped_modules_keep_the_unsplit_models_names(kind: str) -> None:
    assert ranks.run(_wrapped, 2, timeout=60, kind=kind) == [[], []]


def _other_optimizers(rank: int, folder: str) -> list[str]:
    built, plain = build("Llama", "1F1B")
    optimizer = torch.optim.SGD(built.parameters(), 0.1)
    said = []
    for call in (
        lambda: built.optim_state_dict(torch.optim.SGD(plain.parameters(), 0.1)),
        lambda: built.stateful(torch.optim.SGD(plain.parameters(), 0.1)).state_dict(),
        lambda: built.load_optim_state_dict(optimizer, {}),
    ):
        with pytest.raises(PipelineUsageError) as error:
            call()
        said.append(str(error.value))
    dcp.save({"optimizer": built.stateful(torch.optim.AdamW(built.parameters()))}, checkpoint_id=folder)
    for other in (torch.optim.Adam(built.parameters()), torch.optim.SGD(built.parameters(), momentum=0.5)):
        try:
            dcp.load({"optimizer": built.stateful(other)}, checkpoint_id=folder)
        except (PipelineUsageError, dcp.CheckpointException) as error:
            said.append(str(error))
    return said


def test_optimizers_and_states_of_something_else_are_refused(tmp_path: Path) -> None:
    for said in ranks.run(_other_optimizers, 2, timeout=60, folder=str(tmp_path)):
        assert "is none of this pipeline's: make the optimizer of pipeline.parameters()" in said[0] == said[1]
        assert "the state lacks model." in said[2]
        assert "is that of torch.optim.adamw.AdamW, and the optimizer is torch.optim.adam.Adam" in said[3]
        assert "Missing key in checkpoint state_dict: optimizer." in said[4]  # DCP's own, which both ranks raise
