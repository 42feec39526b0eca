"""The tables of docs/reference.md, made of the models that a config is validated with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from dwl_plugin.alpha.controllers import CONTROLLERS
from dwl_plugin.alpha.schedules import SCHEDULES
from dwl_plugin.classes.selectors import SELECTORS, TurnEnds
from dwl_plugin.config.block import Block, DataWeights, DWLConfig
from dwl_plugin.config.classes import ClassConfig
from dwl_plugin.config.packs import Pack, PackCase, PackTurn
from dwl_plugin.loss.token_losses import TOKEN_LOSSES

__all__ = ["METRICS", "TABLES", "cell", "prose", "table"]

SHOWN_AS = {
    "alpha": "class → number ≥ 0",
    "all": "list of selectors",
    "any": "list of selectors",
    "at": "[position](#values), or position → numbers",
    "between": "opening and closing text",
    "classes": "name → [class](#classes)",
    "controller": "[controller](#controllers)",
    "data_weights": "`true`, or [names of fields](#dwldata_weights)",
    "dft": "[options](#dft)",
    "dwl": "[mapping](#dwl)",
    "final": "name → number",
    "group": "number or name",
    "mark": "name or number",
    "marked": "name or number",
    "not": "selector",
    "pack": "[pack](packs.md)",
    "position": "`first`, `last` or both → number",
    "reference": "`base`, or class → nats",
    "regex": "[pattern](#values)",
    "schedule": "[schedule](#schedules)",
    "spans": "class → list of texts",
    "tests": "list of [cases](#a-case)",
    "to": "name → number",
    "token_ids": "list of numbers and ranges",
    "token_loss": "[name](#token-losses)",
    "token_regex": "[pattern](#values)",
    "turn": "`first`, `last` or a number",
    "turns": "list of [turns](#a-turn)",
} | {name: "[options](#token-losses)" for name in TOKEN_LOSSES if name != "dft"}
"""By the name of the option, where its JSON Schema is more than a plain value."""

PLAIN = {"boolean": "`true`, `false`", "string": "text", "number": "number", "integer": "whole number", "array": "list of texts"}


def prose(text: str) -> str:
    """Text of the code as Markdown: what is not in backticks has no HTML, and papers are linked."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [
        re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", part.replace("<", "&lt;")) for part in parts[::2]
    ]
    return "".join(parts).replace("->", "→")


def cell(text: str) -> str:
    """For a table: on one line, `|` escaped."""
    return prose(" ".join(text.split())).replace("|", r"\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(line)} |".replace("|  |", "| |") for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _value(name: str, schema: Mapping[str, Any]) -> str:
    """What may stand behind a key."""
    choices = [choice for choice in schema.get("anyOf", [schema]) if choice.get("type") != "null"]
    if not choices:
        return "–"
    if any("%" in choice.get("pattern", "") for choice in choices):
        return "[position](#values)"
    if name in SHOWN_AS:
        return SHOWN_AS[name]
    only = {**schema, **choices[0]}
    if values := only.get("enum", [only["const"]] if "const" in only else []):
        return ", ".join(f"`{_plain(value)}`" for value in values)
    if len(choices) > 1 or only.get("type") not in PLAIN:
        raise LookupError(f"`{name}` has no plain value: docs_tools/reference.py SHOWN_AS says what it has")
    ends = {"≥": "minimum", ">": "exclusiveMinimum", "≤": "maximum", "<": "exclusiveMaximum"}
    bounds = ", ".join(f"{sign} {only[end]:g}" for sign, end in ends.items() if end in only)
    if "minimum" in only and "maximum" in only:
        bounds = f"{only['minimum']:g} to {only['maximum']:g}".replace("-", "−")
    return f"{PLAIN[only['type']]} {bounds}".strip()


def _properties(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of each field, by its key in a YAML."""
    schema = model.model_json_schema()
    found: dict[str, Any] = schema["$defs"][model.__name__]["properties"] if "$ref" in schema else schema["properties"]
    return found


def _options(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """(key, value, default, description) of each field, `type` left out: it has a table of its own."""
    for (name, schema), field in zip(_properties(model).items(), model.model_fields.values(), strict=True):
        if name == "type":
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        shown = "**required**" if field.is_required() else "" if default in (None, {}, ()) else f"`{_plain(default)}`"
        yield f"`{name}`", _value(name, schema), shown, cell(field.description or "")


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value else json.dumps(value)


def _doc(model: type) -> str:
    return cell((model.__doc__ or "").split("\n\n")[0])


def options(model: type[BaseModel], *without: str) -> str:
    rows = (row for row in _options(model) if row[0].strip("`") not in without)
    return table(("key", "value", "default", ""), list(rows))


def selectors() -> str:
    """One row for each selector: what stands behind its key, and the options beside it."""
    rows = []
    for key, model in SELECTORS.items():
        own, *beside = sorted(_options(model), key=lambda row: row[0] != f"`{key}`")
        more = [f"{name} (default {default}): {says}" for name, _, default, says in beside]
        rows.append((own[0], own[1], " ".join([_doc(model), own[3], *more])))
    return table(("selector", "value", "selects"), rows)


def kinds(built_in: Mapping[str, Any], head: str) -> str:
    return table((head, ""), [(f"`{name}`", _doc(one.Options)) for name, one in built_in.items()])


def options_by_kind(built_in: Mapping[str, Any], head: str) -> str:
    """Every option once, with the kinds that have it so."""
    owners: dict[tuple[str, str, str, str], list[str]] = {}
    for name, one in built_in.items():
        for row in _options(one.Options):
            owners.setdefault(row, []).append(name)
    rows = [(key, _few(names, built_in), value, default, says) for (key, value, default, says), names in owners.items()]
    return table(("key", head, "value", "default", ""), sorted(rows, key=lambda row: row[0]))


def _few(names: Sequence[str], every: Mapping[str, Any]) -> str:
    missing = [name for name in every if name not in names]
    if not missing:
        return "all"
    if len(missing) < len(names) and len(missing) <= 2:
        return f"all but {', '.join(f'`{name}`' for name in missing)}"
    return ", ".join(f"`{name}`" for name in names)


SECTIONS: dict[str, tuple[str, Sequence[type[BaseModel]]]] = {
    "loss, dft, dwl": ("loss-dft-dwl", [Block]),
    "dft": ("dft", [TOKEN_LOSSES["dft"].Options]),
    "dwl": ("dwl", [DWLConfig]),
    "dwl.data_weights": ("dwldata_weights", [DataWeights]),
    "token losses": ("token-losses", [one.Options for name, one in TOKEN_LOSSES.items() if name != "dft"]),
    "classes": ("classes", [ClassConfig]),
    "selectors": ("selectors", [*SELECTORS.values(), TurnEnds]),
    "schedules": ("schedules", [one.Options for one in SCHEDULES.values()]),
    "controllers": ("controllers", [one.Options for one in CONTROLLERS.values()]),
    "pack files": ("pack-files", [Pack, PackCase, PackTurn]),
}
"""Heading -> its anchor, and the models whose options stand below it."""


def index() -> str:
    """Every key, and the sections that have it."""
    found: dict[str, dict[str, str]] = {}
    for section, (anchor, models) in SECTIONS.items():
        for model in models:
            for name in _properties(model):
                found.setdefault(name, {})[section] = anchor
    places = {name: ", ".join(f"[{section}](#{anchor})" for section, anchor in of.items()) for name, of in found.items()}
    return table(("key", "where"), [(f"`{name}`", places[name]) for name in sorted(places, key=str.lower)])


METRICS = (
    ("nll", "lower", "−log p of a target in nats, whatever α was: compares any two runs on the same rows. `ppl` is e^nll."),
    ("dwl/p", "higher", "The probability of a target, in the mean."),
    ("dwl/nll/<class>", "lower", "The same as `nll`, of the tokens of a class."),
    ("dwl/p/<class>", "higher", "The same as `dwl/p`, of the tokens of a class."),
    ("dwl/alpha/<class>", "", "α at this step."),
    ("dwl/token_share/<class>", "", "Of all targets. Under `overlap: sum` they add up to more than 1."),
    ("dwl/loss_share/<class>", "", "Of the loss that is trained. Above the token share, the class has more say than under SFT."),
    ("dwl/weight", "", "What a target counts in the mean, where one of SFT counts 1: α, reduction and token loss in one."),
    ("dwl/signal/<class>", "", "What a controller compares."),
    ("dwl/exponent/<class>, dwl/min_weight/<class>", "", "Of dft, where a schedule moves them."),
    ("dwl/kl, dwl/kl/<class>", "", "KL to the base model in nats, with an `anchor`."),
    ("dwl/factor, dwl/factor/<class>", "", "The mean of what the data and reductions by sample make a target count."),
    ("dwl/p_negative, dwl/p_negative/<class>", "lower", "p of the tokens whose factor is below 0."),
    ("dwl/dataset/<metric>/<name>", "", "nll, p, kl, factor, p_negative, both shares, by data set where there are several."),
)
"""Name, which way is good, what it says."""


def metrics() -> str:
    rows = [(", ".join(f"`{one}`" for one in names.split(", ")), better, cell(says)) for names, better, says in METRICS]
    return table(("metric", "better", ""), rows)


TABLES = {
    "keys": index,
    "block": lambda: options(Block),
    "dft": lambda: options(TOKEN_LOSSES["dft"].Options),
    "dwl": lambda: options(DWLConfig),
    "data_weights": lambda: options(DataWeights),
    "class_options": lambda: options(ClassConfig),
    "selectors": selectors,
    "token_losses": lambda: kinds(TOKEN_LOSSES, "`token_loss`"),
    "token_loss_options": lambda: options_by_kind({k: v for k, v in TOKEN_LOSSES.items() if k != "dft"}, "of"),
    "schedules": lambda: kinds(SCHEDULES, "`type`"),
    "schedule_options": lambda: options_by_kind(SCHEDULES, "of"),
    "controllers": lambda: kinds(CONTROLLERS, "`type`"),
    "controller_options": lambda: options_by_kind(CONTROLLERS, "of"),
    "metrics": metrics,
    "pack_file": lambda: options(Pack),
    "pack_case": lambda: options(PackCase),
    "pack_turn": lambda: options(PackTurn),
}
