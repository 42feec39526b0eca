"""Links of docs/ are those of the repository, and the site needs nothing beside it.

A link out of docs/ becomes one to a copy below `repository/`: Markdown is a page like the others, other text a page that shows it,
a folder a list of what is in it, and a picture is itself. Where Python's Markdown reads something otherwise
than GitHub's, it is written so that both read the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)#\s]+")
FENCED = re.compile(r"^( *)(```+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
LIST_AT_ONCE = re.compile(r"^((?![-*+] |\d+\. |[\s|<#]).*\n)(?=- |1\. )", re.MULTILINE)
"""A line of a paragraph, and a list behind it without a blank line."""
ROW = re.compile(r"^\|.*$", re.MULTILINE)
CODE = re.compile(r"`[^`\n]+`")
LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".toml": "toml", ".json": "json", "": "bash"}


def on_config(config: Any) -> None:
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")  # the anchors of GitHub


def on_files(files: Files, config: Any) -> None:
    pages = [DOCS / file.src_uri for file in files.documentation_pages()]
    known = set(pages)
    for page in pages:  # which grows
        for target in sorted(set(_targets(page)) - known):
            known.add(target)
            if target.is_dir() or not target.is_relative_to(DOCS):
                files.append(_copy(target, config))
                pages += [target] if target.suffix == ".md" else []


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    uri = page.file.src_uri
    here = ROOT / uri.removeprefix("repository/") if uri.startswith("repository/") else DOCS / uri

    def to_site(match: re.Match[str]) -> str:
        target = _target(here, match[0])
        return os.path.relpath(_uri(target), os.path.dirname(uri)) if target.exists() else match[0]

    def adapted(part: str) -> str:
        part = LIST_AT_ONCE.sub(r"\1\n", LINK.sub(to_site, part))
        return ROW.sub(lambda row: CODE.sub(lambda code: code[0].replace(r"\|", "|"), row[0]), part)

    return "".join(part if is_code else adapted(part) for is_code, part in _parts(markdown))


def _parts(markdown: str) -> Iterator[tuple[bool, str]]:
    """Fenced code, and what is between."""
    end = 0
    for match in FENCED.finditer(markdown):
        yield False, markdown[end : match.start()]
        yield True, match[0]
        end = match.end()
    yield False, markdown[end:]


def _target(page: Path, link: str) -> Path:
    target = (page.parent / link).resolve()
    return target / "README.md" if (target / "README.md").exists() else target


def _targets(page: Path) -> Iterator[Path]:
    for is_code, part in _parts(page.read_text(encoding="utf-8")):
        if not is_code and page.suffix == ".md":
            yield from filter(Path.exists, (_target(page, link) for link in LINK.findall(part)))


def _uri(target: Path) -> str:
    """Where a file of the repository is among the sources of the site."""
    if target.is_relative_to(DOCS) and target.is_file():
        return target.relative_to(DOCS).as_posix()
    uri = f"repository/{target.relative_to(ROOT).as_posix()}"
    if target.is_dir():
        return f"{uri}/index.md"
    return uri if target.suffix in (".md", ".png", ".svg") else f"{uri}.md"


def _copy(target: Path, config: Any) -> File:
    uri, hidden = _uri(target), InclusionLevel.NOT_IN_NAV
    if target.suffix in (".md", ".png", ".svg"):
        return File.generated(config, uri, abs_src_path=str(target), inclusion=hidden)
    name = target.relative_to(ROOT).as_posix()
    if target.is_dir():
        names = sorted(path.name for path in target.iterdir() if not path.name.startswith((".", "__")))
        as_links = target.is_relative_to(DOCS)
        shown = "\n".join(f"- [{name}]({name})" if as_links else f"- `{name}`" for name in names)
    else:
        shown = f"`````{LANGUAGES.get(target.suffix, '')}\n{target.read_text(encoding='utf-8').rstrip()}\n`````"
    text = f"---\nsearch: {{exclude: true}}\n---\n\n# {name}\n\n{shown}\n"
    return File.generated(config, uri, content=text, inclusion=hidden)
