"""What the pages of `inspect` and `report` have in common: each is one file that asks the network for nothing.

The templates escape all they are given. A page's own script is named by its hash in its content security policy, so a browser would
run no other.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from importlib import resources
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

__all__ = ["render"]


def render(
    package: str, *, filters: Mapping[str, Callable[[Any], str]] | None = None, more_style: str = "", **values: object
) -> str:
    """`page.html.j2` of `package` as text, with the styles of all pages, its `page.css` and its `page.js` in it."""
    own = resources.files(package)
    style = resources.files("dwl_plugin.cli").joinpath("page.css").read_text(encoding="utf-8")
    style += own.joinpath("page.css").read_text(encoding="utf-8") + more_style
    script = own.joinpath("page.js").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters or {}
    return environment.from_string(own.joinpath("page.html.j2").read_text(encoding="utf-8")).render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=version("axolotl-dwl"),
        **values,
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
