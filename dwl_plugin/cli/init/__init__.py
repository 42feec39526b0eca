"""`dwl init`: a whole config for a purpose and a card, with comments."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeVar

import jinja2
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dwl_plugin.cli.init.purposes import PURPOSES
from dwl_plugin.cli.memory import MODELS, full_bytes, needed_gib, qlora_bytes, shape_of
from dwl_plugin.cli.output import deliver, say
from dwl_plugin.errors import DWLError, did_you_mean

__all__ = ["CARDS", "PURPOSES", "Card", "choices", "estimated", "init", "largest_that_fits", "written"]

T = TypeVar("T")

_FILLED = 0.85
"""Of a card, by an estimate: the largest model that takes no more is chosen."""
_SHORT = 1024
"""A `sequence_len` below which few would go."""


@dataclass(frozen=True)
class Card:
    """`ranks` cards of so many GB that share all weights, by FSDP2 or by ZeRO-3; or one, for QLoRA."""

    gb: int
    ranks: int = 1
    sharded_by: str | None = None

    @property
    def title(self) -> str:
        """What is trained on it, and how."""
        how = {
            None: "QLoRA",
            "fsdp2": "full fine-tuning, weights shared by FSDP2",
            "zero3": "full fine-tuning, weights shared by ZeRO-3",
        }
        return f"{how[self.sharded_by]}: {self.hardware}"

    @property
    def hardware(self) -> str:
        """In words."""
        return f"one GPU with {self.gb} GB" if self.ranks == 1 else f"{self.ranks} GPUs with {self.gb} GB each"


CARDS = {**{f"{gb}GB": Card(gb) for gb in (8, 12, 16, 24)}, **{f"4x24GB-{by}": Card(24, 4, by) for by in ("fsdp2", "zero3")}}


def choices(console: Console) -> None:
    """What there is to choose from."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, purpose in PURPOSES.items():
        table.add_row(Text(f"  --for {name}"), Text(purpose.what))
    for name, card in CARDS.items():
        table.add_row(Text(f"  --card {name}"), Text(card.title))
    console.print(table)
    say(console, "For example: dwl init --for tool-calls --card 12GB --data rows.jsonl --out train.yml")


def init(console: Console, purpose: str, card: str, model: str | None, data: str | None, out: Path) -> None:
    """The whole command. Raises `DWLError` for a name that is none, and where `out` is there."""
    chosen, on = _named(PURPOSES, purpose, "--for"), _named(CARDS, card, "--card")
    for option, given in (("--model", model), ("--data", data)):
        if given is not None and not given.strip():
            raise DWLError(f"{option} is empty.")
    model = largest_that_fits(chosen.tokens, on) if model is None else model
    deliver(written(purpose, card, model, data), out)
    say(console, f"{out}: {model} for {purpose}, {on.title}", "bold green")
    if data is not None and not Path(data).exists():
        say(console, f"There is no file {data} here yet.", "yellow")
    try:
        gib = estimated(model, chosen.tokens, on)
        say(console, f"Memory, by the formula, not measured: {gib:.1f} GiB{' of each card' if on.ranks > 1 else ''}.")
        if gib > _FILLED * on.gb:
            shorter = f", or a smaller sequence_len than {chosen.tokens:,}" * (estimated(model, _SHORT, on) <= _FILLED * on.gb)
            too_much = f"more than {on.gb} GB" if gib > on.gb else f"more than {_FILLED:.0%} of {on.gb} GB, and an estimate"
            say(console, f"That is {too_much}: take a smaller model{shorter}.", "bold yellow")
    except DWLError as error:
        say(console, f"How much memory it takes is not known: {error}.")
    say(console, f"Next: dwl check {out}, then axolotl train {out}")


def _named(known: Mapping[str, T], name: str, option: str) -> T:
    for other, what in known.items():
        if other.lower() == name.lower():
            return what
    hint = did_you_mean(name, list(known))
    raise DWLError(f"{option} {name}: there is no such one; there are {', '.join(known)}.{f' ({hint})' if hint else ''}")


def largest_that_fits(tokens: int, card: Card) -> str:
    """Of the known ones of Qwen3."""
    fitting = [model for model in MODELS if "/Qwen3-" in model and estimated(model, tokens, card) <= _FILLED * card.gb]
    return fitting[-1]


def estimated(model: str, tokens: int, card: Card) -> float:
    """GiB of each card. Raises `DWLError` with why it is not known."""
    shape = shape_of(model)
    return needed_gib(qlora_bytes(shape, tokens) if card.sharded_by is None else full_bytes(shape, tokens, card.ranks))


def written(purpose: str, card: str, model: str | None = None, data: str | None = None) -> str:
    """The text of a config for names of `PURPOSES` and `CARDS`."""
    chosen, on = _named(PURPOSES, purpose, "--for"), _named(CARDS, card, "--card")
    model = largest_that_fits(chosen.tokens, on) if model is None else model
    memory = "not estimated"
    with suppress(DWLError):
        memory = f"estimated, not measured: {estimated(model, chosen.tokens, on):.1f} GiB"
    need = f"{on.hardware} ({memory})"
    need += ", bitsandbytes." if on.sharded_by is None else ", DeepSpeed." if on.sharded_by == "zero3" else "."
    head = [("What for:", chosen.what), ("Needs:", need), ("Watch:", chosen.watch)]
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(resources.files(__package__).joinpath("train.yml.j2").read_text(encoding="utf-8"))
    return template.render(
        rule=lambda title: f"# --- {title} ".ljust(119, "-"),
        head="\n".join(_comment(name, text) for name, text in head),
        purpose=chosen,
        card=on,
        model=_scalar(model),
        dataset=chosen.dataset if data is None else _of_ones_own(chosen.dataset, data),
    )


def _comment(name: str, text: str) -> str:
    return textwrap.fill(text, 118, initial_indent=f"# {name:<11}", subsequent_indent=f"#{'':<12}", break_on_hyphens=False)


def _of_ones_own(dataset: str, path: str) -> str:
    """The entry for rows of `messages` in a file of one's own."""
    kept = re.findall(r"(?m)^type:.*$", dataset)
    return "\n".join([f"path: {_scalar(path)}", *kept])


def _scalar(text: str) -> str:
    """As YAML, in quotes where it could be read as something else."""
    plain = re.fullmatch(r"\.{0,2}/?[A-Za-z][\w./-]*", text) and yaml.safe_load(text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)
