"""What README.md and the other pages show: their blocks of code, and the commands in them and in their sentences."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["PAGES", "ROOT", "Block", "blocks", "commands", "files_of", "text_of"]

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "bench").rglob("*.md")),
]

_FENCED = re.compile(
    r"(?:^ *<!-- under: (?P<under>\S+) -->\n)?^(?P<indent> *)```(?P<language>\w*)[^\n`]*\n(?P<text>.*?)^(?P=indent)``` *$",
    re.MULTILINE | re.DOTALL,
)
_NAMED = re.compile(r"# ([\w./-]+\.\w+)\b")
_INLINE = re.compile(r"(?<!`)`((?:dwl|axolotl|uv|uvx|pip|python|\.ci/\w+|bench/gpu/run) [^`\n]+)`(?!`)")

_SHELL = ("", "bash", "sh", "console")
_COMMAND = re.compile(r"dwl|axolotl|pip|uvx?|python3?|git|cd|wandb|(?:\.ci|bench)/[\w/]+")
"""What a line begins with that is to be typed, in a block that may as well be output."""


class Block(NamedTuple):
    """`under` is where a fragment of YAML belongs: `<!-- under: dwl -->` on the line before it."""

    page: Path
    line: int
    language: str
    text: str
    under: str | None = None

    @property
    def name(self) -> str | None:
        """Of the file that it shows, where its first line has one."""
        named = _NAMED.match(self.text)
        return named[1] if named else None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """`whole`: it stands in a block of its own, to be typed as it is; a sentence may name a command without its arguments."""

    where: str
    words: list[str]
    whole: bool

    @property
    def program(self) -> str:
        """What is called, behind the variables that are set for it."""
        return next((word for word in self.words if not re.match(r"\w+=", word)), "")

    def __str__(self) -> str:
        return f"{self.where} {' '.join(self.words)}"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page, or those in these languages."""
    text = text_of(page)
    found = []
    for match in _FENCED.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        inside = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        found.append(Block(page, line, match["language"], inside, match["under"]))
    return [block for block in found if not languages or block.language in languages]


def files_of(page: Path) -> dict[str, str]:
    """The files that a page shows, by name; a pack without one is the reader's `my_pack.yml`."""
    found = {}
    for block in blocks(page):
        if block.name:
            found[block.name] = block.text
        elif block.language == "yaml" and re.match(r"description:", block.text):
            found["my_pack.yml"] = block.text
    return found


def commands(page: Path) -> list[Command]:
    """Every command line of a page, `&&`, `|` and redirections taken apart."""
    found = []
    for block in blocks(page, *_SHELL):
        for line in block.text.replace("\\\n", " ").splitlines():
            of_line = [Command(str(block), words, True) for words in _split(line.removeprefix("$ "))]
            found += [command for command in of_line if block.language or _COMMAND.fullmatch(command.program)]
    sentences = _FENCED.sub("", text_of(page))
    for match in _INLINE.finditer(sentences):
        found += [Command(str(page.relative_to(ROOT)), words, False) for words in _split(match[1].replace("\\|", "|"))]
    return found


def _split(line: str) -> Iterator[list[str]]:
    """Simple commands in a line of shell; of what is none, such as the output of one, nothing."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        tokens = list(lexer)
    except ValueError:
        return
    words: list[str] = []
    skip = False
    for token in [*tokens, ";"]:
        if set(token) <= set("&|;"):
            if words:
                yield words
            words = []
        elif token == ">":
            skip = True
        elif skip:
            skip = False
        else:
            words.append(token)
