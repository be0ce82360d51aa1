"""Models made without their weights: parameters on the meta device, buffers as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary


@contextmanager
def without_weights() -> Iterator[None]:
    """Within it, parameters that modules are given go to the meta device, where they take no memory; buffers stay.

        with without_weights():
            model = Model(config)

    So made, a model of any size is cut by :func:`pp_runtime.layer_stages` or :func:`pp_runtime.build_pipeline`, whose
    ``weights`` fill what each rank keeps. ``torch.device("meta")`` makes buffers without values, too, which is refused
    for those that checkpoints do not hold, such as rotary tables. Parameters that modules share stay shared;
    ``requires_grad`` and attributes are kept. Parameters of classes of their own are left as they are. It holds for all
    threads, as torch's hook of parameters does.
    """
    made = WeakIdKeyDictionary()

    def leave_out(module: nn.Module, name: str, parameter: Tensor | None) -> Any:
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            return None
        if parameter not in made:
            made[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            vars(made[parameter]).update(vars(parameter))
        return made[parameter]

    handle = register_module_parameter_registration_hook(leave_out)
    try:
        yield
    finally:
        handle.remove()
