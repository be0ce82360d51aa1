"""The helpers of torch.distributed.pipelining._utils and _debug give here what they give there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from pp_runtime import _debug, _utils
from pp_runtime.errors import PipelineError, StageOutputError
from tests.helpers import ranks

torch_utils = pytest.importorskip("torch.distributed.pipelining._utils")
torch_debug = pytest.importorskip("torch.distributed.pipelining._debug")


def test_arguments_are_flattened_and_detached() -> None:
    x = torch.randn(2, requires_grad=True)
    args = (2 * x, [{"a": torch.ones(1)}, 3])
    assert [id(value) for value in _utils.flatten_args(args)] == [id(value) for value in torch_utils.flatten_args(args)]
    for both in (_utils.flatten_args(args, detach=True), _utils.flatten_args_detach(args)):
        again, flat = both
        assert again[0] is flat[0] and again[1][0]["a"] is flat[1] and again[1][1] == flat[2] == 3
        assert flat[0].is_leaf and flat[0].requires_grad and not flat[1].requires_grad


@pytest.mark.parametrize("style", ["loop", "v"])
@pytest.mark.parametrize(("ranks", "stages"), [(1, 1), (2, 4), (4, 8), (3, 9), (4, 6), (2, 7)])
def test_placements_are_torchs(ranks: int, stages: int, style: str) -> None:
    for name in ("generate_stage_to_rank_mapping", "generate_rank_to_stage_mapping"):
        try:
            expected = getattr(torch_utils, name)(ranks, stages, style)
        except ValueError:
            with pytest.raises(ValueError, match="not even"):
                getattr(_utils, name)(ranks, stages, style)
        else:
            assert getattr(_utils, name)(ranks, stages, style) == expected


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="'w' is not a style"):
        _utils.generate_stage_to_rank_mapping(2, 4, "w")


def test_an_error_about_a_stages_output_is_a_metadata_error() -> None:
    assert issubclass(StageOutputError, (PipelineError, RuntimeError))
    assert issubclass(StageOutputError, _utils.PipeliningMetadataError)


def test_metadata_of_tensors_tells_what_torchs_tells() -> None:
    tensors = [torch.zeros(2, 3), torch.zeros(3, 2).t(), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4)]
    tensors.append(torch.zeros(2, 3, requires_grad=True))
    for one in tensors:
        for other in tensors:
            mine = _utils.extract_tensor_meta(one).get_diff(_utils._TensorMeta.from_tensor(other))
            theirs = torch_utils.extract_tensor_meta(one).get_diff(torch_utils._TensorMeta.from_tensor(other))
            assert mine == theirs
        again = _utils._TensorMeta.from_tensor(one).to_tensor("meta")
        assert _utils.extract_tensor_meta(again) == _utils.extract_tensor_meta(one)
        assert (again.is_meta, again.requires_grad) == (True, one.requires_grad)


def _metadata_of_dtensors(rank: int) -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, named = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    whole = torch.randn(4, 6)
    tensors: list[torch.Tensor] = [
        distribute_tensor(whole, mesh, [Shard(0)]),
        distribute_tensor(whole, mesh, [Replicate()]),
        distribute_tensor(whole, named, [Shard(0)]),
        distribute_tensor(torch.randn(5, 6), named, [Shard(0)]).requires_grad_(),
        torch.randn(2, 6),
    ]
    found: list[Any] = []
    for one in tensors:
        for other in tensors:
            mine = _utils.extract_tensor_meta(one).get_diff(_utils.extract_tensor_meta(other))
            theirs = torch_utils.extract_tensor_meta(one).get_diff(torch_utils.extract_tensor_meta(other))
            found += [] if mine == theirs else [(mine, theirs)]
    for dtensor in tensors[:-1]:
        meta = _utils._DTensorMeta.from_dtensor(dtensor)
        again = meta.to_dtensor("cpu", dtensor.device_mesh)
        found += [] if _utils._DTensorMeta.from_dtensor(again) == meta else [meta]
        found += [] if meta.mesh_cache_key == (meta.mesh_dim_names, dtensor.device_mesh._layout) else ["key"]
    try:
        _utils._TensorMeta.from_tensor(tensors[0])
    except _utils.PipeliningMetadataError:
        return found
    return [*found, "a DTensor was taken for a tensor", dist.get_rank()]


def test_metadata_of_dtensors_tells_what_torchs_tells() -> None:
    assert ranks.run(_metadata_of_dtensors, 2) == [[], []]


def test_a_pipes_info_has_torchs_fields() -> None:
    graph = torch.fx.Graph()
    info = _utils.PipeInfo(graph, num_stages=2, has_loss_and_backward=False)
    theirs = torch_utils.PipeInfo(graph, num_stages=2, has_loss_and_backward=False)
    assert [getattr(info, name) for name in ("graph", "num_stages", "has_loss_and_backward")] == [
        getattr(theirs, name) for name in ("graph", "num_stages", "has_loss_and_backward")
    ]


def test_values_are_described_as_torch_describes_them() -> None:
    value = {"a": [torch.zeros(2, 3, requires_grad=True), 3], "b": (None, "text")}
    assert _debug.map_debug_info(value) == torch_debug.map_debug_info(value)
    assert _debug.friendly_debug_info(torch.zeros(1)) == "Tensor(torch.Size([1]), grad=False, dtype=torch.float32)"
