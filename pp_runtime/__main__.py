"""The command line: show, compare, verify, simulate and convert orders, and say what memory they take."""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pp_runtime.orders import (
    ORDERS,
    SCHEDULE_NAMES,
    Action,
    Order,
    Placement,
    adjacent_edges,
    build_order,
    dump_order,
    from_torch_form,
    leaves,
    load_order,
    microbatch_count,
    placement_of,
    schedule_name,
    to_torch_form,
)
from pp_runtime.pictures import RUN_VERSION, draw, read_trace, text_picture, write_chrome, write_html, write_report
from pp_runtime.planning import (
    Plan,
    Wiring,
    auto,
    compare,
    insert_communication,
    insert_reduce_grad,
    insert_unshard,
    plan_memory,
    verify,
    verify_communication,
)
from pp_runtime.running import loads_of
from pp_runtime.timing import Costs, Simulation, Timeline, as_planned, has_communication, read_costs, simulate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if all is well, 1 if the order or file is not, 2 if the command line is not."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except BrokenPipeError:
        sys.stderr.close()  # the reader, such as head, has seen enough
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _show(options: argparse.Namespace) -> None:
    order, title = _named_order(options)
    _present(simulate(order, _costs(options)), title, options)
    if options.csv:
        dump_order(options.csv, to_torch_form(order))


def _named_order(options: argparse.Namespace) -> tuple[Order, str]:
    """The order of the schedule that the command line names, and its title."""
    name = _schedule_name(options.schedule)
    stages = options.stages or options.ranks * _fewest_stages(name)
    if name == "Auto":
        order: Order = auto(options.ranks, stages, options.microbatches, _costs(options), options.cap)
    else:
        order, _ = build_order(name, options.ranks, stages, options.microbatches)
    return order, f"{name}, {options.ranks} ranks, {stages} stages, {options.microbatches} microbatches"


def _compare(options: argparse.Namespace) -> None:
    stages = options.stages or 2 * options.ranks
    print(
        compare(
            options.ranks,
            stages,
            options.microbatches,
            _costs(options),
            memory_cap=options.cap,
            with_auto=not options.no_auto,
        ).table()
    )


def _memory(options: argparse.Namespace) -> None:
    dtype = _dtype(options.dtype)
    order, title = _named_order(options)
    placement = placement_of(order)
    wiring = Wiring(adjacent_edges(len(placement)), {})
    plan = Plan(order, placement, options.microbatches, wiring, has_backward=not _is_forward_only(order))
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in options.shape]
    print(title)
    print(plan_memory(plan, loads_of(tensors, wiring.edges), torch_keeps_sent=not title.startswith("1F1B")))


def _advise(options: argparse.Namespace) -> None:
    from pp_runtime.advising import print_advice  # which takes a while, and other commands do not need

    print_advice(options, _dtype(options.dtype))


def _dtype(text: str) -> torch.dtype:
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"'{text}' is not a dtype of torch; one is bfloat16.")
    return found


def _verify(options: argparse.Namespace) -> None:
    order, placement = _load(options)
    count = _verify_order(order, placement, options.microbatches)
    actions = sum(map(len, order.values()))
    print(
        f"{options.file}: right: {len(order)} ranks, {len(placement)} stages, {count} microbatches, {actions} actions; "
        f"every action once, after what it needs, and no deadlock even without buffers."
    )


def _simulate(options: argparse.Namespace) -> None:
    order, placement = _load(options)
    _verify_order(order, placement, options.microbatches)
    _present(simulate(order, _costs(options), placement=placement), str(options.file), options)


def _convert(options: argparse.Namespace) -> None:
    order, placement = _load(options)
    if has_communication(order):
        raise ValueError(f"{options.file} has its sends and receives already.")
    _verify_order(order, placement, options.microbatches)
    if options.unshard is not None:
        order = insert_unshard(order, options.unshard)
    if options.reduce_grad:
        order = insert_reduce_grad(order)
    order = insert_communication(order, placement, backward=not _is_forward_only(order))
    if options.output is None:
        sys.stdout.writelines(",".join(map(str, order[rank])) + "\r\n" for rank in sorted(order))
    else:
        dump_order(options.output, order)


def _report(options: argparse.Namespace) -> None:
    spans, run = read_trace(options.file)
    measured = Timeline(spans.spans)
    if run is None:
        run = {"title": options.file.name}
    elif run.get("version") != RUN_VERSION:
        raise ValueError(
            f"{options.file} is of version {run.get('version')} of such files, and this reads {RUN_VERSION}: take the "
            "pp_runtime that wrote it."
        )
    timelines = {"measured": measured} if measured.spans else {}
    with contextlib.suppress(ValueError):  # a trace of one rank, or of stages that form no chain
        timelines = {"planned": as_planned(measured), "measured": measured}
    output = options.output or options.file.with_suffix(".html")
    write_report(output, run, timelines)
    print(output)


def _load(options: argparse.Namespace) -> tuple[Order, Placement]:
    order = from_torch_form(load_order(options.file, options.format))
    return order, placement_of(order)


def _verify_order(order: Order, placement: Placement, microbatches: int | None) -> int:
    count = microbatches or microbatch_count(order)
    check = verify_communication if has_communication(order) else verify
    check(order, placement, count, forward_only=_is_forward_only(order))
    return count


def _is_forward_only(order: Mapping[int, Sequence[Action]]) -> bool:
    return not any(
        part.computation_type.value in ("B", "I", "W") for actions in order.values() for part in leaves(actions)
    )


def _present(played: Simulation, title: str, options: argparse.Namespace) -> None:
    """The picture in the terminal, the numbers below it, and the files that were asked for."""
    plan = played.timeline()
    timelines = {"planned": plan}
    if options.measured:
        timelines["measured"] = Timeline.from_chrome(options.measured)
    unit = "s" if options.measured or str(options.costs or "").endswith(".json") else ""
    if not options.quiet:
        colour = sys.stdout.isatty() if options.colour is None else options.colour
        print(text_picture(plan, options.columns or shutil.get_terminal_size((100, 24)).columns, colour))
    print(title)
    print(_numbers(played))
    for path in (options.png, options.svg):
        if path:
            draw(path, timelines, title=title, unit=unit, width=options.width)
    if options.html:
        write_html(options.html, timelines, title=title, unit=unit)
    if options.perfetto:
        write_chrome(options.perfetto, timelines, 1e6 if unit else 1e3)


def _numbers(played: Simulation) -> str:
    ranks = sorted(played.order)
    lines = [
        f"makespan {played.makespan:.6g}, bubble {played.bubble:.1%}, step after step {played.repeated_bubble:.1%}",
        f"{'rank':>6} {'busy':>10} {'idle':>10} {'activations':>12} {'slots':>6}",
    ]
    lines += [
        f"{rank:>6} {played.busy(rank):>10.4g} {played.idle(rank):>10.4g} {played.activations[rank]:>12.4g} "
        f"{played.slots[rank]:>6}"
        for rank in ranks
    ]
    return "\n".join(lines)


def _costs(options: argparse.Namespace) -> Costs:
    if options.costs:
        return read_costs(options.costs)
    if getattr(options, "measured", None):
        return Timeline.from_chrome(options.measured).costs()
    return Costs()


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(_count(size) for size in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a shape: write its sizes with commas between them, as 4,512,1024"
        ) from None


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a count: give a whole number from 1")
    return int(text)


def _amount(text: str) -> int:
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([kmgt]i?|)b?", text, re.IGNORECASE)
    try:
        value = float(found[1]) * _UNITS[found[2].upper()] if found else 0.0
    except ValueError:
        value = 0.0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not an amount: write it as 80GiB, 400T or 4e14")
    return int(value)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def _schedule_name(text: str) -> str:
    """The name as the catalogue has it, whatever its case and with or without "Schedule" before it."""
    name = schedule_name(text.lower().removeprefix("schedule"))
    if name is None:
        raise ValueError(f"'{text}' is not a schedule; the schedules are {', '.join(SCHEDULE_NAMES)}.")
    return name


def _fewest_stages(name: str) -> int:
    allowed = ORDERS[name].stages_per_rank_allowed if name in ORDERS else None
    return allowed[0] if allowed else 1 if name in ("Auto", "ForwardOnly") else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pp_runtime", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = _command(commands, "show", _show, "draw the order of a schedule")
    show.add_argument("schedule", help=f"one of {', '.join(SCHEDULE_NAMES)}")
    _add_setting(show)
    show.add_argument("--cap", type=int, help="Auto: activations a rank may hold, one for each forward of a stage")
    show.add_argument("--csv", type=Path, metavar="FILE", help="write the order as torch's compute-only CSV")
    _add_pictures(show)
    comparing = _command(commands, "compare", _compare, "simulate all schedules for one model")
    _add_setting(comparing, "2 a rank; a schedule that needs another number gets the same model cut otherwise")
    comparing.add_argument(
        "--cap", type=float, help="leave out what keeps more activations than this, as the table counts"
    )
    comparing.add_argument("--no-auto", action="store_true", help="named schedules only")
    remembering = _command(commands, "memory", _memory, "say what memory a schedule's messages take on each rank")
    remembering.add_argument("schedule", help=f"one of {', '.join(SCHEDULE_NAMES)}")
    _add_setting(remembering)
    remembering.add_argument("--cap", type=int, help="Auto: as for show")
    remembering.add_argument(
        "--shape", type=_shape, nargs="+", required=True, help="of each tensor that one microbatch sends: 4,512,1024"
    )
    remembering.add_argument("--dtype", default="float32", help="of those tensors (float32)")
    _add_decoder(_command(commands, "advise", _advise, "say which schedule to take for a model, and what fits"))
    checking = _command(commands, "verify", _verify, "check the order in a CSV file")
    _add_file(checking)
    playing = _command(commands, "simulate", _simulate, "check, simulate and draw the order in a CSV file")
    _add_file(playing)
    _add_costs(playing)
    _add_pictures(playing)
    reporting = _command(commands, "report", _report, "make a page of a run that RunRecord saved, or of a trace")
    reporting.add_argument("file", type=Path, help="what RunRecord.save or Timeline.to_chrome wrote")
    reporting.add_argument("output", type=Path, nargs="?", help="the page; without it, beside the file, as .html")
    converting = _command(commands, "convert", _convert, "add sends and receives to a compute-only CSV file")
    _add_file(converting)
    converting.add_argument("output", type=Path, nargs="?", help="the file to write; without it, standard output")
    converting.add_argument("--unshard", type=int, metavar="N", help="gather sharded weights, N stages at a time")
    converting.add_argument(
        "--reduce-grad", action="store_true", help="reduce each stage's gradients after its last use"
    )
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: object, words: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=words, description=words[0].upper() + words[1:] + "."
    )
    command.set_defaults(run=run)
    return command


def _add_setting(command: argparse.ArgumentParser, stages: str = "as few as the schedule takes") -> None:
    command.add_argument("--ranks", type=_count, required=True)
    command.add_argument("--stages", type=_count, help=f"of the whole model; without it, {stages}")
    command.add_argument("--microbatches", type=_count, required=True)
    _add_costs(command)


def _add_costs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--costs",
        help="F=1,I=1,W=1,B=2,transfer=0.1, one a stage as W=1/2/1; or a JSON file of these or a trace of a run",
    )


def _add_decoder(command: argparse.ArgumentParser) -> None:
    shape = command.add_argument_group("the model, a decoder as Llama's")
    shape.add_argument("--layers", type=_count, required=True)
    shape.add_argument("--hidden", type=_count, required=True)
    shape.add_argument("--heads", type=_count, help="without it, of size 128")
    shape.add_argument("--kv-heads", type=_count, help="without it, as many as heads")
    shape.add_argument("--feed-forward", type=_count, help="without it, 8/3 of hidden, in multiples of 256")
    shape.add_argument("--vocabulary", type=_count, default=32_000, help="(%(default)s)")
    shape.add_argument("--tied", action="store_true", help="the head is the embedding")
    shape.add_argument("--recompute", action="store_true", help="layers keep their input alone, and run again")
    shape.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    batch = command.add_argument_group("a step")
    batch.add_argument("--batch", type=_count, required=True, help="sequences in it")
    batch.add_argument("--sequence", type=_count, default=4096, help="tokens in each (%(default)s)")
    batch.add_argument(
        "--microbatches", type=_count, nargs="+", default=[], help="numbers to try; without it 1, 2, 4, 8 x ranks"
    )
    batch.add_argument("--schedules", nargs="+", default=[], help="to try; without it, all")
    machine = command.add_argument_group("the machines")
    machine.add_argument("--ranks", type=_count, required=True)
    machine.add_argument("--memory", type=_amount, help="that a rank has, as 80GiB")
    machine.add_argument(
        "--flops",
        type=_amount,
        help="that a rank's device reaches in a second, as 400T; without it, times are relative",
    )
    machine.add_argument("--memory-bandwidth", type=_amount, help="bytes a second that the device reaches, as 2.5T")
    machine.add_argument("--link", type=_amount, help="bytes a second between ranks, as 40G")
    machine.add_argument("--latency", type=float, default=0.0, help="seconds that a message takes beside its bytes")
    machine.add_argument(
        "--optimizer", type=float, default=2.0, help="its state, in sizes of the parameters; Adam's is 2 (%(default)s)"
    )


def _add_file(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, help="a row a rank, in either of torch's formats")
    command.add_argument("--format", choices=("compute_only", "compute_comms"), help="without it, either")
    command.add_argument(
        "--microbatches", type=_count, help="that the order must have; without it, as many as it names"
    )


def _add_pictures(command: argparse.ArgumentParser) -> None:
    for kind in ("png", "svg", "html", "perfetto"):
        command.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"write the timeline as {kind}")
    command.add_argument("--measured", metavar="TRACE", help="a trace of a run, drawn beside the plan (and its costs)")
    command.add_argument(
        "--width", type=_count, metavar="PIXELS", help="of png and svg; without it, what the numbers need up to 2000"
    )
    command.add_argument(
        "--columns", type=_count, help="characters a line in the terminal; without it, as many as it has"
    )
    command.add_argument("--colour", action=argparse.BooleanOptionalAction, help="without it, in terminals")
    command.add_argument("--quiet", action="store_true", help="no picture in the terminal")


if __name__ == "__main__":
    sys.exit(main())
