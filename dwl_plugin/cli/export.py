"""`dwl export`: a run as one config that somebody else trains again, with where it came from and what it came to."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from dwl_plugin.cli.output import Console, deliver, printable, say, say_list
from dwl_plugin.cli.report.run import Run, read_runs, settings_of
from dwl_plugin.cli.report.tables import arrow, called, percent, rows_of
from dwl_plugin.cli.trust import runs_code
from dwl_plugin.config.problems import nodes
from dwl_plugin.errors import DWLError, first_line
from dwl_plugin.hosts.as_it_ran import LEFT_OUT, opens, without_password
from dwl_plugin.hosts.needed_files import MODELS, READERS, data_entries, strings
from dwl_plugin.run.record import Record
from dwl_plugin.yaml_io import ExactDumper

__all__ = ["export"]

_ONES_OWN = (
    *("wandb", "mlflow", "comet", "swanlab", "trackio", "otel", "hub_", "push_", "hf_use_auth_token", "gradio"),
    *("use_wandb", "use_mlflow", "use_comet", "use_swanlab", "use_trackio", "use_otel"),
    *("resume_from_checkpoint", "auto_resume_from_checkpoints"),
)
"""What keys begin with that name accounts, projects and places of whoever trained, or the middle of a run."""

_OF_THIS_DISK = re.compile(r"(?:file://)?(?:/[^/\s]+/|~\w*[\\/]|[A-Za-z]:[\\/]|\\\\)[^\n]*|(?:\.[\\/])*\.\.[\\/][^\n]*")
"""An absolute path, or one that leads out of the folder; `/think` is none."""

_NAMES_A_HOME = re.compile(r"(?:^|[^\w.])(?:/home/|/Users/|/root/|~/)|[A-Za-z]:\\+Users\\", re.IGNORECASE)

_PATTERN = re.compile(r"(?P<folder>[^*?\[]+)(?P<pattern>[\\/][^\\/]*[*?\[].*)")

_PLACE = re.compile(r"(?:path|_dir|_model|data_files(?:\[\d+\])?)$")
"""Keys whose value is a path or a name: there `/rows` is a path too."""


@dataclass
class Changes:
    """What the exported config does not have from the run's: paths of keys, and path -> (old, new)."""

    left_out: list[str] = field(default_factory=list)
    moved: dict[str, tuple[str, str]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    """Names in the folder of the config that something has already."""

    def here(self, path: str) -> str:
        """A name in the folder of the config for a path of this disk, another one for each; what lies in a folder that has one, or
        is a pattern, goes by its folder."""
        if path not in self.names:
            if found := _PATTERN.fullmatch(path):
                return self.here(found["folder"]) + found["pattern"]
            if (inside := _inside(path, self.names)) is not None:
                return inside
            name = re.split(r"[\\/]", path.rstrip("\\/"))[-1].lstrip("~") or "home"
            stem, dot, suffix = name.rpartition(".")
            others = (f"{stem}-{number}{dot}{suffix}" if dot else f"{name}-{number}" for number in count(2))
            self.names[path] = next(f"./{free}" for free in chain([name], others) if f"./{free}" not in self.taken)
            self.taken.add(self.names[path])
        return self.names[path]


def export(console: Console, folder: Path, out: Path | None) -> None:
    """The whole command: the config to `out`, or to stdout; to `console` what was left out and what has to be there.

    Raises:
        DWLError: the folder has no config of a run by Axolotl, or `out` is there.
    """
    block, record, config = settings_of(folder)
    run = None
    try:
        (run,) = read_runs([folder])
    except DWLError as error:
        say(console, f"Without results: {first_line(error)}", "yellow")
    changes = Changes(taken={f"./{posixpath.normpath(node)}" for _, node, _ in nodes(config, "") if isinstance(node, str)})
    public, ours = _public(config, "", changes), block.dump()
    for path, node, _ in nodes(ours, ""):
        if path.endswith(".dataset") and isinstance(node, str) and opens("", node):
            changes.left_out.append(path.lstrip("."))
            changes.names[node] = LEFT_OUT
    whole = _in_place(_held(public, record, changes), _renamed(ours, changes.names))
    record = _named_here(record, changes)
    text = f"{_head(record, run)}\n{_yaml(whole)}"
    deliver(text, out)
    _tell(console, out, whole, record, changes)


def _public(node: Any, path: str, changes: Changes) -> Any:
    """`node` without what belongs to whoever trained."""
    if isinstance(node, Mapping):
        kept = {}
        for key, value in node.items():
            at = f"{path}.{key}".lstrip(".")
            if (not path and str(key).startswith(_ONES_OWN)) or opens(str(key), value):
                changes.left_out += [] if value is None else [at]
            else:
                kept[key] = _public(value, at, changes)
        return kept
    if isinstance(node, list):
        places = [(f"{path}[{index}]", value) for index, value in enumerate(node)]
        changes.left_out += [at for at, value in places if opens("", value)]
        return [_public(value, at, changes) for at, value in places if not opens("", value)]
    if isinstance(node, str) and (_OF_THIS_DISK.fullmatch(node) or (_PLACE.search(path) and node.startswith(("/", "~")))):
        changes.moved[path] = node, changes.here(node)
        return changes.here(node)
    return node


def _inside(path: str, names: Mapping[str, str]) -> str | None:
    """What a path below one that has a name goes by."""
    ends = [found.start() for found in re.finditer(r"[\\/]", path)]
    return next((names[path[:end]] + path[end:] for end in reversed(ends) if path[:end] in names), None)


def _named_here(record: Record, changes: Changes) -> Record:
    """The record with the names that paths of that disk have in the exported config, and of any other such path the last part."""

    def here(name: str) -> str:
        inside = changes.names.get(name) or _inside(name, changes.names)
        return inside or (re.split(r"[\\/]", name)[-1] if _OF_THIS_DISK.fullmatch(name) else name)

    named = {key: {here(name): digest for name, digest in (getattr(record, key) or {}).items()} for key in ("packs", "files")}
    model, data = record.model and here(record.model), record.data and [here(without_password(name)) for name in record.data]
    return record.model_copy(update={**named, "model": model, "data": data})


def _held(config: dict[str, Any], record: Record, changes: Changes) -> dict[str, Any]:
    """The config with the commit of a model that was taken from the Hub as it was that day."""
    apart = ("revision_of_model", "base_model_config", "tokenizer_config", "processor_config")
    if record.model_commit is None or any(config.get(key) is not None for key in apart):
        return config
    changes.moved["revision_of_model"] = "none", record.model_commit
    return {**config, "revision_of_model": record.model_commit}


def _renamed(node: Any, names: Mapping[str, str]) -> Any:
    """Our keys, with classes of a data set that goes by its path at the path that it has now."""
    if isinstance(node, Mapping):
        return {
            key: names.get(value, value) if key == "dataset" and isinstance(value, str) else _renamed(value, names)
            for key, value in node.items()
        }
    return [_renamed(part, names) for part in node] if isinstance(node, list) else node


def _in_place(config: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The config with our keys behind `plugins`."""
    before = list(config)
    at = before.index("plugins") + 1 if "plugins" in before else 0
    whole = {key: config[key] for key in before[:at]} | dict(ours)
    return whole | {key: config[key] for key in before[at:] if key not in ours}


class _Dumper(ExactDumper):
    """Nothing by reference, and text of several lines as a person writes it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def style_of(self, text: str) -> str | None:
        return super().style_of(text) or ("|" if "\n" in text else None)


def _yaml(config: Mapping[str, Any]) -> str:
    return str(yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))


def _head(record: Record, run: Run | None) -> str:
    """What the run was, as comments."""
    lines = ["A run with dwl_plugin, to be trained again by", "    axolotl train THIS_FILE", ""]
    lines += [f"{name:<14}{fact}" for name, fact in record.facts().items()]
    lines += [f"{'model commit':<14}{record.model_commit}"] if record.model_commit else []
    for what, hashed in (("pack", record.packs), ("file", record.files)):
        lines += [f"{what:<14}{name}   {_digest(digest)}" for name, digest in (hashed or {}).items()]
    lines += ["", *(_results(run) if run is not None else ["Without results: none could be read when this was written."])]
    return "\n".join(f"# {printable(line)}".rstrip() for line in lines) + "\n"


def _digest(digest: str | None) -> str:
    return "not hashed" if digest is None else f"sha256 {digest}"


def _results(run: Run) -> Iterator[str]:
    where = "on the evaluation set" if run.evals else "in training, first and last tenth of the steps"
    of = f" of {run.max_steps:,}" if run.max_steps > run.step else ""
    yield f"After {run.step:,}{of} steps; nll in nats per token, {where}:"
    yield f"{'':<24}{'targets':>9}   {'α':<15}   nll"
    for row in rows_of(run):
        yield f"{called(row.name):<24}{percent(row.token_share):>9}   {arrow(row.alpha):<15}   {arrow(row.nll)}"


def _tell(console: Console, out: Path | None, whole: Mapping[str, Any], record: Record, changes: Changes) -> None:
    if out is not None:
        say(console, f"{out}: the whole run as one config, for `axolotl train {out}`.", "bold green")
    say_list(console, "Left out", changes.left_out)
    say_list(console, "Otherwise than in the run", [f"{path}: {old} → {new}" for path, (old, new) in changes.moved.items()])
    homes = [path[1:] for path, node, _ in nodes(whole, "") if isinstance(node, str) and _NAMES_A_HOME.search(node)]
    say_list(console, "Names somebody's folder inside a longer text, and stays", homes)
    say_list(console, "Has to be there", list(_needed(whole, record.files or {})))
    say_list(console, "Asks for trust, as it runs code", [str(danger) for danger in runs_code(whole)])


def _needed(config: Mapping[str, Any], files: Mapping[str, str | None]) -> Iterator[str]:
    """Model, data and settings: what was hashed by its name in the folder that is trained in, the rest by its own."""
    yield from (f"{name}   {_digest(digest)}" for name, digest in files.items())
    named = [(config.get(key), config.get("revision_of_model")) for key in MODELS]
    named += [(config.get("lora_model_dir"), None), (config.get("deepspeed"), None)]
    for _, entry in data_entries(config):
        named += [(entry.get("path"), entry.get("revision")), *((file, None) for file in strings(entry.get("data_files")))]
    for name, revision in dict.fromkeys((name, revision) for name, revision in named if isinstance(name, str)):
        if name not in READERS and not any(file == name or file.startswith(f"{name}/") for file in files):
            yield f"{name}, which was not hashed{'' if revision is None else f', at {revision}'}"
