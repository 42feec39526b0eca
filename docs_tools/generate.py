"""What the pages have from the code: every block between `<!-- made: NAME -->` and `<!-- end of NAME -->`, in README.md and docs/.
The map of files in docs/architecture.md is written by hand, and brought to 100 columns here.

python -m docs_tools.generate            # write them
python -m docs_tools.generate --check    # write nothing; fail where a page is not what the code says
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

from docs_tools import cards, commands, gallery, reference
from dwl_plugin.hosts.incompatible import refusal_table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

MAP = re.compile(r"<!-- files -->.*?<!-- end of files -->", re.DOTALL)
BLOCK = re.compile(r"<!-- made: (\w+) -->\n.*?<!-- end of \1 -->", re.DOTALL)


BLOCKS: Mapping[str, Callable[[], str]] = {
    **reference.TABLES,
    "packs": gallery.pack_table,
    "pack_gallery": gallery.pack_gallery,
    "example_gallery": gallery.example_gallery,
    "refusals": refusal_table,
    "memory_choice": cards.choice_table,
    "memory_qlora": cards.qlora_table,
    "memory_full": cards.full_table,
    "memory_measured": cards.measured_table,
    "command_table": commands.command_table,
    "commands": commands.command_sections,
}


def wrapped(tree: str) -> str:
    """A tree of files, each with a column of words beside it."""
    column = re.search(r"(?<=\S)  +(?=\S)", tree)
    assert column is not None
    indent = " " * (column.end() - tree.rindex("\n", 0, column.end()) - 1)
    whole = re.sub(rf"\n{indent} *(?=\S)", " ", tree)
    fill = textwrap.TextWrapper(100, subsequent_indent=indent, break_on_hyphens=False).fill
    return re.sub(r"^ .*", lambda line: fill(line[0]), whole, flags=re.MULTILINE)


def filled(page: Path) -> str:
    """The text of a page with its blocks as they should be."""

    def fill(match: re.Match[str]) -> str:
        if match[1] not in BLOCKS:
            sys.exit(f"{page.relative_to(ROOT)}: nothing makes {match[1]}; there are: {', '.join(BLOCKS)}")
        return f"<!-- made: {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end of {match[1]} -->"

    text = BLOCK.sub(fill, page.read_text(encoding="utf-8"))
    return MAP.sub(lambda match: wrapped(match[0]), text)


def main() -> None:
    stale = [page for page in PAGES if filled(page) != page.read_text(encoding="utf-8")]
    if "--check" in sys.argv[1:]:
        sys.exit(f"python -m docs_tools.generate would change {', '.join(page.name for page in stale)}" if stale else None)
    for page in stale:
        page.write_text(filled(page), encoding="utf-8")
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
