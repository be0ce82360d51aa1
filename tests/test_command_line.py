"""python -m pp_runtime: every command, and what it says about bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pp_runtime.__main__ import main
from pp_runtime.orders.catalogue import ORDERS, build_order
from pp_runtime.orders.csv_files import dump_order, load_order
from pp_runtime.orders.ir import from_torch_form, to_torch_form
from pp_runtime.pictures.perfetto import write_chrome
from pp_runtime.planning.passes.communication import insert_communication
from pp_runtime.timing.simulation import simulate

SETTING = ["--ranks", "4", "--microbatches", "8"]


@pytest.fixture
def compute_file(tmp_path: Path) -> Path:
    path = tmp_path / "order.csv"
    dump_order(path, to_torch_form(build_order("ZBVZeroBubble", 2, 4, 4)[0]))
    return path


@pytest.mark.parametrize("name", sorted({*ORDERS, "Auto"}))
def test_show_draws_every_schedule(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", name, *SETTING]) == 0
    shown = capsys.readouterr().out
    assert f"{name}, 4 ranks" in shown
    assert "makespan" in shown and "rank 3" in shown


def test_show_knows_schedules_by_class_name_in_any_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "schedulezb1p", *SETTING]) == 0
    assert "bubble 11.1%" in capsys.readouterr().out


def test_show_writes_all_its_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = {kind: tmp_path / f"plan.{kind}" for kind in ("png", "svg", "html", "perfetto", "csv")}
    arguments = [part for kind, path in files.items() for part in (f"--{kind}", str(path))]
    assert main(["show", "VHalf", *SETTING, "--costs", "F=1,I=1,W=1,transfer=0.1", *arguments]) == 0
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert json.loads(files["perfetto"].read_text())["traceEvents"]
    assert from_torch_form(load_order(files["csv"])) == build_order("VHalf", 4, 8, 8)[0]


def test_width_is_the_pixels_of_a_picture_and_columns_the_characters_of_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    png = tmp_path / "plan.png"
    assert main(["show", "ZB1P", *SETTING, "--png", str(png), "--width", "2600", "--columns", "50"]) == 0
    assert int.from_bytes(png.read_bytes()[16:20], "big") == 2600
    assert max(len(line) for line in capsys.readouterr().out.splitlines() if line.startswith("rank ")) <= 50
    assert main(["show", "ZB1P", *SETTING, "--png", str(png), "--width", "90000"]) == 1
    assert "90000 pixels cannot be drawn" in capsys.readouterr().err


def test_show_draws_a_run_beside_the_plan_made_from_its_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.json"
    write_chrome(run, {"measured": simulate(build_order("1F1B", 4, 4, 8)[0]).timeline()})
    assert main(["show", "1F1B", *SETTING, "--measured", str(run), "--html", str(tmp_path / "both.html")]) == 0
    assert "rank 0 measured" in (tmp_path / "both.html").read_text()
    assert "makespan 33" in capsys.readouterr().out


def test_compare_lists_every_training_schedule_and_names_the_winner(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--ranks", "4", "--stages", "8", "--microbatches", "16"]) == 0
    table = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in table.splitlines() if line.endswith(tuple("0123456789"))}
    assert rows.keys() == ORDERS.keys() - {"ForwardOnly"} | {"Auto"}
    assert rows["1F1B"][1:5] == ["4", "114", "15.8%", "4"]
    assert float(rows["Auto"][2]) <= min(float(row[2]) for row in rows.values())
    assert "shortest named schedule" in table


def test_compare_under_a_cap_says_what_it_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *SETTING, "--cap", "3", "--no-auto"]) == 0
    table = capsys.readouterr().out
    assert "VMin" in table.splitlines()[1]
    assert "GPipe is left out: it keeps 8 activations" in table
    assert "Auto" not in table


def test_verify_accepts_both_formats(compute_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(compute_file)]) == 0
    assert "2 ranks, 4 stages, 4 microbatches" in capsys.readouterr().out
    written = tmp_path / "comms.csv"
    assert main(["convert", str(compute_file), str(written), "--reduce-grad", "--unshard", "2"]) == 0
    assert main(["verify", str(written)]) == 0
    assert main(["simulate", str(written), "--quiet"]) == 0


def test_convert_writes_what_the_pass_makes(compute_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(compute_file)]) == 0
    order, placement = build_order("ZBVZeroBubble", 2, 4, 4)
    expected = insert_communication(order, placement)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [",".join(map(str, expected[rank])) for rank in range(2)]


@pytest.mark.parametrize("command", ["verify", "simulate", "convert"])
def test_a_bad_cell_is_named_by_row_column_and_action(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("0F0,,0B0\n1F0,1X0,\n")
    assert main([command, str(path)]) == 1
    assert "row 2 (rank 1), column 2: '1X0' is not an action" in capsys.readouterr().err


def test_a_wrong_order_is_refused_with_rank_and_action(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.csv"
    path.write_text("0F0,,0B0\n,1F0,\n")
    assert main(["verify", str(path)]) == 1
    error = capsys.readouterr().err
    assert "Rank 1" in error and "no B (nor I and W) of microbatch 0 on stage 1" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "NoSuch", *SETTING], "'NoSuch' is not a schedule"),
        (["show", "ZBVZeroBubble", *SETTING, "--stages", "4"], "2 stages a rank"),
        (["show", "1F1B", *SETTING, "--costs", "Q=1"], "'Q' is not a cost"),
        (["verify", "/no/such/file.csv"], "No such file"),
        (["compare", *SETTING, "--cap", "0.1"], "No schedule fits"),
    ],
)
def test_bad_input_is_one_line_of_error(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--ranks", "4", "--microbatches", "0"], "--microbatches: '0' is not a count: give a whole number"),
        (["show", "1F1B", "--ranks", "-1", "--microbatches", "4"], "--ranks: '-1' is not a count"),
        (["compare", *SETTING, "--stages", "0"], "--stages: '0' is not a count"),
        (
            ["memory", "1F1B", *SETTING, "--shape", "4x2048"],
            "'4x2048' is not a shape: write its sizes with commas between them, as 4,512,1024",
        ),
        (["memory", "1F1B", *SETTING, "--shape", "4,-1"], "'4,-1' is not a shape"),
    ],
)
def test_a_bad_option_is_said_once_with_what_it_looks_like(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count(message) == 1


@pytest.mark.parametrize(("command", "words"), [("compare", "2 a rank"), ("show", "as few as the schedule takes")])
def test_help_says_how_many_stages_there_are_without_the_option(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert words in " ".join(capsys.readouterr().out.split())


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pp_runtime", "show", "1F1B", *SETTING], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "bubble 27.3%" in done.stdout


DECODER = ["--layers", "8", "--hidden", "256", "--batch", "16", "--sequence", "64", "--ranks", "2"]


def test_advise_says_what_to_take_and_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    machine = ["--memory", "500MiB", "--flops", "10T", "--memory-bandwidth", "1T", "--link", "10G", "--latency", "1e-5"]
    assert main(["advise", *DECODER, *machine, "--schedules", "1f1b", "GPipe", "zbvzerobubble"]) == 0
    shown = capsys.readouterr().out
    assert "ZBVZeroBubble" in shown and "fullest rank" in shown and "Take " in shown and " ms a step" in shown
    assert main(["advise", *DECODER, "--memory", "1MiB", "--schedules", "1F1B"]) == 0
    assert "Nothing fits into 1 MiB" in capsys.readouterr().out


def test_advise_counts_a_decoder_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    def peak_of(*more: str) -> float:
        arguments = ["advise", *DECODER, "--microbatches", "4", "--schedules", "1F1B", "--dtype", "float32", *more]
        assert main(arguments) == 0
        value, unit = capsys.readouterr().out.splitlines()[1].split()[5:7]
        return float(value) * {"MiB": 1.0, "GiB": 1024.0}[unit]

    plain = peak_of("--optimizer", "0")
    assert peak_of("--optimizer", "2") > plain
    assert peak_of("--recompute", "--optimizer", "0") < plain
    assert peak_of("--dtype", "bfloat16", "--optimizer", "0") < plain
    assert peak_of("--kv-heads", "1", "--heads", "4", "--optimizer", "0") < peak_of("--heads", "4", "--optimizer", "0")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "half-ish"], "not a dtype"),
        (["--link", "1G"], "need --flops"),
        (["--heads", "3"], "3 heads must divide the hidden size 256"),
        (["--microbatches", "17"], "16 sequences do not make 17"),
        (["--schedules", "fast"], "no schedule 'fast'"),
    ],
)
def test_advise_refuses_with_a_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", *DECODER, *arguments]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("amount", ["", "0", "many", "3QB", "-1G"])
def test_advise_refuses_what_is_no_amount(amount: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["advise", *DECODER, f"--memory={amount}"])
    assert "is not an amount" in capsys.readouterr().err
