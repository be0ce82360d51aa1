"""A record of a run: what every rank noted, in one file that is a trace, too; and the page that is made of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pp_runtime import RunRecord, build_pipeline
from pp_runtime.__main__ import main
from pp_runtime.errors import PipelineModeError, PipelineUsageError
from pp_runtime.pictures import read_trace
from pp_runtime.timing import Timeline
from tests.helpers import api, ranks

pytestmark = api.ours_only("records no run")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def built(schedule: str = "1F1B") -> Any:
    torch.manual_seed(0)
    return build_pipeline(
        Model(), schedule, microbatches=4, loss_fn=nn.functional.mse_loss, example=(torch.randn(1, 8),)
    )


def _record(rank: int, path: str) -> dict[str, Any]:
    pipeline = built("Interleaved1F1B")
    run = RunRecord(pipeline, title="a run")
    x = torch.randn(8, 8)
    for number in range(1, 4):
        pipeline.schedule.record_timeline = number == 2
        losses: list[torch.Tensor] = []
        pipeline.step(x, target=x, losses=losses)
        noted = {"loss": torch.stack(losses).mean() if number < 3 else math.nan} if pipeline.holds_last else {}
        metrics = run.add(10 * number, tokens=64, **noted)
    pipeline.eval(x, target=x)
    run.add(30, validation=rank + 1.0)
    run.save(path)
    run.save(path)  # again, with the same
    return metrics.as_dict()


def test_everything_is_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "run.json"
    last = ranks.run(_record, path=str(path))
    run = read_trace(path)[1]
    assert run is not None
    assert (run["version"], run["title"], run["timeline_step"]) == (1, "a run", 20)
    assert run["facts"] | {"torch": 0, "saved": 0, "pp_runtime": 0} == {
        "schedule": "Interleaved1F1B", "ranks": 2, "stages": 4, "microbatches": 4, "devices": "cpu", "hosts": 1,
        "torch": 0, "saved": 0, "pp_runtime": 0,
    }  # fmt: skip
    columns = run["columns"]
    assert columns["step"] == [10, 20, 30, 30] and columns["training"] == [True, True, False, True]
    assert columns["loss"][0] > 0 and columns["loss"][2:] == [None, None]  # NaN, and an evaluation that had none
    assert columns["validation"] == [None, None, 1.0, None]  # of the first rank that knew
    assert columns["step_s"][3] == max(metrics["step_s"] for metrics in last)
    assert columns["sent_bytes"][3] == sum(metrics["sent_bytes"] for metrics in last)
    assert columns["tokens_per_s"][3] == pytest.approx(sum(metrics["tokens_per_s"] for metrics in last) / 2)
    assert [row["rank"] for row in run["ranks"]] == [0, 1] and all(row["compute_s"] > 0 for row in run["ranks"])
    assert [row[0] for row in run["memory"]["rows"]] == ["0", "1"]
    timeline = Timeline.from_chrome(path)
    assert timeline.ranks == (0, 1) and timeline.num_stages == 4
    assert json.loads(path.read_text())["traceEvents"]  # which ui.perfetto.dev opens

    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path.with_suffix(".html"))
    page = path.with_suffix(".html").read_text()
    assert "Step 20, planned and measured" in page and "validation" in page and "activation slots" in page


def _without_timeline(rank: int, path: str) -> None:
    pipeline = built()
    run = RunRecord(pipeline.schedule)
    pipeline.schedule.record_timeline = rank == 0  # not on all ranks: there is no timeline of the step
    pipeline.step(torch.randn(4, 8), target=torch.randn(4, 8))
    run.add()
    run.save(path)


def test_a_timeline_that_not_all_ranks_have_is_left_out(tmp_path: Path) -> None:
    path, page = tmp_path / "run.json", tmp_path / "page.html"
    ranks.run(_without_timeline, path=str(path))
    run = read_trace(path)[1]
    assert run is not None and run["timeline_step"] is None and run["title"] == "1F1B on 2 ranks"
    assert run["columns"]["step"] == [0]
    assert main(["report", str(path), str(page)]) == 0
    assert "schedule.record_timeline = True" in page.read_text()


def _refusals(rank: int, folder: str) -> list[str]:
    pipeline = built()
    run = RunRecord(pipeline)
    said = []

    def refused(call: Any, *arguments: Any, kind: type[Exception] = PipelineUsageError) -> None:
        with pytest.raises(kind) as found:
            call(*arguments)
        said.append(str(found.value))

    refused(run.add, kind=PipelineModeError)
    refused(run.save, f"{folder}/none.json")
    pipeline.step(torch.randn(4, 8), target=torch.randn(4, 8))
    run.add(rank)
    refused(run.save, f"{folder}/none.json")
    run.add(5)
    if rank == 0:
        refused(run.save, "/proc/none/run.json", kind=OSError)
    else:
        run.save("/proc/none/run.json")  # the others do not wait for it
    return said


def test_what_cannot_be_saved_is_said_on_every_rank(tmp_path: Path) -> None:
    first, second = ranks.run(_refusals, folder=str(tmp_path))
    assert first[:3] == second
    assert "no metrics before the first step" in first[0]
    assert "ranks [0, 1] added no step" in first[1]
    assert "added different steps" in first[2]
    assert not list(tmp_path.iterdir())


def _many(rank: int, path: str) -> list[int]:
    pipeline = built()
    run = RunRecord(pipeline, most_steps=4)
    pipeline.step(torch.randn(4, 8), target=torch.randn(4, 8))
    for number in range(1, 60, 2):
        run.add(number, place=number)
    run.save(path)
    return list(run._series[True].rows)


def test_a_long_run_is_thinned_evenly(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    kept, _ = ranks.run(_many, path=str(path))
    assert 4 <= len(kept) <= 8 and kept[0] == 1
    assert len({after - before for before, after in zip(kept, kept[1:], strict=False)}) == 1
    run = read_trace(path)[1]
    assert run is not None and run["columns"]["place"] == kept


def test_a_trace_alone_makes_a_page_and_other_files_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pp_runtime.orders import build_order
    from pp_runtime.timing import simulate

    trace = tmp_path / "trace.json"
    simulate(build_order("ZBVZeroBubble", 2, 4, 4)[0]).timeline().to_chrome(trace)
    assert main(["report", str(trace)]) == 0
    assert "planned and measured" in trace.with_suffix(".html").read_text()
    capsys.readouterr()
    other = tmp_path / "other.json"
    for content, words in (
        ("[1, 2]", "is not a trace that pp_runtime wrote"),
        ("no json", "is not a trace that pp_runtime wrote"),
        ('{"traceEvents": [], "otherData": {"pp_runtime": {"version": 7}}}', "version 7"),
    ):
        other.write_text(content)
        assert main(["report", str(other)]) == 1
        assert words in capsys.readouterr().err
    assert main(["report", str(tmp_path / "absent.json")]) == 1
    assert "absent.json" in capsys.readouterr().err


def test_a_record_keeps_a_step_or_more() -> None:
    with pytest.raises(PipelineUsageError, match="most_steps is 0"):
        RunRecord(None, most_steps=0)  # type: ignore[arg-type]
