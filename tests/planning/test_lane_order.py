"""The proof of lanes finds what is not in order and takes what is."""

import pytest

from pp_runtime.planning.lane_order import LaneEntry, check_lane_order, races


def work(lane: str, text: str, reads: str = "", writes: str = "") -> LaneEntry:
    return LaneEntry("work", lane, 0, text, tuple(reads.split()), tuple(writes.split()))


def mark(lane: str, event: int) -> LaneEntry:
    return LaneEntry("mark", lane, event, "", (), ())


def wait(lane: str, event: int) -> LaneEntry:
    return LaneEntry("wait", lane, event, "", (), ())


def passed(event: int) -> LaneEntry:
    return LaneEntry("passed", "", event, "", (), ())


def test_a_lane_is_in_order_with_itself() -> None:
    assert not races([work("a", "fill", writes="x"), work("a", "use", reads="x"), work("a", "fill", writes="x")])


def test_a_read_that_waits_for_nothing_is_named() -> None:
    entries = [work("receive", "receive 3", writes="x"), mark("receive", 1), work("compute", "1F3", reads="x")]
    with pytest.raises(
        RuntimeError, match="'1F3' on lane 'compute' does not wait for 'receive 3' on lane 'receive'.*'x'"
    ):
        check_lane_order(entries)


def test_a_read_after_a_wait_is_in_order() -> None:
    assert not races([work("a", "fill", writes="x"), mark("a", 1), wait("b", 1), work("b", "use", reads="x")])


def test_a_mark_from_before_the_write_does_not_help() -> None:
    assert races([mark("a", 1), work("a", "fill", writes="x"), wait("b", 1), work("b", "use", reads="x")])


def test_a_wait_that_comes_after_the_read_does_not_help() -> None:
    assert races([work("a", "fill", writes="x"), mark("a", 1), work("b", "use", reads="x"), wait("b", 1)])


def test_memory_is_not_written_before_every_reader_is_done() -> None:
    entries = [
        work("a", "fill", writes="x"),
        mark("a", 1),
        wait("b", 1),
        work("b", "use", reads="x"),
        wait("c", 1),
        work("c", "also use", reads="x"),
        mark("b", 2),
        wait("a", 2),
        work("a", "fill again", writes="x"),
    ]
    assert [(race.earlier.text, race.later.text) for race in races(entries)] == [("also use", "fill again")]


def test_order_passes_from_lane_to_lane() -> None:
    entries = [
        work("a", "fill", writes="x"),
        mark("a", 1),
        wait("b", 1),
        mark("b", 2),
        wait("c", 2),
        work("c", "use", reads="x"),
    ]
    assert not races(entries)


def test_what_the_host_saw_pass_is_before_what_it_queues_next() -> None:
    entries = [work("a", "fill", writes="x"), mark("a", 1), passed(1), work("b", "use", reads="x")]
    assert not races(entries)
    assert races([entry for entry in entries if entry.kind != "passed"])
