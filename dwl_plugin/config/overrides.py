"""Values for our keys that are not in the YAML: from the environment, so that a sweep need not write a config for every run.

Two sources, which every process of a run inherits:

- ``DWL_OVERRIDES``: ``dwl.alpha.number=0.5 dwl.schedule.end=80%``, split as a shell splits words, each value YAML; or ``@FILE``,
  a YAML or JSON mapping.
- ``WANDB_SWEEP_PARAM_PATH``: the parameters that a W&B agent has chosen for this run, and will show as the run's. Those that
  begin with one of our keys are taken; the rest belong to somebody else. (A sweep's ``command`` cannot carry them into a variable:
  an agent fills ``${args}`` and its kin in whole words only, and ``${envvar:…}`` once for all of its runs.)

To set a value twice is the same as once, so a config may pass here more than once.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from dwl_plugin.config.block import Block
from dwl_plugin.config.problems import collected
from dwl_plugin.errors import ConfigError, Problem, printable
from dwl_plugin.yaml_io import load_yaml, read_yaml

__all__ = ["SWEEP_FILE", "VARIABLE", "Override", "overridden", "overrides_of", "plain", "value_at"]

VARIABLE = "DWL_OVERRIDES"
SWEEP_FILE = "WANDB_SWEEP_PARAM_PATH"

_IN_QUOTES = re.compile(r"'[^']*'|\"(?:\\.|[^\"\\])*\"")
_OURS = tuple(Block.model_fields)


@dataclass(frozen=True)
class Override:
    """`path` is dotted, e.g. ``dwl.alpha.number``; `source` is where the value comes from."""

    path: str
    value: Any
    source: str

    @property
    def keys(self) -> list[str]:
        return self.path.split(".")

    def __str__(self) -> str:
        shown = yaml.safe_dump(self.value, default_flow_style=True, allow_unicode=True, width=10_000)
        shown = shown.removesuffix("...\n").strip()  # YAML ends a bare scalar with dots
        return printable(f"{self.source}: {self.path} = {shown}")


def overrides_of(environ: Mapping[str, str]) -> list[Override]:
    """What `environ` overrides. Raises `ConfigError` for what cannot be read, is not ours, or contradicts itself."""
    problems: list[Problem] = []
    found: list[Override] = []
    sweep, text = environ.get(SWEEP_FILE, ""), environ.get(VARIABLE, "").strip()
    with collected(problems):
        found += [item for item in _from_file(Path(sweep), "W&B sweep") if item.keys[0] in _OURS] if sweep else []
    from_file = text.startswith("@")
    with collected(problems):
        found += _from_file(Path(os.path.expanduser(text[1:])), VARIABLE) if from_file else _from_words(text, problems)
    first: dict[str, Override] = {}
    for override in found:
        path, value, source = override.path, override.value, override.source
        if override.keys[0] not in _OURS:
            written = "…" if from_file else value
            hint = f"Axolotl's own keys have options: axolotl train CONFIG --{path.replace('_', '-')}={written}"
            message = f"{VARIABLE} sets nothing but {', '.join(_OURS)} and what is below them"
            problems.append(Problem(path or VARIABLE, message, hint=hint))
        elif not all(override.keys):
            problems.append(Problem(path, f"{source}: a name is missing between two dots", value))
        elif (earlier := first.setdefault(path, override)).value != value:
            problems.append(Problem(path, f"{source} contradicts {earlier.value!r} in {earlier.source}", value))
    ConfigError.raise_any(problems)
    return list(first.values())


def overridden(raw: Mapping[str, Any], overrides: list[Override]) -> dict[str, Any]:
    """Our keys of `raw`, as far as it has them, with the overrides in their places. `raw` stays as it is.

    Whether the keys exist is for `parse` to say, as of any config.
    """
    ours = {key: copy.deepcopy(plain(raw[key])) for key in _OURS if raw.get(key) is not None}
    problems = []
    for override in overrides:
        *parents, last = override.keys
        node: Any = ours
        for at, part in enumerate(parents):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                where = ".".join(parents[: at + 1])
                problems.append(Problem(override.path, f"{override.source}: `{where}` has nothing below it", node))
                break
        else:
            node[last] = copy.deepcopy(override.value)
    ConfigError.raise_any(problems)
    return ours


def value_at(raw: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    node: Any = raw
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _from_words(text: str, problems: list[Problem]) -> list[Override]:
    if re.search(r"\\[^\s'\"\\]", _IN_QUOTES.sub("", text)):
        word = next(word for word in text.split() if "\\" in word)
        why = "a backslash outside of quotes is dropped, as in a shell"
        raise ConfigError.at(VARIABLE, why, text, hint=f'write {VARIABLE}="{shlex.quote(word)}"')
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError.at(VARIABLE, f"cannot be split into words: {error}", text) from None
    found = []
    while words:
        word, rest = words[0], list(takewhile(lambda word: "=" not in word, words[1:]))
        words, whole = words[1 + len(rest) :], " ".join([word, *rest])
        path, equals, value = whole.partition("=")
        with collected(problems):
            if not equals:
                raise ConfigError.at(VARIABLE, "not an override", whole, allowed="dwl.alpha.number=0.5, or @FILE")
            if rest:
                why = "a blank ends an override, so one with a blank in it stands in quotes"
                problems.append(Problem(VARIABLE, why, whole, hint=f'write {VARIABLE}="{shlex.quote(whole)}"'))
            found.append(Override(path.strip(), load_yaml(value, path), VARIABLE))
    return found


def _from_file(path: Path, source: str) -> list[Override]:
    try:
        content = read_yaml(path)
    except ConfigError as error:
        raise ConfigError.at(source, f"{path}: {error.problems[0].message}") from None
    if not isinstance(content, Mapping):
        raise ConfigError.at(source, f"{path} has to be a mapping, such as `dwl.alpha.number: 0.5`")
    if source == VARIABLE and not any(str(key).partition(".")[0] in _OURS for key in content):
        raise ConfigError.at(source, f"{path} has none of the keys {', '.join(_OURS)}")  # and may be the wrong file: none is told
    if "wandb_version" in content:  # W&B's own form: {name: {desc: …, value: …}}
        content = {key: item["value"] for key, item in content.items() if isinstance(item, Mapping) and "value" in item}
    return [override for key, value in content.items() for override in _leaves(str(key), value, source, whole="." in str(key))]


def _leaves(path: str, value: Any, source: str, whole: bool) -> Iterator[Override]:
    """Below a plain key a mapping is walked down, and what it does not name stays; a dotted key replaces what is there."""
    if whole or not isinstance(value, Mapping) or not value:
        yield Override(path, value, source)
        return
    for key, inner in value.items():
        yield from _leaves(f"{path}.{key}", inner, source, whole=False)


def plain(value: Any) -> Any:
    """A host's mapping as a `dict`; anything else as it is."""
    return value.to_dict() if hasattr(value, "to_dict") else value
