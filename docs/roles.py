"""Lets Markdown show what docstrings say for help(): options have their texts, roles are code."""

from __future__ import annotations

import re
from typing import Any

import griffe

from fused_ema.optim.options import composed

ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):`~?(?:[\w.]*\.)?(\w+)`")


class Roles(griffe.Extension):
    """Turns each role, as in ``:class:`~fused_ema.FusedEMA```, into code with its last name."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of what was read."""
        if obj.docstring is not None:
            text = composed(obj.docstring.value)
            obj.docstring.value = ROLE.sub(r"`\1`", text).replace("``", "`")
