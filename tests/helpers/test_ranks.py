"""The harness of the multi-process tests: results in order, tracebacks shown, time-outs kept, nothing left behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers import ranks

ROOT = Path(__file__).resolve().parents[2]


def _sum_of_ranks(rank: int, offset: int) -> tuple[int, float]:
    value = torch.tensor(float(rank + offset))
    dist.all_reduce(value)
    return rank, value.item()


def _fail_on_one(rank: int) -> None:
    if rank == 1:
        print("printed before the end")
        raise LookupError("told by rank one")
    dist.recv(torch.empty(1), src=1)


def _sleep_and_leave_a_child(rank: int, note: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(note, str(rank)).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def _die(rank: int) -> str:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def _remember(rank: int) -> bool:
    seen = hasattr(torch, "_seen_by_a_test")
    torch._seen_by_a_test = True  # type: ignore[attr-defined]
    return seen


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_rank_order_and_ranks_share_a_group(count: int) -> None:
    total = float(sum(range(count)) + 10 * count)
    assert ranks.run(_sum_of_ranks, count, offset=10) == [(rank, total) for rank in range(count)]


def test_a_failing_rank_is_shown_with_traceback_and_output_and_ends_the_waiting_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks, "GRACE_AFTER_FAILURE", 1.0)
    start = time.monotonic()
    with pytest.raises(ranks.RanksFailed) as failure:
        ranks.run(_fail_on_one, 2, timeout=50)
    assert time.monotonic() - start < 40
    text = str(failure.value)
    assert "LookupError: told by rank one" in text and "in _fail_on_one" in text
    assert "printed before the end" in text
    assert text.index("rank 1") < text.index("rank 0")


def test_a_timeout_kills_the_ranks_and_their_children_and_shows_their_stacks(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ranks.RanksFailed, match="did not finish") as failure:
        ranks.run(_sleep_and_leave_a_child, 2, timeout=3, note=str(tmp_path))
    assert time.monotonic() - start < 40
    assert "in _sleep_and_leave_a_child" in str(failure.value)
    pids = [int(pid) for note in tmp_path.iterdir() for pid in note.read_text().split()]
    assert len(pids) == 4
    limit = time.monotonic() + 10
    while any(map(_alive, pids)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(_alive, pids))


def test_an_expected_death_gives_no_result_and_an_unexpected_one_is_named() -> None:
    assert ranks.run(_die, 2, deaths=[0]) == [None, "alive"]
    with pytest.raises(ranks.RanksFailed, match="rank 0: died without a report, exit code -9"):
        ranks.run(_die, 2)


def test_no_state_passes_from_one_call_to_the_next() -> None:
    assert ranks.run(_remember, 1) == [False]
    assert ranks.run(_remember, 1) == [False]


def test_a_killed_test_run_takes_its_ranks_with_it(tmp_path: Path) -> None:
    program = (
        "from tests.helpers import ranks, test_ranks\n"
        "if __name__ == '__main__':\n"
        f"    ranks.run(test_ranks._sleep_and_leave_a_child, 1, timeout=600, note={str(tmp_path)!r})\n"
    )
    with tempfile.TemporaryDirectory() as folder:  # a killed process cannot remove its own
        run = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"TMPDIR": folder})
        limit = time.monotonic() + 60
        while not (notes := [note.read_text() for note in tmp_path.iterdir()]) or not notes[0]:
            assert time.monotonic() < limit and run.poll() is None
            time.sleep(0.05)
        run.kill()
        run.wait()
        pids = [int(pid) for pid in notes[0].split()]
        while any(map(_alive, pids)) and time.monotonic() < limit:
            time.sleep(0.05)
    assert not any(map(_alive, pids))
