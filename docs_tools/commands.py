"""docs/cli.md, made of the commands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from docs_tools.reference import cell, prose, table
from dwl_plugin.cli.main import main

__all__ = ["command_sections", "command_table", "commands"]

PLACEHOLDERS = {
    "integer": "N",
    "integer range": "N",
    "float": "X",
    "float range": "X",
    "text": "TEXT",
    "file": "FILE",
    "path": "PATH",
}


def commands(group: click.Group = main, before: str = "dwl") -> Iterator[tuple[str, click.Command]]:
    """(`dwl packs show`, the command) of all that can be run."""
    if group.params:
        yield before, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{before} {name}")
        else:
            yield f"{before} {name}", command


def _help(command: click.Command) -> str:
    text = inspect.cleandoc(command.help or "").replace("\b", "").replace("\f", "")
    return prose(re.sub(r"(?<!\n)\n(?!\n)", " ", text))


def command_table() -> str:
    """Each with its first sentence."""
    rows = [
        (f"[`{name}`](#{name.replace(' ', '-')})", re.split(r"(?<=[.;])\s", _help(command))[0].rstrip(";.") + ".")
        for name, command in commands()
    ]
    return table(("command", ""), rows)


def _name(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    if option.is_flag:
        return names
    kind = option.type
    if isinstance(kind, click.Path) and not kind.file_okay:
        value = "FOLDER"
    elif isinstance(kind, click.Choice):
        value = "|".join(map(str, kind.choices))
    else:
        value = option.metavar or PLACEHOLDERS[kind.name]
    return names.removesuffix("`") + rf" {value}`".replace("|", r"\|")


def _default(option: click.Option) -> str:
    if option.required:
        return "**required**"
    if option.is_flag:
        return ""
    if isinstance(option.show_default, str):
        return option.show_default
    default = option.get_default(click.Context(main), call=False)
    return "" if default is None or not isinstance(default, (str, int, float)) else f"`{default}`"


def command_sections() -> str:
    """How each is called, what it does, and its options."""
    sections = []
    for name, command in commands():
        pieces = ["[OPTIONS]"] if isinstance(command, click.Group) else command.collect_usage_pieces(click.Context(command))
        usage = " ".join([name, *pieces])
        options = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
        rows = [(_name(option), _default(option), cell(option.help or "")) for option in options]
        sections += [f"## {name}", f"```\n{usage}\n```", _help(command)]
        sections += [table(("option", "default", ""), rows)] if rows else []
    return "\n\n".join(sections)
