"""`dwl packs list`, `show` and `test`: which packs there are, what one says, whether a pack file keeps its own promises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from dwl_plugin.cli.output import printable, say
from dwl_plugin.config.pack_cases import CaseResult, run_case, untouched_classes
from dwl_plugin.config.pack_files import PackReference, known_packs, read_pack, shipped_packs
from dwl_plugin.config.packs import Pack, PackLibrary, parse_pack
from dwl_plugin.errors import ConfigError, DWLError, shortened
from dwl_plugin.extensions import owners

__all__ = ["list_packs", "raw_pack", "read", "show_pack", "test_pack"]


def read(name: str) -> Pack:
    """A pack by its name, file or address on the Hub; a path is relative to the working directory."""
    return PackLibrary([Path()]).pack(_reference(name), "pack")


def _reference(name: str) -> PackReference:
    reference = PackReference.of(name, "pack")
    if reference.member is not None:
        raise ConfigError.at("pack", "not a pack but a class of one", name, hint=f"write `{reference.pack}`")
    return reference


def list_packs(console: Console) -> None:
    """A table of the packs that can be used by name; those of other packages with the package, and with what is wrong with them."""
    table = Table(show_lines=True)
    for column in ("pack", "classes → suggested α", "what they are"):
        table.add_column(column, no_wrap=column == "pack")
    for name in known_packs():
        owner = "" if name in shipped_packs() else f"\nof {owners('pack', name)}"
        try:
            pack = read(name)
            weights, says = "\n".join(_weights(pack)), Text(pack.description)
        except ConfigError as error:
            weights, says = "", Text("\n".join(map(str, error.problems)), "red")
        table.add_row(Text.assemble((name, "bold"), owner), weights, says)
    console.print(table)


def _weights(pack: Pack) -> Iterator[str]:
    for name in (*pack.classes, "rest"):
        yield name if pack.alpha is None else f"{name} → {pack.alpha[name]:g}"


def raw_pack(name: str) -> str:
    """The text of a pack file as it is, once it is known to be a pack."""
    source = read_pack(_reference(name), [Path()], "pack")
    parse_pack(source)
    return source.text


def show_pack(console: Console, name: str) -> None:
    """The text of a pack file up to its cases: the patterns as they were written, with their comments."""
    source = read_pack(_reference(name), [Path()], "pack")
    pack = parse_pack(source)
    console.print(Syntax(source.text.partition("\ntests:")[0].strip(), "yaml", background_color="default", word_wrap=True))
    console.print()
    say(console, f"{len(pack.tests)} cases; `dwl packs test {name}` runs them.")


def test_pack(console: Console, name: str) -> bool:
    """Run the cases of a pack and print what differs; True if all pass."""
    pack = read(name)
    failed = 0
    for number, case in enumerate(pack.tests):
        try:
            result = run_case(pack, case)
        except DWLError as error:
            failed += 1
            console.print(Text.assemble((f"tests[{number}]", "red"), f" {error}"))
        else:
            if not result.passed:
                failed += 1
                text = shortened("".join(turn.text for turn in case.sample), 100)
                console.print(Text.assemble((f"tests[{number}]", "red"), f" {text}"))
                console.print(_differences(result))
    if untouched := untouched_classes(pack):
        say(console, f"No case has a span of: {', '.join(untouched)}", "yellow")
    if not pack.is_described:
        say(console, "Its description is still to be written.", "yellow")
    count = len(pack.tests)
    passed = "1 case passes" if count == 1 else f"{count} cases pass"
    verdict = (f"{failed} of {count} cases fail", "red") if failed else (passed, "green")
    console.print(Text.assemble(f"{printable(name)}: ", verdict if count else ("has no cases", "yellow")), soft_wrap=True)
    return failed == 0


def _differences(result: CaseResult) -> Table:
    table = Table()
    for column in ("class", "expected", "found"):
        table.add_column(column, overflow="fold")
    for name, expected in result.expected.items():
        if result.found[name] != expected:
            table.add_row(name, _spans(expected), _spans(result.found[name]))
    return table


def _spans(spans: Sequence[str]) -> Text:
    return Text("\n".join(map(repr, spans))) if spans else Text("none", "dim")
