"""Our keys in the text of a config, as a person would paste them: no other line, comment or line end is touched.

Positions are those of PyYAML's events, in which an alias stands where it is written. What comes out is read again, and has to be
the old config and the new keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dwl_plugin.config import Block
from dwl_plugin.errors import DWLError
from dwl_plugin.files import read_regular, write_whole
from dwl_plugin.hosts.plugin_line import LINE, names_plugin
from dwl_plugin.yaml_io import decoded, load_yaml

__all__ = ["edited", "write_into"]

_MOST_BYTES = 1 << 20
"""A config that could be looked at is not larger."""


class _Entry(NamedTuple):
    """A key of the whole mapping: its column, where its line begins and its value ends, and the events of the value."""

    key: str
    column: int
    begin: int
    end: int
    value: list[yaml.Event]


def write_into(path: Path, seen: Mapping[str, Any], block: Sequence[str], keys: Mapping[str, Any]) -> None:
    """Put `block`, the lines of `keys`, into the config at `path`, which has to be what was looked at.

    Raises `DWLError` where that is not certain to change nothing else; the file is as it was then.
    """
    text = decoded(read_regular(path, _MOST_BYTES), str(path))
    if repr(load_yaml(text, str(path))) != repr(seen):
        raise DWLError(f"{path} was changed while it was looked at, so nothing was written.")
    write_whole(path, edited(text, block, keys).encode())


def edited(text: str, block: Sequence[str], keys: Mapping[str, Any]) -> str:
    """`text` with `block` in place of its `loss`, `dft` and `dwl`, or beside its `plugins`, where an entry of ours is added."""
    old = load_yaml(text, "the config")
    entries, column, end = _entries(text)
    changes = _changes(text, entries, column, end, block, add_plugin=not names_plugin(old))
    newline = "\r\n" if "\r\n" in text else "\n"
    new = text
    for begin, stop, put in sorted(changes, reverse=True):
        new = new[:begin] + put.replace("\n", newline) + new[stop:]
    expected = {key: value for key, value in old.items() if key not in Block.model_fields} | dict(keys)
    if not names_plugin(old):
        expected["plugins"] = [*(old.get("plugins") or ()), LINE]
    try:
        found = load_yaml(new, "the config")
    except DWLError:
        found = {}
    if {key: repr(value) for key, value in found.items()} != {key: repr(value) for key, value in expected.items()}:
        raise _by_hand(
            "with the block in it, it would not be the old config and these keys (anchors, merged keys, or a text at its end)"
        )
    return new


def _changes(
    text: str, entries: Sequence[_Entry], column: int, end: int, block: Sequence[str], add_plugin: bool
) -> Iterator[tuple[int, int, str]]:
    """What to put in place of which part of the text; no two at one place."""
    ours = [entry for entry in entries if entry.key in Block.model_fields]
    plugins = [entry for entry in entries if entry.key == "plugins"][-1:]
    new_key = ["plugins:", f"  - {LINE}", ""] if add_plugin and not plugins else []
    put = "".join(f"{' ' * column if line else ''}{line}\n" for line in (*new_key, *block))
    beside = ""
    if not ours and plugins:
        at = _line_end(text, plugins[0].end)
        beside = f"\n\n{put.removesuffix(chr(10))}{'' if _blank_follows(text, at) else chr(10)}"
    if add_plugin and plugins:
        begin, item = _plugin_item(text, plugins[0])
        joined = begin == _line_end(text, plugins[0].end)
        yield begin, begin, item + (beside if joined else "")
        if joined:
            beside = ""
    if beside:
        yield at, at, beside
    elif not ours and not plugins:
        before = text[:end]
        gap = "" if re.search(r"\n[ \t]*\r?\n$", before) else "\n" if before.endswith("\n") else "\n\n"
        yield end, end, gap + put
    regions: list[tuple[int, int]] = []
    for entry in ours:
        stop = _line_end(text, entry.end)
        if regions and _next_line(text, regions[-1][1]) == entry.begin:
            regions[-1] = regions[-1][0], stop
        else:
            regions.append((entry.begin, stop))
    for number, (begin, stop) in enumerate(regions):
        yield (begin, _next_line(text, stop), "") if number else (begin, stop, put.removesuffix("\n"))


def _plugin_item(text: str, plugins: _Entry) -> tuple[int, str]:
    """Where our item goes in the list of `plugins`, and how it is written there."""
    first, *inside = plugins.value
    if isinstance(first, yaml.ScalarEvent) and not first.value and first.style is None:  # `plugins:` with nothing behind it
        return _line_end(text, plugins.end), f"\n{' ' * (plugins.column + 2)}- {LINE}"
    if not isinstance(first, yaml.SequenceStartEvent):
        raise _by_hand("its `plugins` is no plain list")
    items = [event for event in inside if isinstance(event, yaml.ScalarEvent)]
    quote = (items[-1].style or "") if items and items[-1].style in ("'", '"', None) else ""
    name = f"{quote}{LINE}{quote}"
    if first.flow_style:
        return (_at(items[-1].end_mark).index, f", {name}") if items else (_at(first.end_mark).index, name)
    return _line_end(text, plugins.end), f"\n{' ' * _at(first.start_mark).column}- {name}"


def _entries(text: str) -> tuple[list[_Entry], int, int]:
    """The keys of the document's mapping with their places, the column in which they stand, and where the document ends."""
    entries: list[_Entry] = []
    flow: list[bool] = []  # of the collections that are open
    key: yaml.Event | None = None
    column, reach, end = 0, 0, len(text)
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.DocumentEndEvent) and event.explicit:
            end = _at(event.start_mark).index
        if isinstance(event, yaml.CollectionStartEvent):
            flow.append(bool(event.flow_style))
            if flow == [True]:
                raise _by_hand("it is one mapping in braces")
            if len(flow) == 1:
                column = -1
                continue
        ends_block = isinstance(event, yaml.CollectionEndEvent) and not flow.pop()
        if not flow:
            continue
        if key is None:
            assert isinstance(event, (yaml.ScalarEvent, yaml.AliasEvent)), "Python has no other keys"
            key, value, reach = event, list[yaml.Event](), 0
            column = _at(event.start_mark).column if column < 0 else column
            continue
        value.append(event)
        if not ends_block:  # what is in block style ends where the next thing begins
            reach = max(reach, _behind_text(text, _at(event.end_mark).index))
        if len(flow) == 1:
            begin = _at(key.start_mark).index - _at(key.start_mark).column
            entries.append(_Entry(str(getattr(key, "value", "")), column, begin, reach, value))
            key = None
    return entries, column, end


def _behind_text(text: str, at: int) -> int:
    """`at` without the white space before it: a text in block style ends with the lines behind it."""
    while at and text[at - 1].isspace():
        at -= 1
    return at


def _line_end(text: str, at: int) -> int:
    match = re.compile(r"[^\r\n]*").match(text, at)
    assert match is not None
    return match.end()


def _next_line(text: str, at: int) -> int:
    """Behind the line end at `at`, if there is one."""
    match = re.compile(r"(\r?\n)?").match(text, at)
    assert match is not None
    return match.end()


def _blank_follows(text: str, at: int) -> bool:
    """Whether the line that ends at `at` is the last, or the next is empty."""
    return re.compile(r"\Z|\r?\n[ \t]*(\r?\n|\Z)").match(text, at) is not None


def _at(mark: Any) -> Any:
    """PyYAML's types have marks that may be missing, and its parser has not."""
    assert mark is not None
    return mark


def _by_hand(why: str) -> DWLError:
    return DWLError(f"The block is not written into this config: {why}. Nothing was written; paste it by hand.")
