"""Actions and their text."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_runtime.orders import ir
from pp_runtime.orders.ir import Action, ActionType

number = st.integers(0, 10_000)
microbatch_kinds = st.sampled_from([k for k in ActionType if k not in ir.STAGE_TYPES and k is not ir.OVERLAP_F_B])
single = st.tuples(number, microbatch_kinds, number).map(lambda fields: Action(*fields)) | st.tuples(
    number, st.sampled_from(sorted(ir.STAGE_TYPES))
).map(lambda fields: Action(*fields))
parts = st.tuples(number, st.sampled_from([ir.FORWARD, ir.FULL_BACKWARD, ir.BACKWARD_INPUT]), number)
pair = st.tuples(parts, parts).map(
    lambda both: Action(-1, ir.OVERLAP_F_B, None, tuple(Action(*fields) for fields in both))
)


@given(single | pair)
def test_text_of_an_action_reads_back_as_the_action(action):
    assert Action.from_str(str(action)) == action
    assert pickle.loads(pickle.dumps(action)) == action


@pytest.mark.parametrize(
    "text",
    [
        "2F0",
        "11I3",
        "0W12",
        "4B1",
        "3SEND_F7",
        "3RECV_B7",
        "1UNSHARD",
        "1RESHARD",
        "3REDUCE_GRAD",
        "(0F5;7B2)OVERLAP_F_B",
    ],
)
def test_text_is_torch_text(text):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    theirs, ours = schedules._Action.from_str(text), Action.from_str(text)
    assert str(ours) == repr(ours) == str(theirs) == text
    assert str(ours.computation_type).split(".")[1] == str(theirs.computation_type).split(".")[1]
    assert ours.is_compute_op == theirs.is_compute_op


@pytest.mark.parametrize(
    "text",
    ["F0", "2F", "2F0x", "2 F0", "-1F0", "2FF0", "2REDUCE_GRAD1", "2OVERLAP_F_B0", "2f0", "²F0"]
    + ["(0F1)F", "(0F1;)OVERLAP_F_B", "(0F1;1B0", "(0F1;1SEND_F0)OVERLAP_F_B", "(0F1;(1F0;1B0)OVERLAP_F_B)OVERLAP_F_B"],
)
def test_text_that_is_no_action_is_refused_by_name(text):
    with pytest.raises(ValueError, match="is not an action") as refusal:
        Action.from_str(text)
    assert text in str(refusal.value)


def test_blank_text_is_no_action():
    assert Action.from_str("  ") is None


def test_unknown_type_is_refused():
    assert ActionType.from_str("SEND_F") is ir.SEND_F
    with pytest.raises(ValueError, match="'Q' is not an action type"):
        ActionType.from_str("Q")


def text_order(rows):
    return {rank: [Action.from_str(text) for text in row.split()] for rank, row in enumerate(rows)}


def test_placement_is_read_from_the_order():
    order = text_order(["0F0 (3F0;0B0)OVERLAP_F_B", "1F0 2F0"])
    assert ir.placement_of(order) == (0, 1, 1, 0)
    assert ir.microbatch_count(text_order(["0F0 (0F4;0B0)OVERLAP_F_B"])) == 5


def test_a_stage_on_two_ranks_or_none_has_no_placement():
    with pytest.raises(ValueError, match="Stage 0 stands on rank 0 and on rank 1"):
        ir.placement_of(text_order(["0F0", "0F1"]))
    with pytest.raises(ValueError, match="no action of stage 1"):
        ir.placement_of(text_order(["0F0", "2F0"]))


def test_torch_form_has_none_where_a_rank_waits_for_another():
    order = text_order(["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"])
    shown = ir.to_torch_form(order)
    assert shown == {
        0: [Action.from_str(text) for text in ("0F0", "0F1", "", "0B0", "", "0B1")],
        1: [Action.from_str(text) for text in ("", "1F0", "1B0", "1F1", "1B1")],
    }
    assert ir.from_torch_form(shown) == order


def test_torch_form_of_an_order_that_never_ends_shows_the_rest_without_gaps():
    order = text_order(["0B0 0F0", "1F0 1B0"])
    assert ir.to_torch_form(order) == order
