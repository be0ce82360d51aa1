"""The order of a schedule: built from the catalogue, assigned in torch's form, or loaded from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from pp_runtime.errors import InvalidOrderError, PipelineModeError, PipelineUsageError
from pp_runtime.orders import (
    Action,
    FileFormat,
    Order,
    Placement,
    build_order,
    dump_order,
    from_torch_form,
    ir,
    leaves,
    load_order,
    named_order,
    placement_of,
    to_torch_form,
)
from pp_runtime.planning import (
    defer_receives,
    insert_communication,
    insert_reduce_grad,
    insert_unshard,
    verify,
    verify_communication,
)
from pp_runtime.running import refusals_of
from pp_runtime.schedules.fields import ScheduleFields

TorchOrder = dict[int, list[Action | None]]


class OrderHolder(ScheduleFields):
    """Holds one order at a time, and shows it in torch's forms.

    An order of the catalogue is kept as it is; its torch form, with None for idle steps, is only made when asked for.
    An order that the user assigns is kept in the form it was given in and read when the next step needs it, so that
    it may be filled in after it was assigned, rank by rank, as torch's own subclasses do.
    """

    def __init__(self) -> None:
        super().__init__()
        self._order: Order | None = None
        self._rebuild: Callable[[], Order] | None = None
        self._placement: Placement = ()
        self._given: TorchOrder | None = None
        self._given_with_comms: Mapping[int, Sequence[Action]] | None = None
        self._shown: TorchOrder | None = None
        self.stage_index_to_group_rank: dict[int, int] = {}

    @property
    def pipeline_order(self) -> TorchOrder:
        """Each rank's compute actions, None for a step in which it idles. Assigning replaces the order."""
        if self._given is not None:
            return self._given
        if self._shown is None:
            order = self._own_order()
            self._shown = {} if order is None else self._torch_form(order)
        return self._shown

    @pipeline_order.setter
    def pipeline_order(self, order: TorchOrder) -> None:
        self._given, self._given_with_comms = order, None
        self._order_changed()

    @property
    def pipeline_order_with_comms(self) -> dict[int, list[Action]]:
        """Each rank's actions with sends, receives, unshards, reshards and gradient reductions."""
        if self._given_with_comms is not None:
            return {rank: list(actions) for rank, actions in self._given_with_comms.items()}
        order, _ = self._order_to_run()
        order = insert_communication(insert_reduce_grad(insert_unshard(order)), self._placement)
        return defer_receives(order) if self._defer_pp_recv else order

    @pipeline_order_with_comms.setter
    def pipeline_order_with_comms(self, order: Mapping[int, Sequence[Action]]) -> None:
        self._given_with_comms = order
        self._order_changed()

    def _build_order(self) -> tuple[Order, Placement] | None:
        """The order and the placement of the stages; None where a file or an assignment will bring them."""
        return None if self._order_name is None else build_order(self._order_name, *self._counts())

    def _order_builder(self) -> Callable[[], Order] | None:
        """What builds the order once more; None where it must be kept. Holds no stage."""
        return None if self._order_name is None else partial(named_order, self._order_name, *self._counts())

    def _counts(self) -> tuple[int, int, int]:
        """Ranks, stages, microbatches."""
        return self._stages[0].group_size, self._stages[0].num_stages, self._n_microbatches

    def _torch_form(self, order: Order) -> TorchOrder:
        return to_torch_form(order)

    def _take_own_order(self) -> bool:
        """Build the order that the class stands for, if it does for one; what can be built again need not be kept."""
        built = self._build_order()
        if built is None:
            return False
        self._order, placement = built
        self._rebuild = self._order_builder()
        self._place(placement)
        return True

    def _own_order(self) -> Order | None:
        if self._order is None and self._rebuild is not None:
            return self._rebuild()
        return self._order

    def _forget_order(self) -> None:
        """Keep only what can build the order again: a long run of many ranks needs no more than this rank's program."""
        if self._rebuild is not None:
            self._order = self._shown = None

    def _place(self, placement: Placement) -> None:
        self._placement = placement
        self.stage_index_to_group_rank = dict(enumerate(placement))
        for stage in self._stages:
            stage.stage_index_to_group_rank = self.stage_index_to_group_rank

    def _order_is_known(self) -> bool:
        return bool(self._order or self._rebuild or self._given or self._given_with_comms)

    def _order_to_run(self) -> tuple[Order, bool]:
        """The order, and whether it has sends and receives; one that the user gave is checked here."""
        if self._given_with_comms is not None:
            order = {rank: list(actions) for rank, actions in self._given_with_comms.items()}
            self._prove(order, with_comms=True)
            return order, True
        if self._given is not None:
            order = from_torch_form(self._given)
            self._prove(order, with_comms=False)
            return order, False
        own = self._own_order()
        if own is None:
            raise PipelineModeError(
                f"{type(self).__name__} has no order of its own: load one with _load_csv(file), assign pipeline_order, "
                "or use a named schedule, such as get_schedule_class('1F1B')"
            )
        return own, False

    def _prove(self, order: Order, *, with_comms: bool) -> None:
        """Raise unless the order is complete and free of deadlock; else take its placement of the stages."""
        stages, group_size = self._stages[0].num_stages, self._stages[0].group_size
        try:
            placement = placement_of(order)
        except ValueError as error:
            raise InvalidOrderError(str(error)) from error
        if len(placement) != stages or max(placement, default=0) >= group_size:
            raise InvalidOrderError(
                f"the order is for {len(placement)} stages on {max(placement, default=-1) + 1} ranks, but this "
                f"pipeline has {stages} stages on {group_size} ranks: use an order made for this pipeline"
            )
        check = verify_communication if with_comms else verify
        check(order, placement, self._n_microbatches, forward_only=not has_backwards(order.values()))
        self._place(placement)

    def _order_changed(self) -> None:
        """Called when the next step must be planned anew."""

    # Files

    def _load_csv(self, filename: str, format: FileFormat = "compute_only") -> None:
        """Take the order from a file in one of torch's two formats; it also says which rank has which stages."""
        with refusals_of(self._stages[0]):
            self._take_order(load_order(filename, format), format)

    def _take_order(self, actions: Mapping[int, Sequence[Action | None]], format: FileFormat) -> None:
        """Take an order in one of torch's two forms; one that cannot run leaves the schedule as it was."""
        _check_format(format)
        before = self._given, self._given_with_comms
        if format == "compute_only":
            self._given, self._given_with_comms = {rank: list(row) for rank, row in actions.items()}, None
        else:
            self._given_with_comms = from_torch_form(actions)
        try:
            self._order_to_run()
        except Exception:
            self._given, self._given_with_comms = before
            raise
        self._order_changed()

    def _dump_csv(self, filename: str, format: FileFormat = "compute_only") -> None:
        """Write the order to a file in one of torch's two formats."""
        _check_format(format)
        order = self.pipeline_order if format == "compute_only" else self.pipeline_order_with_comms
        dump_order(filename, order)


def _check_format(format: str) -> None:
    if format not in ("compute_only", "compute_comms"):
        raise PipelineUsageError(f"format must be 'compute_only' or 'compute_comms', got {format!r}")


def has_backwards(rows: Iterable[Iterable[Action]]) -> bool:
    """Whether any of some ranks' actions is a backward."""
    backwards = (ir.FULL_BACKWARD, ir.BACKWARD_INPUT, ir.BACKWARD_WEIGHT)
    return any(action.computation_type in backwards for row in rows for action in leaves(row))
