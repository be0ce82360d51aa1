"""Order files: torch's two formats, and errors that name the cell."""

import pytest

from pp_runtime.errors import OrderFileError
from pp_runtime.orders.catalogue import ORDERS, build_order
from pp_runtime.orders.csv_files import dump_order, load_order
from pp_runtime.orders.ir import from_torch_form, to_torch_form
from pp_runtime.planning.passes.communication import insert_communication
from pp_runtime.planning.passes.data_parallel import insert_reduce_grad, insert_unshard
from pp_runtime.planning.verifier import verify_communication
from tests.helpers.torch_orders import torch_schedule

TORCH_NAMES = ["LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
NAMES = [name for name, spec in ORDERS.items() if not spec.forward_only]


def order_of(name, ranks=3, microbatches=7):
    stages = ranks * (ORDERS[name].stages_per_rank_allowed or (2,))[0]
    return build_order(name, ranks, stages, microbatches)


@pytest.mark.parametrize("name", NAMES)
def test_a_written_order_is_read_back_and_written_again_the_same(name, tmp_path):
    order, placement = order_of(name)
    whole = insert_communication(insert_reduce_grad(insert_unshard(order)), placement)
    for format, rows in (("compute_only", to_torch_form(order)), ("compute_comms", whole)):
        first, second = tmp_path / "first.csv", tmp_path / "second.csv"
        dump_order(first, rows)
        dump_order(second, load_order(first, format))
        assert load_order(first, format) == rows
        assert first.read_bytes() == second.read_bytes()
    assert from_torch_form(load_order(first)) == whole


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_files_go_between_torch_and_us_byte_for_byte(name, tmp_path):
    stages = 2 * (ORDERS[name].stages_per_rank_allowed or (2,))[0]
    schedule = torch_schedule(name, 2, stages, 6)
    first, second = tmp_path / "torch.csv", tmp_path / "ours.csv"
    for format in ("compute_only", "compute_comms"):
        schedule._dump_csv(first, format)
        rows = load_order(first, format)
        dump_order(second, rows)
        assert first.read_bytes() == second.read_bytes()
        schedule._load_csv(second, format)
    placement = ORDERS[name].placement(2, stages)
    verify_communication(from_torch_form(rows), placement, 6)

    order, placement = build_order(name, 2, stages, 6)
    dump_order(first, to_torch_form(order))
    schedule._load_csv(first, "compute_only")
    dump_order(first, insert_communication(insert_reduce_grad(insert_unshard(order)), placement))
    schedule._load_csv(first, "compute_comms")
    schedule._dump_csv(second, "compute_comms")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("text", "format", "complaint"),
    [
        ("0F0,0B0\r\n1F0,1Q0\r\n", "compute_only", r"row 2 \(rank 1\), column 2: '1Q0' is not an action"),
        ("0F0,0F1x\r\n", None, r"row 1 \(rank 0\), column 2: '0F1x' is not an action"),
        ("0F0,0SEND_F0\r\n", "compute_only", r"row 1 \(rank 0\), column 2: '0SEND_F0' is not a compute action"),
        ("0F0,,0B0\r\n", "compute_comms", r"row 1 \(rank 0\), column 2: the cell is empty"),
        ("0F0,(0F1;1B0OVERLAP_F_B\r\n", None, r"row 1 \(rank 0\), column 2: .* sub-actions are written as"),
        ("", None, "has no actions"),
        ("\x00\x00", None, "has|not"),
    ],
)
def test_a_bad_cell_is_named_by_row_column_and_text(text, format, complaint, tmp_path):
    (tmp_path / "bad.csv").write_text(text, newline="")
    with pytest.raises(OrderFileError, match=complaint):
        load_order(tmp_path / "bad.csv", format)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(OrderFileError, match="is not a CSV file of actions"):
        load_order(tmp_path / "bad.csv")


def test_ranks_that_a_file_cannot_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ranks 0, 1, 2"):
        dump_order(tmp_path / "order.csv", {1: [], 3: []})


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the formats are"):
        load_order(tmp_path / "order.csv", "comms")
