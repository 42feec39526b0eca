"""The line under `plugins:` that switches this package on, and what people write in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dwl_plugin.errors import Problem, did_you_mean

__all__ = ["LINE", "named_right", "names_plugin"]

LINE = "dwl_plugin.DWLPlugin"
_ALSO_RIGHT = ("dwl_plugin.hosts.axolotl.DWLPlugin",)
_PACKAGE = ("dwl_plugin", "axolotl_dwl", "axolotl-dwl")


def names_plugin(config: Mapping[str, Any]) -> bool:
    """Whether `plugins` has a line of ours."""
    return any("dwl_plugin" in str(name) for name in config.get("plugins") or ())


def named_right(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """A config with `LINE` where it names this plugin wrongly, and one problem for each such name."""
    whole, problems = raw.get("plugins"), list[Problem]()
    if isinstance(whole, str):
        name = LINE if _is_meant(whole) else whole
        problems.append(Problem("plugins", "is a list, and this is one name", whole, hint=f"write `plugins: [{name}]`"))
        return {**raw, "plugins": [name]}, problems
    names = list(whole) if isinstance(whole, list) else []
    for index, name in enumerate(names):
        if isinstance(name, str) and name.replace(":", ".") not in (LINE, *_ALSO_RIGHT) and _is_meant(name):
            names[index] = LINE
            problems.append(Problem(f"plugins[{index}]", "is not the name of this plugin", name, hint=f"write `- {LINE}`"))
    return {**raw, "plugins": names} if problems else dict(raw), problems


def _is_meant(name: str) -> bool:
    return name.partition(".")[0] in _PACKAGE or bool(did_you_mean(name, [LINE]))
