"""``torch.compile(module, backend="pp_runtime")``: any compiler, with backwards that split schedules can halve."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from pp_runtime.errors import PipelineUsageError

COMPILERS = ("inductor", "aot_eager")


def compile_backend(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """A backend for ``torch.compile`` whose backwards zero-bubble schedules cut in two.

    Forward and unsplit backward are the compiler's, as without it. Where a schedule has I and W as actions of their
    own, the backward graph is cut: dI makes the input gradients and keeps what dW reads, dW the weight gradients. Both
    are compiled by the same compiler, when a schedule first asks.

    Args:
        mode: of Inductor, as in ``torch.compile``.
        options: ``compiler`` says what compiles the graphs: "inductor" (the default), "aot_eager" (nothing does: each
            operator runs as it is; for tests), or a function ``(graph, example_inputs) -> callable`` of your own, which
            gets forward, whole backward, dI and dW alike. All other options are Inductor's.

    Raises PipelineUsageError for a compiler that it does not know, and for Inductor's options with another.
    """
    options = dict(options or {})
    compiler = options.pop("compiler", "inductor")
    if compiler == "inductor":
        return _with_inductor(graph, inputs, mode, options)
    if mode is not None or options:
        raise PipelineUsageError(
            f"mode and {', '.join(options) or 'options'} are Inductor's, not those of {compiler!r}: leave them out"
        )
    if compiler == "aot_eager":
        return _with_function(_as_it_is, graph, inputs)
    if callable(compiler):
        return _with_function(compiler, graph, inputs)
    raise PipelineUsageError(
        f"the pp_runtime backend knows the compilers {', '.join(COMPILERS)} and functions (graph, inputs) -> callable, "
        f"not {compiler!r}"
    )


def _as_it_is(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
    from torch._dynamo.backends.debugging import boxed_nop

    return boxed_nop(graph, [])


def _with_function(
    compile_graph: Callable[..., Any], graph: fx.GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    from pp_runtime.running.compiled.backward import SplittableBackward, boxed

    return aot_autograd(
        fw_compiler=lambda graph, inputs: boxed(compile_graph(graph, inputs)),
        bw_compiler=lambda graph, inputs: SplittableBackward(graph, inputs, compile_graph, compile_graph),
        partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )(graph, inputs)


def _with_inductor(
    graph: fx.GraphModule, inputs: Sequence[Any], mode: str | None, options: dict[str, Any]
) -> Callable[..., Any]:
    from torch._functorch import config as functorch_config
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode is not None else {}), **options}
    # A region found in AOTAutograd's own cache comes with a backward that is code already. Inductor's cache, which
    # holds what takes long, serves forward, backward and both halves.
    with functorch_config.patch(enable_autograd_cache=False):
        compiled: Any = compile_fx(graph, inputs, inner_compile=_compile_with_inductor, config_patches=patches or None)
    return compiled


def _compile_with_inductor(graph: fx.GraphModule, inputs: Sequence[Any], **how: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.utils import BoxedBool

    from pp_runtime.running.compiled.backward import SplittableBackward

    if not how.get("is_backward"):
        return compile_fx_inner(graph, inputs, **how)
    whole = functools.partial(compile_fx_inner, **how)
    # A recorded CUDA graph writes its results where its last run did; a half's live on while other microbatches run.
    half = functools.partial(compile_fx_inner, **{**how, "cudagraphs": BoxedBool(False), "static_input_idxs": ()})
    return SplittableBackward(graph, inputs, whole, half)


def compile_module(module: nn.Module, **options: Any) -> None:
    """Compile the module's call in place; its parameters keep their names. ``options`` are those of ``torch.compile``.

    ``nn.Module.compile`` does so too, but what it is given is skipped without a word where the module is one of
    torch's own, an ``nn.Sequential`` for one.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    module._compiled_call_impl = torch.compile(call, **{"backend": compile_backend, **options})
