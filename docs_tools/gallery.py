"""What the pages show of packs and of the example configs, made of the files themselves."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from docs_tools.reference import table
from dwl_plugin.cli.packs import read
from dwl_plugin.cli.packs.pages import LEGEND, cell, section, weights
from dwl_plugin.config.pack_files import shipped_packs

__all__ = ["example_gallery", "pack_gallery", "pack_table"]

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "example_configs"

_COLUMNS = 100


def pack_table() -> str:
    """A line for each pack that comes with the plugin."""
    rows = []
    for name in shipped_packs():
        pack = read(name)
        *members, rest = weights(pack)
        rows.append((f"`{name}`", f"{', '.join(members)}; {rest}", cell(pack.description)))
    return table(("pack", "members, with the suggested α", ""), rows)


def pack_gallery() -> str:
    """Each of them with its classes, an example out of its cases, and its sources."""
    return "\n\n".join([LEGEND, *(f"### {name}\n\n{section(read(name), name)}" for name in shipped_packs())])


def example_gallery() -> str:
    """Each example config: what it is for, what it needs, its loss."""
    return "\n\n".join(map(_example, sorted(EXAMPLES.rglob("*.yml"))))


def _example(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    said = dict(re.findall(r"^# (What for|Needs): +(.*\n(?:#  .*\n)*)", text, re.MULTILINE))
    purpose, needs = (cell(re.sub(r"\n# +", " ", said[key])) for key in ("What for", "Needs"))
    says = f"{purpose[:1].upper()}{purpose[1:]}\n\nNeeds {needs}"
    loss = "".join(re.findall(r"^(?:loss|dft|dwl):.*\n(?:[ #].*\n)*", text, re.MULTILINE))
    lines = "\n".join(line for written in loss.splitlines() for line in _narrow(written))
    name = path.relative_to(ROOT).as_posix()
    return f"### {path.stem}\n\n{says}\n\n```yaml\n{lines}\n```\n\n[`{path.name}`](../{name})"


def _narrow(line: str) -> Iterator[str]:
    """A line of YAML; its comment goes above it where both are too long for a page."""
    code, mark, comment = line.partition("  # ")
    if mark and len(line) > _COLUMNS:
        indent = re.match(" *", code)[0]  # type: ignore[index]
        yield from textwrap.wrap(comment, _COLUMNS, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        line = code.rstrip()
    yield line
