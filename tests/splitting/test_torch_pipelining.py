"""This package under torch's name: a program that imports torch.distributed.pipelining runs on it unchanged."""

from __future__ import annotations

import subprocess
import sys

import pytest

BEFORE = {
    "the package": """
import sys, pp_runtime
sys.modules["torch.distributed.pipelining"] = pp_runtime
""",
    "its modules too": """
import sys, pp_runtime, pp_runtime._IR, pp_runtime.microbatch, pp_runtime.schedules, pp_runtime.stage
sys.modules["torch.distributed.pipelining"] = pp_runtime
for name in ("_IR", "microbatch", "schedules", "stage"):
    sys.modules[f"torch.distributed.pipelining.{name}"] = getattr(pp_runtime, name)
""",
    "after torch's own was imported": """
import sys, torch.distributed.pipelining, pp_runtime
torch.distributed.pipelining = sys.modules["torch.distributed.pipelining"] = pp_runtime
""",
}

PROGRAM = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import Pipe, ScheduleInterleaved1F1B, SplitPoint, pipeline

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x):
        return self.layers(x)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
model, x, y = Model(), torch.randn(4, 4), torch.randn(4, 4)
for rows, targets in zip(x.chunk(2), y.chunk(2)):
    (nn.functional.mse_loss(model(rows), targets)).backward()
expected = {name: parameter.grad / 2 for name, parameter in model.named_parameters()}
model.zero_grad()
pipe = pipeline(model, (x[:2],), split_spec={"layers.2": SplitPoint.BEGINNING})
stages = [pipe.build_stage(index, torch.device("cpu")) for index in range(2)]
schedule = ScheduleInterleaved1F1B(stages, 2, loss_fn=nn.functional.mse_loss)
output = schedule.step(x, target=y)
assert torch.equal(output, torch.cat([model(rows) for rows in x.chunk(2)]))
for stage in stages:
    for name, parameter in stage.submod.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
assert isinstance(pipe, Pipe) and type(schedule).__module__.startswith("pp_runtime.")
import torch.distributed.pipelining as again
assert again is pp_runtime and sys.modules["torch.distributed.pipelining"] is pp_runtime
print("trained")
dist.destroy_process_group()
"""


MODULES = """
import sys, pp_runtime
sys.modules["torch.distributed.pipelining"] = pp_runtime
import torch.distributed.pipelining.schedules as schedules
from torch.distributed.pipelining.stage import PipelineStage
from torch.distributed.pipelining.microbatch import TensorChunkSpec
from torch.distributed.pipelining._backward import stage_backward
import pp_runtime._backward, pp_runtime.microbatch, pp_runtime.stage
assert schedules is pp_runtime.schedules and schedules.__spec__.name == "pp_runtime.schedules"
assert PipelineStage is pp_runtime.PipelineStage and TensorChunkSpec is pp_runtime.microbatch.TensorChunkSpec
assert stage_backward is pp_runtime._backward.stage_backward
try:
    import torch.distributed.pipelining.nothing
except ModuleNotFoundError as error:
    print(error)
"""


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("swap", BEFORE)
def test_a_program_that_imports_torchs_package_trains_on_ours(swap: str) -> None:
    assert _run(BEFORE[swap] + PROGRAM).split()[-1:] == ["trained"]


@pytest.mark.parametrize("swap", ["", BEFORE["its modules too"]])
def test_private_modules_have_torchs_names_and_ours(swap: str) -> None:
    code = """
from pp_runtime import _IR, _unflatten
from pp_runtime.splitting import tracing
assert _IR.pipeline is tracing.pipeline and _IR.Pipe is tracing.Pipe
assert _IR.annotate_split_points is tracing.annotate_split_points and _IR.pipe_split is tracing.pipe_split
assert _IR.SplitPoint is tracing.SplitPoint and issubclass(_IR.LossWrapper, __import__("torch").nn.Module)
print(_IR.PipeSequential.__module__, _unflatten._outline_submodules.__module__, hasattr(_IR, "no_such_name"))
"""
    expected = "torch.distributed.pipelining._IR torch.distributed.pipelining._unflatten False"
    assert _run(swap + code).strip() == expected


def test_torchs_names_of_modules_are_our_modules_once_the_package_is_ours() -> None:
    assert "nothing" in _run(MODULES)


def test_nothing_is_taken_from_torch_unless_the_program_swaps_the_package() -> None:
    code = "import pp_runtime, torch.distributed.pipelining.stage as s; print(s.__file__)"
    assert "torch/distributed/pipelining" in _run(code)
