"""What docstrings have of reStructuredText, as Markdown: names of objects, and blocks of code after two colons.

An object is named as in :class:`pp_runtime.timing.Costs`; in the reference such a name is a link to the object.

A name without a package means what it means where the docstring stands. A name that leads nowhere is a warning, which
`mkdocs build --strict` makes an error.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")
_BEFORE_CODE = re.compile(r"::(?=\n\n    )")
_PACKAGE = "pp_runtime"


class DocstringsAsMarkdown(griffe.Extension):
    """Changes docstrings before anything is rendered."""

    def on_object(self, *, obj: griffe.Object, **_kwargs: Any) -> None:
        """Called once for each object whose source was read."""
        if obj.docstring is not None:
            text = _ROLE.sub(lambda match: _link(obj, match[1]), obj.docstring.value)
            obj.docstring.value = _BEFORE_CODE.sub(":", text)


def _link(obj: griffe.Object, name: str) -> str:
    if name.startswith(f"{_PACKAGE}."):
        return f"[`{name.rpartition('.')[2]}`][{name}]"
    if name.startswith("."):
        room = obj.module.parent or obj.package
        return f"[`{name.removeprefix('.')}`][{room.path}{name}]"
    first, dot, rest = name.partition(".")
    try:
        path = obj.resolve(first)
    except griffe.NameResolutionError:
        path = first  # found nowhere, which the build says
    return f"[`{name}`][{path}{dot}{rest}]"
