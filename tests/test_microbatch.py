"""Splitting a batch into microbatches and merging outputs, beside torch's own functions."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._pytree import tree_flatten

from pp_runtime import microbatch
from pp_runtime.errors import PipelineTypeError, PipelineUsageError
from pp_runtime.microbatch import (
    TensorChunkSpec,
    _CustomReducer,
    _Replicate,
    merge_chunks,
    split_args_kwargs_into_chunks,
)


def equal(left: Any, right: Any) -> bool:
    left_flat, left_tree = tree_flatten(left)
    right_flat, right_tree = tree_flatten(right)
    return left_tree == right_tree and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(left_flat, right_flat, strict=True)
    )


@pytest.fixture(scope="module")
def torch_microbatch() -> Any:
    from torch.distributed.pipelining import microbatch

    return microbatch


@pytest.mark.parametrize("rows, chunks", [(8, 4), (8, 3), (7, 7), (2, 4), (1, 1), (5, 1)])
def test_splits_as_torch_does(torch_microbatch: Any, rows: int, chunks: int) -> None:
    x, mask = torch.randn(rows, 3), torch.arange(rows)
    args, kwargs = (x, [mask, {"scale": 2.0}]), {"mask": mask, "name": "a", "none": None}
    assert equal(
        split_args_kwargs_into_chunks(args, kwargs, chunks),
        torch_microbatch.split_args_kwargs_into_chunks(args, kwargs, chunks),
    )


def test_specs_choose_dimension_and_replication(torch_microbatch: Any) -> None:
    x, y = torch.randn(8, 6), torch.randn(3, 8)
    ours = split_args_kwargs_into_chunks(
        (x, y), {"bias": x}, 4, TensorChunkSpec.from_tuple((0, 1)), {"bias": _Replicate()}
    )
    theirs = torch_microbatch.split_args_kwargs_into_chunks(
        (x, y),
        {"bias": x},
        4,
        torch_microbatch.TensorChunkSpec.from_tuple((0, 1)),
        {"bias": torch_microbatch._Replicate()},
    )
    assert equal(ours, theirs)
    assert ours[1][2]["bias"] is x


def test_keyword_specs_match_by_name_not_by_order() -> None:
    long, wide = torch.randn(8, 2), torch.randn(2, 8)
    _, kwargs = split_args_kwargs_into_chunks(
        (), {"long": long, "wide": wide}, 4, None, TensorChunkSpec.from_dict({"wide": 1, "long": 0})
    )
    assert kwargs[0]["long"].shape == (2, 2) and kwargs[0]["wide"].shape == (2, 2)


def test_specs_of_absent_arguments_are_not_missed() -> None:
    specs: Any = (TensorChunkSpec(0),)
    assert split_args_kwargs_into_chunks((), {}, 2, specs, {"mask": TensorChunkSpec(0)}) == ([(), ()], [{}, {}])


def test_scalar_tensor_is_replicated() -> None:
    scale = torch.tensor(2.0)
    args, _ = split_args_kwargs_into_chunks((torch.zeros(4, 1), scale), None, 2)
    assert args[1][1] is scale


def test_pieces_of_a_leaf_keep_their_gradient() -> None:
    x = torch.randn(4, 2, requires_grad=True)
    args, _ = split_args_kwargs_into_chunks((x,), None, 2)
    sum(piece.sum() for (piece,) in args).backward()
    assert torch.equal(args[0][0].grad, torch.ones(2, 2)) and torch.equal(x.grad, torch.ones(4, 2))


@pytest.mark.parametrize("batch", [1, 6])
def test_block_mask_keeps_its_meaning_in_every_microbatch(batch: int) -> None:
    def rows_see_their_own_length(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= q_idx + 16 * b

    mask = create_block_mask(rows_see_their_own_length, batch, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    whole = mask.to_dense()
    args, kwargs = split_args_kwargs_into_chunks((torch.zeros(6, 1),), {"mask": mask}, 4)
    pieces = [chunk["mask"] for chunk in kwargs]
    assert len(args) == 4
    if batch == 1:
        assert all(piece is mask for piece in pieces)
    else:
        assert torch.equal(torch.cat([piece.to_dense() for piece in pieces]), whole)
        row = torch.tensor(0)
        assert bool(pieces[1].mask_mod(row, row, row, torch.tensor(32)))  # row 0 of microbatch 1 is row 2


@pytest.mark.parametrize("chunks", [2, 4])
def test_what_has_one_row_beside_a_larger_batch_goes_whole_to_every_microbatch(chunks: int) -> None:
    x, row, rows = torch.randn(8, 3), torch.randn(1, 3), torch.randn(8, 1)
    args, kwargs = split_args_kwargs_into_chunks((x, [row]), {"position": row, "more": {"rows": rows}}, chunks)
    assert all(pieces[1][0] is row for pieces in args) and all(pieces["position"] is row for pieces in kwargs)
    assert [len(pieces["more"]["rows"]) for pieces in kwargs] == [8 // chunks] * chunks
    plain = x * row * row * rows
    assert torch.equal(
        plain,
        torch.cat([a[0] * a[1][0] * k["position"] * k["more"]["rows"] for a, k in zip(args, kwargs, strict=True)]),
    )


def test_a_spec_that_was_given_is_kept_for_one_row() -> None:
    args, kwargs = split_args_kwargs_into_chunks(
        (torch.randn(8, 3),), {"row": torch.randn(1, 3)}, 4, None, {"row": TensorChunkSpec(0)}
    )
    assert len(args) == len(kwargs) == 1


def test_positional_arguments_say_what_the_batch_is() -> None:
    one, many = torch.randn(1, 3), torch.randn(8, 3)
    assert len(split_args_kwargs_into_chunks((one,), {"mask": many}, 4)[0]) == 1
    assert len(split_args_kwargs_into_chunks((), {"x": many, "mask": one}, 4)[0]) == 4
    assert len(split_args_kwargs_into_chunks((one,), {"mask": one}, 4)[0]) == 1
    assert len(split_args_kwargs_into_chunks((2.0,), {"mask": one, "x": many}, 4)[0]) == 4


def test_names_that_programs_import_do_what_torchs_do(torch_microbatch: Any) -> None:
    x, y = torch.randn(8, 6), torch.randn(3, 5)
    ours = microbatch._shard_dict_of_args(
        {0: x, 1: [y, 2]}, {0: TensorChunkSpec(0), 1: [TensorChunkSpec(1), _Replicate()]}, 4
    )
    specs = {
        0: torch_microbatch.TensorChunkSpec(0),
        1: [torch_microbatch.TensorChunkSpec(1), torch_microbatch._Replicate()],
    }
    assert equal(ours, torch_microbatch._shard_dict_of_args({0: x, 1: [y, 2]}, specs, 4))
    assert equal(microbatch._shard_dict_of_args({}, {}, 2), torch_microbatch._shard_dict_of_args({}, {}, 2))
    pieces = microbatch._split_tensor(x, TensorChunkSpec(1), 4)
    assert equal(list(pieces), list(torch_microbatch._split_tensor(x, torch_microbatch.TensorChunkSpec(1), 4)))
    mask = create_block_mask(lambda b, h, q, k: k <= q, 4, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    for ours, theirs in zip(
        microbatch._split_block_mask(mask, 3), torch_microbatch._split_block_mask(mask, 3), strict=True
    ):
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        # torchtitan's GraphPP reads the row of a microbatch from the function, by name.
        captured = (inspect.getclosurevars(each.mask_mod).nonlocals for each in (ours, theirs))
        assert len({(names["block_mask"] is mask, names["idx"]) for names in captured}) == 1
    assert microbatch.BlockMask is torch_microbatch.BlockMask
    assert microbatch.DEFAULT_CHUNK_DIM == torch_microbatch.DEFAULT_CHUNK_DIM
    assert microbatch.sum_reducer.init_value == 0.0 and microbatch.sum_reducer.reduce_fn(2, 3) == 5
    with pytest.raises(AttributeError, match="no attribute 'Mask'"):
        _ = microbatch.Mask


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: split_args_kwargs_into_chunks((1.0,), {}, 2, (TensorChunkSpec(0),)), "_Replicate"),
        (
            lambda: split_args_kwargs_into_chunks((torch.zeros(4),), {}, 2, (TensorChunkSpec(1),)),
            r"args\[0\].*no dimension 1",
        ),
        (
            lambda: split_args_kwargs_into_chunks((), {"a": [1.0]}, 2, None, {"a": [TensorChunkSpec(0)]}),
            r"kwargs\['a'\]\[0\], a value of type float, .* in kwargs_chunk_spec",
        ),
        (lambda: split_args_kwargs_into_chunks((torch.zeros(4),), {}, 2, (3,)), "TensorChunkSpec or _Replicate"),
        (lambda: split_args_kwargs_into_chunks((torch.zeros(4),), {}, 2, (_Replicate(),) * 2), "args_chunk_spec"),
        (lambda: split_args_kwargs_into_chunks((), {"a": 1}, 2, None, {"b": _Replicate()}), "keyword argument"),
        (lambda: merge_chunks([], None), "at least one"),
        (lambda: merge_chunks([torch.zeros(1)], (TensorChunkSpec(0),) * 2), "output_merge_spec"),
        (lambda: merge_chunks([1, 2], None), "microbatch 1 returned 2"),
        (lambda: merge_chunks([1, 2], TensorChunkSpec(0)), "type int"),
    ],
)
def test_wrong_input_says_what_to_change(call: Any, says: str) -> None:
    with pytest.raises(PipelineUsageError, match=says):
        call()


def test_wrong_kind_is_a_type_error() -> None:
    assert issubclass(PipelineTypeError, TypeError)


def test_merges_as_torch_does(torch_microbatch: Any) -> None:
    chunks = [{"logits": torch.randn(2, 3), "rest": (torch.randn(1, 4),)} for _ in range(3)]
    assert equal(merge_chunks(chunks, None), torch_microbatch.merge_chunks(chunks, None))
    spec = {"logits": TensorChunkSpec(1), "rest": (TensorChunkSpec(0),)}
    assert merge_chunks(chunks, spec)["logits"].shape == (2, 9)


def test_merging_undoes_splitting() -> None:
    x = torch.randn(7, 3)
    args, _ = split_args_kwargs_into_chunks((x,), None, 3)
    assert torch.equal(merge_chunks([piece for (piece,) in args], None), x)


def test_merge_folds_stacks_and_keeps_what_is_equal() -> None:
    chunks = [(torch.tensor(float(i)), torch.tensor(i), "same") for i in range(3)]
    spec = (_CustomReducer(torch.tensor(0.0), lambda a, b: a + b), TensorChunkSpec(0), None)
    total, each, name = merge_chunks(chunks, spec)
    assert total == 3.0 and each.tolist() == [0, 1, 2] and name == "same"


def test_public_signatures_are_torchs(torch_microbatch: Any) -> None:
    for name in ("split_args_kwargs_into_chunks", "merge_chunks"):
        ours = inspect.signature(globals()[name]).parameters
        theirs = inspect.signature(getattr(torch_microbatch, name)).parameters
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ]
