"""Bytes and text from outside are refused with the error that is meant for them, whatever they are."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pp_runtime import _C
from pp_runtime.errors import OrderFileError
from pp_runtime.orders.csv_files import dump_order, load_order
from pp_runtime.running.agreement.failures import FailureRecord
from pp_runtime.running.oversight.whereabouts import _from_report

quick = settings(max_examples=300, deadline=None)

# Text that is nearly an order file, so that the parser is got past its first check.
_pieces = st.sampled_from(
    [*"0123456789FBIW,();\n\"' \r\x00", "SEND_F", "RECV_B", "OVERLAP_F_B", "0F0", "1B2", "(0F5;7B2)"]
)
_nearly_orders = st.lists(_pieces, max_size=40).map("".join)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzing") / "order.csv"


@quick
@given(data=st.one_of(st.binary(max_size=60), _nearly_orders.map(str.encode)))
def test_an_order_file_is_read_or_refused(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    try:
        rows = load_order(file)
    except OrderFileError as error:
        assert str(file) in str(error)
        return
    dump_order(file, rows)
    again = load_order(file)
    assert [row for row in again.values() if row] == [row for row in rows.values() if row]


def _executor(numbers: list[int]) -> _C.Executor:
    def nothing(*_: object) -> None:
        return None

    callbacks = _C.StageCallbacks(forward=nothing, flatten=nothing, unflatten=nothing)
    stages = [_C.Stage(index, index == 0, index == 1, callbacks) for index in range(2)]
    return _C.Executor(numbers, stages, [_C.Edge(0, 1)], [], [], [nothing], ["0UNSHARD"], 3, None, None, None, None)


_numbers = st.integers(-3, 5) | st.sampled_from([2**31 - 1, -(2**31), 10, 11, 255, 256])


@quick
@given(
    numbers=st.lists(_numbers, max_size=30)
    | st.lists(st.lists(_numbers, min_size=7, max_size=7), max_size=4).map(lambda rows: sum(rows, []))
)
def test_a_program_is_read_or_refused(numbers: list[int]) -> None:
    try:
        executor = _executor(numbers)
    except ValueError as error:
        assert "program" in str(error)
        return
    for instruction in range(len(numbers) // 7):
        assert executor.text_of(instruction)
        assert -1 <= executor.stage_index_of(instruction) < 2
        assert -1 <= executor.microbatch_of(instruction) < 3


def test_every_number_of_an_instruction_has_its_bounds() -> None:
    send, receive, hand, call = 4, 5, 8, 10
    good = [0, 3, 1, 2, 0, 0, 0]
    _executor(good)
    for place, value in [(0, -1), (0, 11), (1, 16), (2, 2), (2, -1), (3, 3), (3, -1)]:
        with pytest.raises(ValueError, match="instruction 0 has"):
            _executor([*good[:place], value, *good[place + 1 :]])
    for numbers in (
        [send, 0, 0, 0, 0, 0, 0],
        [receive, 0, 0, 0, 0, 0, 0],
        [hand, 0, 0, 0, 1, 0, 0],
        [hand, 0, 0, 0, 0, 2, 0],
    ):
        with pytest.raises(ValueError, match="out of range"):
            _executor(numbers)
    for numbers in ([call, 0, -1, -1, 0, 0, 1], [call, 0, 2, -1, 0, 0, 0], [call, 0, -1, 3, 0, 0, 0]):
        with pytest.raises(ValueError, match="out of range"):
            _executor(numbers)
    with pytest.raises(ValueError, match="multiple of 7"):
        _executor(good[:6])


_FLOAT, _STRIDED = 6, 1


def _description(
    tensors: list[tuple[int, ...]],
    count: int | None = None,
    structure: bytes = b"",
    said: int | None = None,
    wrappings: bytes = b"",
    wrappings_said: int | None = None,
) -> bytes:
    """As csrc/transport/message.cpp writes one; a tensor is (dtype, strided, sizes and strides...)."""
    head = struct.pack(
        "<QIIIII4x",
        1,
        0,
        1,
        len(tensors) if count is None else count,
        len(structure) if said is None else said,
        len(wrappings) if wrappings_said is None else wrappings_said,
    )
    body = b""
    for dtype, strided, *numbers in tensors:
        dimensions = len(numbers) // 2 if strided else len(numbers)
        body += struct.pack("<5B", 1, 0, dtype, dimensions, strided) + struct.pack(f"<{len(numbers)}q", *numbers)
    return head + body + structure + wrappings


def test_a_description_is_read_as_it_was_written() -> None:
    assert (
        _C.describe_message(_description([(_FLOAT, 0, 2, 3), (_FLOAT, _STRIDED, 2, 3, 1, 2)]))
        == "(Float[2, 3], Float[2, 3])"
    )


@pytest.mark.parametrize(
    "description",
    [
        b"",
        _description([(_FLOAT, 0, 2, 3)])[:-1],
        _description([(_FLOAT, 0, -2)]),
        _description([(_FLOAT, 0, 2**62, 2)]),
        _description([(_FLOAT, 0, 2**62, 2**62, 0)]),
        _description([(_FLOAT, 0, 2**45)] * 9),
        _description([(200, 0, 2)]),
        _description([(_FLOAT, 0)], count=2**32 - 1),
        _description([(_FLOAT, 0, 2)], structure=b"ab", said=3),
        _description([(_FLOAT, 0, 2)], wrappings=b"ab", wrappings_said=2**32 - 1),
        _description([(_FLOAT, _STRIDED, 2, 3, 1, 3)]),
        _description([(_FLOAT, _STRIDED, 2, 3, 2, 2**62)]),
        _description([(_FLOAT, _STRIDED, 0, 3, 1, 0)]),
    ],
)
def test_a_description_that_nobody_could_have_sent_is_refused(description: bytes) -> None:
    with pytest.raises(RuntimeError, match="description"):
        _C.describe_message(description)


_sizes = st.integers(-1, 4) | st.sampled_from([2**31, 2**47, 2**62, 2**63 - 1, -(2**63)])
_tensors = st.tuples(st.integers(0, 60), st.sampled_from([0, 1]), *[_sizes] * 4)


@quick
@given(
    data=st.binary(max_size=80)
    | st.builds(
        _description, st.lists(_tensors, max_size=3), st.none() | st.integers(0, 2**32 - 1), st.binary(max_size=5)
    )
)
def test_a_description_is_read_or_refused(data: bytes) -> None:
    try:
        text = _C.describe_message(data)
    except RuntimeError as error:
        assert "description" in str(error)
    else:
        assert text.startswith("(")


@quick
@given(
    text=st.text(max_size=40)
    | st.lists(st.sampled_from(["1", "-1", "x", "1.5", "nan", "9" * 30]), max_size=8).map(" ".join)
)
def test_what_a_store_says_is_read_or_taken_as_text(text: str) -> None:
    assert FailureRecord.from_text(text).error() is not None
    found = _from_report(text)
    assert found is None or str(found)


def test_a_board_holds_any_word() -> None:
    board = _C.Board(_C.Board.make(2), 2, 0)
    assert board.read(1)[0] == 0 or board.read(1)[0] == 11
    with pytest.raises(IndexError):
        board.read(2)
    with pytest.raises(RuntimeError, match="too small"):
        _C.Board(_C.Board.make(1), 2, 0)


def test_what_can_travel() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    for tensor in (
        x,
        x.T,
        x[:, ::2],
        x.expand(4, 2, 3),
        torch.empty(0),
        torch.tensor(1),
        torch.nn.Parameter(x),
        x.bool(),
    ):
        assert _C.can_travel(tensor)
    for tensor in (x.to_sparse(), x.to("meta")):
        assert not _C.can_travel(tensor)
