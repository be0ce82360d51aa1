"""The module of one traced stage: a graph that is called as its model's user names things."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from pp_runtime.splitting.outline import outline

Binding = Callable[[tuple[Any, ...], dict[str, Any]], tuple[torch.Tensor, ...]]
"""Makes the arguments of a call the inputs of the graph."""


class BindsInputs(fx.graph.CodeGen):
    """Makes a stage's forward take its inputs as the model's user names them."""

    def __init__(self, binding: Binding) -> None:
        super().__init__()
        self.binding = binding

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_options: Any) -> str:
        names = ", ".join(name.split(":")[0].split("#")[0].strip() for name in free_vars if name != "self")
        bound = f"{names}, = " if names else ""
        return (
            f"def {self._func_name}(self, *args, **kwargs){maybe_return_annotation}:\n"
            f"    {bound}_pp_bind_inputs(args, kwargs)"
        )

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [("_pp_bind_inputs", self.binding)]


class _MarksTemporary:
    """Makes buffers of a module those that its state dict leaves out, which a copy of a graph module forgets."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def __call__(self, module: torch.nn.Module) -> None:
        for path in self.names:
            _mark(module, path)


class StageModule(fx.GraphModule):
    """A stage of a traced model, with the model's modules in it and its names."""

    def traced_in(self, training: bool) -> None:
        """Say in which mode the model was traced, which is the one that this module computes in."""
        self.meta["traced_in"] = training
        super().train(training)

    def train(self, mode: bool = True) -> StageModule:
        """Set the mode, of which the graph takes no notice. Warns where that matters."""
        if mode is not self.meta.get("traced_in", mode) and any(map(_depends_on_mode, self._all_nodes())):
            was, now = ("train", "eval")[mode], ("eval", "train")[mode]
            warnings.warn(
                f"this stage was traced in {was} mode and computes as in it, dropout and batch norm included, whatever "
                f"{now}() says: trace the model again in {now} mode for that",
                stacklevel=2,
            )
        return super().train(mode)

    def _all_nodes(self) -> Iterator[fx.Node]:
        for module in self.modules():
            if isinstance(module, fx.GraphModule):
                yield from module.graph.nodes


def _depends_on_mode(node: fx.Node) -> bool:
    """Whether a node is of an operator that takes its part of the mode as a constant, or one that draws numbers."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    arguments = target._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    given |= dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
    if (probability := given.get("p", given.get("dropout_p"))) is not None:
        return probability != 0
    return bool(given.keys() & {"train", "training"}) or torch.Tag.nondeterministic_seeded in target.tags


def stage_module(root: torch.nn.Module, graph: fx.Graph, temporary: Iterable[str]) -> StageModule:
    """A graph with what it reads of ``root``, as a module; ``temporary`` buffers stay out of its state dict."""
    names = frozenset(temporary)
    for path in names & {name for name, _ in root.named_buffers(remove_duplicate=False)}:
        _mark(root, path)

    def inner(state: torch.nn.Module, part: fx.Graph) -> fx.GraphModule:
        return _with_marks(fx.GraphModule(state, part), state)

    outlined = outline(root, graph, inner)
    return _with_marks(StageModule(root, outlined), root)


def _with_marks(module: Any, state: torch.nn.Module) -> Any:
    """Make buffers temporary that are so in ``state``, in the module and in copies of it."""
    held = {
        f"{path}.{name}".lstrip(".")
        for path, part in state.named_modules()
        for name in part._non_persistent_buffers_set
    }
    mark = _MarksTemporary(frozenset(held & {name for name, _ in module.named_buffers(remove_duplicate=False)}))
    mark(module)
    module._register_deepcopy_hook(mark)
    return module


def _mark(module: torch.nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    module.get_submodule(parent)._non_persistent_buffers_set.add(name)
