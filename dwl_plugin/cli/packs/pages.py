"""A pack in Markdown: for the card of its repository on the Hub, and for the gallery of the documentation."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from itertools import groupby

import regex

from dwl_plugin.config.pack_cases import class_of_bytes
from dwl_plugin.config.packs import Pack, PackCase
from dwl_plugin.errors import printable
from dwl_plugin.values import IGNORE_INDEX, REST

__all__ = ["LEGEND", "card", "cell", "section", "weights"]

LEGEND = "What a class takes is marked, with its name behind it; what stands in italics is the prompt, which is not trained."

_LONGEST = 600
"""Characters of an example, if any case has as few."""

_IN_PRE = str.maketrans({"`": "&#96;", "]": "&#93;"})
"""What some reader of Markdown takes for a fence or a link, also inside of HTML."""


def card(pack: Pack, name: str, address: str) -> str:
    """The README.md of a repository with the pack."""
    return f"""---
tags: [axolotl-dwl, token-weights]
---

# {cell(name)}

{section(pack, address)}

{LEGEND}

The commit is under `Files`, `History`. A pack is for [axolotl-dwl](https://pypi.org/project/axolotl-dwl/): classes of tokens, and
what each of them counts in the loss of supervised fine-tuning.
"""


def section(pack: Pack, name: str) -> str:
    """Description, classes with the suggested α, the line of YAML, an example, sources."""
    parts = [cell(pack.description), _table(pack), f"```yaml\nloss: dwl\ndwl: {{pack: {_quoted(name)}}}\n```"]
    if cases := [case for case in pack.tests if any(case.spans.values())]:
        parts.append(f"<pre><code>{_marked(pack, _example(cases))}</code></pre>")
    if pack.sources:
        parts.append("Sources: " + ", ".join(f"<{source}>" if _is_plain(source) else cell(source) for source in pack.sources))
    return "\n\n".join(parts)


def weights(pack: Pack) -> list[str]:
    """Each class with the suggested α, `rest` last."""
    alpha = pack.alpha or {}
    return [f"`{name}` {alpha[name]:g}" if name in alpha else f"`{name}`" for name in (*pack.classes, REST)]


def cell(text: str) -> str:
    """Text in one line, in a cell of a table too, that is no Markdown but its code."""
    parts = regex.split(r"(`[^`]*`)", printable(" ".join(text.split())))
    plain = [part if part.startswith("`") else regex.sub(r"([\\*_\[\]<>#])", r"\\\1", part) for part in parts]
    return "".join(plain).replace("|", "\\|")


def _table(pack: Pack) -> str:
    head = "| class | α |\n|---|---:|" if pack.alpha else "| class |\n|---|"
    rows = [f"| `{name}` | {pack.alpha[name]:g} |" if pack.alpha else f"| `{name}` |" for name in (*pack.classes, REST)]
    return "\n".join([head, *rows])


def _quoted(name: str) -> str:
    return f"'{name}'" if regex.search(r"[^\w./@:-]|: ", name) else name


def _is_plain(source: str) -> bool:
    return regex.fullmatch(r"[^\s<>]+", source) is not None


def _example(cases: Iterable[PackCase]) -> PackCase:
    """The first of those that show most classes."""

    def size(case: PackCase) -> int:
        return sum(len(turn.prompt) + len(turn.text) for turn in case.sample)

    return min(cases, key=lambda case: (size(case) > _LONGEST, -sum(map(bool, case.spans.values()))))


def _marked(pack: Pack, case: PackCase) -> str:
    """The sample as HTML, each run of a class marked with its name."""
    data, classes = class_of_bytes(pack, case)
    names, end, parts = [*pack.classes, REST], 0, list[str]()
    for index, run in groupby(classes):
        start, end = end, end + len(list(run))
        text = escape(printable(data[start:end].decode(errors="replace"), keep="\n"), quote=False).translate(_IN_PRE)
        if index == IGNORE_INDEX:
            parts.append(f"<i>{text}</i>")
        elif names[index] == REST:
            parts.append(text)
        else:  # the name stands in the line that it is about
            body = text.strip("\n") or "↵"
            before, _, behind = text.partition(body) if body in text else ("", "", text)
            parts.append(f"{before}<mark>{body}</mark><sub>{names[index]}</sub>{behind}")
    return "".join(parts)
