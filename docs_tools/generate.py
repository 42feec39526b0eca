"""What the pages have from the code: every block between `<!-- made: NAME -->` and `<!-- end of NAME -->`, in README.md and docs/.

python -m docs_tools.generate            # write them
python -m docs_tools.generate --check    # write nothing; fail where a page is not what the code says
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from docs_tools import commands, reference
from docs_tools.reference import cell, table
from dwl_plugin.config.pack_files import PackReference, read_pack, shipped_packs
from dwl_plugin.config.packs import parse_pack
from dwl_plugin.hosts.incompatible import refusal_table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(r"<!-- made: (\w+) -->\n.*?<!-- end of \1 -->", re.DOTALL)


def packs() -> str:
    rows = []
    for name in shipped_packs():
        pack = parse_pack(read_pack(PackReference.of(name, ""), None, ""))
        alpha = pack.alpha or {}
        members = [f"`{member}` {alpha[member]:g}" if alpha else f"`{member}`" for member in (*pack.classes, "rest")]
        rows.append((f"`{name}`", f"{', '.join(members[:-1])}; {members[-1]}", cell(pack.description)))
    return table(("pack", "members, with the suggested α", ""), rows)


BLOCKS: Mapping[str, Callable[[], str]] = {
    **reference.TABLES,
    "packs": packs,
    "refusals": refusal_table,
    "command_table": commands.command_table,
    "commands": commands.command_sections,
}


def filled(page: Path) -> str:
    """The text of a page with its blocks as they should be."""

    def fill(match: re.Match[str]) -> str:
        if match[1] not in BLOCKS:
            sys.exit(f"{page.relative_to(ROOT)}: nothing makes {match[1]}; there are: {', '.join(BLOCKS)}")
        return f"<!-- made: {match[1]} -->\n{BLOCKS[match[1]]()}\n<!-- end of {match[1]} -->"

    return BLOCK.sub(fill, page.read_text(encoding="utf-8"))


def main() -> None:
    stale = [page for page in PAGES if filled(page) != page.read_text(encoding="utf-8")]
    if "--check" in sys.argv[1:]:
        sys.exit(f"python -m docs_tools.generate would change {', '.join(page.name for page in stale)}" if stale else None)
    for page in stale:
        page.write_text(filled(page), encoding="utf-8")
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
