"""The command for a GPU, without one: a bad step costs its own result only, and the report says what was not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import driver, probe, records, report, steps

ROOT = Path(__file__).resolve().parents[1]
HEADING = {"commit": "abc", "device": "sim", "began": "today", "seconds": 1.0}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run_all(steps_to_run: list[driver.Step], folder: Path, total: float = 60.0) -> dict[str, driver.Outcome]:
    outcomes = driver.run_all(steps_to_run, total, folder, folder, lambda so_far: None)
    return {outcome.name: outcome for outcome in outcomes}


def record(text: str) -> str:
    return f"import sys; sys.path.insert(0, {str(ROOT)!r}); from benchmarks.gpu import records; {text}"


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_step_over_its_limit_is_killed_with_its_children_wherever_they_went(tmp_path: Path) -> None:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    starts = f"""
import subprocess, sys, time
for detached in (False, True):
    subprocess.Popen([sys.executable, "-c", {child!r}], start_new_session=detached)
time.sleep(600)
"""
    begin = time.monotonic()
    found = run_all([driver.Step("hangs", python(starts), 4.0), driver.Step("next", python(""), 20.0)], tmp_path)
    assert found["hangs"].status == "over its limit" and "killed after 4 s" in found["hangs"].reason
    assert found["next"].status == "passed" and time.monotonic() - begin < 20
    pids = [int(line) for line in found["hangs"].last_lines]
    assert len(pids) == 2 and not any(map(is_alive, pids))


def test_what_a_step_that_ended_leaves_behind_is_killed(tmp_path: Path) -> None:
    leaves = "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid)"
    assert run_all([driver.Step("leaves", python(leaves), 20.0)], tmp_path)["leaves"].status == "passed"
    assert not is_alive(int((tmp_path / "leaves.log").read_text()))


def test_a_failing_step_does_not_stop_the_others(tmp_path: Path) -> None:
    found = run_all(
        [
            driver.Step("fails", python("print('the last words'); raise SystemExit(7)"), 20.0),
            driver.Step("needs it", python(""), 20.0, after=("fails",)),
            driver.Step("is not there", [str(tmp_path / "nothing")], 20.0),
            driver.Step("is wrong", python(record("records.check('sums', ['2 + 2 is 5'], 0.1)")), 20.0),
            driver.Step("cannot be", python(record("records.not_run('', 'no such card')")), 20.0),
            driver.Step("is right", python(record("records.check('sums', [], 0.1)")), 20.0),
        ],
        tmp_path,
    )
    assert found["fails"].status == "failed" and found["fails"].last_lines == ["the last words"]
    assert found["needs it"].status == "not run" and "needs the step fails" in found["needs it"].reason
    assert found["is not there"].status == "failed" and "No such file" in found["is not there"].reason
    assert found["is wrong"].status == "failed" and found["is wrong"].reason == "a check did not pass"
    assert found["cannot be"].status == "not run" and found["cannot be"].reason == "no such card"
    assert found["is right"].status == "passed"


def test_steps_for_which_no_time_is_left_are_named(tmp_path: Path) -> None:
    hangs = driver.Step("hangs", python("import time; time.sleep(600)"), 600.0)
    found = run_all([hangs, driver.Step("late", python(""), 20.0)], tmp_path, total=6.0)
    assert found["hangs"].status == "over its limit" and found["hangs"].seconds < 12
    assert found["late"].status == "not run" and "no time was left of 6 s" in found["late"].reason


def test_a_step_that_is_killed_keeps_what_it_had_measured(tmp_path: Path) -> None:
    measures = record("records.number('Times', 'GPipe', 'ours', 1.5, 'ms'); import time; time.sleep(600)")
    found = run_all([driver.Step("times", python(measures), 4.0)], tmp_path)["times"]
    assert [(one["row"], one["value"]) for one in found.records] == [("GPipe", 1.5)]


def outcomes() -> list[driver.Outcome]:
    facts = {"card": "H100", "torch": "2.11", "cuda": "13.0", "nccl": "2.28", "driver": "580"}
    number = {"kind": "number", "table": "Times", "row": "GPipe", "column": "ours", "value": 1.5, "unit": "ms"}
    probed = number | {"table": "Probe", "row": "speed", "value": 2000.0, "unit": "GB/s"}
    wrong = {"kind": "check", "name": "1F1B", "passed": False, "problems": ["step 0 differs"], "seconds": 1.0}
    part = {"kind": "not run", "what": "two GPUs", "reason": "there is one"}
    return [
        driver.Outcome(
            "machine", "passed", records=[{"kind": "fact", "name": n, "value": v} for n, v in facts.items()]
        ),
        driver.Outcome("sanitizer", "not run", reason="needs a GPU"),
        driver.Outcome("times", "passed", 3.0, records=[number, probed, probed | {"row": "time", "unit": "us"}, part]),
        driver.Outcome("checks", "failed", 4.0, "a check did not pass", ["the last line"], [wrong]),
    ]


def test_text_and_json_say_what_was_not_run_what_was_wrong_and_what_was_measured(tmp_path: Path) -> None:
    report.write(tmp_path, HEADING, outcomes())
    text, whole = (tmp_path / "gpu.txt").read_text(), json.loads((tmp_path / "gpu.json").read_text())
    assert "sanitizer" in text and "not run: needs a GPU" in text and "not run: times, two GPUs: there is one" in text
    assert "WRONG: checks, 1F1B" in text and "step 0 differs" in text and "the last line" in text
    assert "DRY RUN" in text and "ours (ms)" in text and "2000 GB/s" in text and "2000 us" in text
    assert {one["name"]: one["status"] for one in whole["steps"]}["sanitizer"] == "not run"
    assert whole["not_run"] == [{"step": "times", "what": "two GPUs", "reason": "there is one"}]
    for number in whole["numbers"]:
        assert number["unit"] and number["card"] == "H100" and number["torch"] == "2.11"
        assert (number["cuda"], number["nccl"], number["driver"]) == ("13.0", "2.28", "580")


def test_an_answer_of_the_probe_is_a_question_a_value_and_a_unit() -> None:
    said = "a message, done\t3.25\tus\nnot an answer\npidfd_getfd\tworks\t\n"
    assert probe.answers(said) == [("a message, done", 3.25, "us"), ("pidfd_getfd", "works", "")]


def test_what_only_cuda_has_is_left_out_of_a_dry_run_by_name() -> None:
    left_out = {step.name for step in steps.of("sim", ROOT) if step.left_out}
    assert left_out == {"probe", "sanitizer"}
    assert not any(step.left_out for step in steps.of("cuda", ROOT))
    assert sum(step.limit for step in steps.of("cuda", ROOT) if step.name in ("machine", "build")) < 300


@pytest.mark.timeout(180)
def test_a_dry_run_of_one_step_measures_on_the_asynchronous_device(tmp_path: Path) -> None:
    from tests.async_device import device

    device.built()
    command = "-m benchmarks.gpu --device sim --only machine probe one_rank --seconds 120 --out".split()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, *command, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    whole = json.loads((tmp_path / "gpu.json").read_text())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [(step["name"], step["status"]) for step in whole["steps"]] == [
        ("machine", "passed"),
        ("probe", "not run"),
        ("one_rank", "passed"),
    ]
    assert [one["passed"] for one in whole["checks"]] == [True, True]
    assert whole["machine"]["card"] == "none: the asynchronous device"


def _work(rank: int, kind: str, item: str) -> None:
    if item == "raises":
        raise LookupError("nothing there")
    if item == "hangs":
        time.sleep(600)
    if item == "forked" and os.environ.get("PP_TEST_START") != "spawn":
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")


def _worked(monkeypatch: pytest.MonkeyPatch, path: Path, items: list[str], each: float) -> list[tuple[str, str]]:
    from benchmarks.gpu import devices

    monkeypatch.setenv(records.FILE, str(path))
    monkeypatch.setenv("PP_TEST_START", "")  # so that it is put back
    monkeypatch.delenv("PP_TEST_START")
    devices.run_items(_work, 1, "sim", items, each, ", again")
    return [(one["kind"], one.get("item") or one.get("name") or "") for one in records.read(path)]


@pytest.mark.timeout(180)
def test_an_item_that_raises_or_hangs_is_tried_once_more_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "records"
    assert _worked(monkeypatch, path, ["right", "raises", "hangs", "right too"], 3.0) == [
        ("done", "right"),
        ("check", "raises"),
        ("done", "raises, again"),
        ("check", "hangs"),
        ("done", "hangs, again"),
        ("done", "right too"),
    ]
    raised, hung = (record["problems"] for record in records.read(path) if record["kind"] == "check")
    assert "LookupError: nothing there" in raised and any("rank 0" in line for line in hung)


@pytest.mark.timeout(180)
def test_ranks_that_cannot_be_forked_are_started_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _worked(monkeypatch, tmp_path / "records", ["forked"], 30.0) == [("note", ""), ("done", "forked")]


def test_records_that_a_killed_process_cut_off_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_text('{"kind": "done", "item": "a"}\n{"kind": "do')
    assert records.read(path) == [{"kind": "done", "item": "a"}]
