"""A run, read from what its trainer left on the disk: `trainer_state.json` and our `dwl_config.yaml`. No host is imported.

Somebody else may have made the folder: files are read up to a size, numbers are taken if a run can come to them, and nothing is
fetched. What was left out is in the notes.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from dwl_plugin.config import Block, parse
from dwl_plugin.config.problems import nodes
from dwl_plugin.errors import DWLError, first_line
from dwl_plugin.files import read_regular
from dwl_plugin.run.curve import LoggedCurve, key_of
from dwl_plugin.run.record import MOST_KEPT_BYTES, RESOLVED_CONFIG, Record
from dwl_plugin.values import REST
from dwl_plugin.yaml_io import load_plain_yaml

__all__ = ["MOST_CLASSES", "Run", "largest", "read_runs", "settings_of"]

STATE = "trainer_state.json"

Entry = Mapping[str, float]
"""The numbers of a row of the log, its step among them. NaN is what the trainer logged and is no number, or none of a run."""

_STATE_BYTES = 256 << 20
_ALL_STATES_BYTES = 1 << 30
_STATE_VALUES = 6_000_000
"""About as many as a state of that size has; of shorter ones the same bytes hold so many that they fill the memory."""

_LARGEST = 10**15
"""A step or a number beyond it is a mistake. Larger ones overflow in sums, on axes and in columns."""

MOST_CLASSES = 100
_MOST_STEPS = 100_000
_MOST_NOTES = 10


@dataclass(frozen=True)
class Run:
    """What a run logged. `train` and `evals` are its log entries in the order of their steps, one a step.

    `token_share` is a class's mean share of the targets, of the training batches where there are any; NaN if it was never logged.
    `data_sets` are there where several were told apart, in the order in which they appeared.
    `files` are those that a report reads, or would read next time.
    """

    name: str
    state: Path
    files: tuple[Path, ...]
    block: Block | None
    record: Record | None
    classes: tuple[str, ...]
    token_share: Mapping[str, float]
    data_sets: tuple[str, ...]
    train: tuple[Entry, ...]
    evals: tuple[Entry, ...]
    step: int
    max_steps: int
    notes: list[str]

    def curve(self, key: str) -> LoggedCurve:
        """A number of the training batches, e.g. ``dwl/nll/number``."""
        return _curve(self._train_steps, self.train, key)

    def eval_curve(self, key: str) -> LoggedCurve:
        """The same of the evaluation set."""
        return _curve(self._eval_steps, self.evals, f"eval_{key}")

    @cached_property
    def _train_steps(self) -> tuple[int, ...]:
        return tuple(map(_step, self.train))

    @cached_property
    def _eval_steps(self) -> tuple[int, ...]:
        return tuple(map(_step, self.evals))

    @cached_property
    def weighs_classes(self) -> bool:
        """Whether α was in the loss; under `nll` and `dft` classes are only measured."""
        if self.block is not None:
            return self.block.loss == "dwl"
        alphas = (value for entry in self.train for key, value in entry.items() if key.startswith("dwl/alpha/"))
        return any(math.isfinite(value) and value != 1.0 for value in alphas)

    def nll(self, name: str | None) -> tuple[float, float]:
        """nll of a class, or of all targets, at the start and at the end: of the evaluation set if there is one."""
        return self.measured(key_of("nll", name))

    def measured(self, key: str) -> tuple[float, float]:
        """Any number of both, e.g. ``dwl/p/number``, in the same way."""
        return self.eval_curve(key).ends if self.evals else self.curve(key).tenths


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises `DWLError` where a folder holds no run of ours."""
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def settings_of(folder: Path) -> tuple[Block, Record, Mapping[str, Any]]:
    """The loss of a run by Axolotl, what it was made of, and the other keys of its config, from its folder or a checkpoint in it.

    Raises `DWLError` where they are not there.
    """
    path = _config_of(folder)
    if path is None:
        writes = "a run with `loss:` writes one into its `output_dir` as it begins"
        raise DWLError(f"There is no {RESOLVED_CONFIG} in {folder}: {writes}.")
    try:
        raw = load_plain_yaml(read_regular(path, MOST_KEPT_BYTES).decode(), str(path))
        if not isinstance(raw, Mapping) or any(_has_pack(raw)):
            raise DWLError(f"{path} is not what a run writes.")
        if not isinstance(raw.get("axolotl"), Mapping):
            why = "the run was by `dwl_plugin.apply`, which takes this file as it is, or by an earlier version"
            raise DWLError(f"{path} has the loss of a run and no config of Axolotl: {why}.")
        block, record = parse(raw), Record.model_validate(raw.get("run", {}))
    except (ValueError, RecursionError) as error:
        raise DWLError(f"{path} cannot be read by this version: {first_line(error)}") from None
    if block is None:
        raise DWLError(f"{path} has no `loss`.")
    return block, record, raw["axolotl"]


def _read(folder: Path, name: str) -> Run:
    notes: list[str] = []
    written, config = _states(folder), _config_of(folder)
    state = _newest(written, notes)
    notes += state.notes
    train, evals = _entries(state.log, _of_training, notes), _entries(state.log, _of_evaluation, notes)
    if not train and not evals:
        why = "it was trained without `loss:`, or without dwl_plugin" if state.log else "it has logged nothing yet"
        raise DWLError("\n".join([f"{state.path} has none of dwl_plugin's figures: {why}.", *_few(notes)]))
    if not evals:
        notes.append("No evaluation was logged (`val_set_size`, `eval_steps`), so nll is that of the training batches.")
    block, record = (None, None) if config is None else _settings(config, notes)
    step = max(_step(entries[-1]) for entries in (train, evals) if entries) if state.step is None else state.step
    shares = _token_shares(train, "dwl/token_share/") if train else _token_shares(evals, "eval_dwl/token_share/")
    classes = _classes(block, (*train, *evals))
    if (count := len(classes)) > MOST_CLASSES:
        classes = tuple(largest(classes, shares, MOST_CLASSES))
        notes.append(f"Of {count:,} classes the {MOST_CLASSES} with the most tokens are shown.")
    data_sets = _data_sets((*train, *evals))
    if (count := len(data_sets)) > MOST_CLASSES:
        data_sets = data_sets[:MOST_CLASSES]
        notes.append(f"Of {count:,} data sets the first {MOST_CLASSES} are shown.")
    files = (*written, *([] if config is None else [config]))
    token_share = {name: shares.get(name, math.nan) for name in classes}
    max_steps = state.max_steps or 0
    return Run(name, state.path, files, block, record, classes, token_share, data_sets, train, evals, step, max_steps, _few(notes))


def largest(names: Sequence[str], share: Mapping[str, float], limit: int) -> list[str]:
    """The `limit` names with the largest share, in the order of `names`."""
    kept = set(sorted(names, key=lambda name: share.get(name, 0.0), reverse=True)[:limit])
    return [name for name in names if name in kept]


def _few(notes: list[str]) -> list[str]:
    more = len(notes) - _MOST_NOTES
    return notes if more <= 1 else [*notes[:_MOST_NOTES], f"And {more:,} more such lines."]


def _states(folder: Path) -> dict[Path, os.stat_result]:
    """What bears a state's name in a run's folder, the last written first."""
    if not os.path.isdir(folder):
        raise DWLError(f"{folder} is not a folder. A run's folder is the `output_dir` of its YAML.")
    found: dict[Path, os.stat_result] = {}
    try:
        for path in (folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")):
            with suppress(OSError):  # absent, or removed by the running trainer since it was listed
                found[path] = path.stat()
        if found:
            return dict(sorted(found.items(), key=lambda item: item[1].st_mtime, reverse=True))
        hint = next((f" Did you mean {path.parents[1]}?" for path in folder.glob(f"*/checkpoint-*/{STATE}")), "")
    except OSError as error:
        raise DWLError(f"{folder} cannot be listed: {error.strerror or error}.") from error
    raise DWLError(
        f"No {STATE} in {folder} or in its checkpoint folders: the trainer writes one with every checkpoint (`save_steps`).{hint}"
    )


class _State(NamedTuple):
    path: Path
    log: list[Entry]
    step: int | None
    max_steps: int | None
    notes: list[str]


def _newest(written: Mapping[Path, os.stat_result], notes: list[str]) -> _State:
    """The state that was written last, or one further along in the same run (copying a folder shuffles its times)."""
    newest, size, total = None, 0, 0
    for count, (path, found) in enumerate(written.items()):
        if newest is not None and found.st_size <= size:  # further along is longer
            continue
        total += min(found.st_size, _STATE_BYTES)
        if total > _ALL_STATES_BYTES:
            notes.append(f"{len(written) - count:,} older states were not looked at: there is more than 1 GiB of them.")
            break
        try:
            state = _parsed(path, read_regular(path, _STATE_BYTES))
        except DWLError as error:
            notes.append(str(error))
            continue
        if newest is None or _continues(state.log, newest.log):
            newest, size = state, found.st_size
    if newest is None:
        raise DWLError("\n".join(["No state of the run can be read.", *_few(notes)]))
    return newest


def _continues(later: list[Entry], earlier: list[Entry]) -> bool:
    return len(later) > len(earlier) > 0 and later[: len(earlier)] == earlier


def _parsed(path: Path, content: bytes) -> _State:
    if content.count(b",") > _STATE_VALUES:
        raise DWLError(f"{path} was passed over: it holds more than {_STATE_VALUES:,} values.")
    try:
        state = json.loads(content)
    except (ValueError, RecursionError):
        raise DWLError(f"{path} is cut off or is no JSON that a trainer writes, and was passed over.") from None
    if not isinstance(state, Mapping) or not isinstance(state.get("log_history"), list):
        raise DWLError(f"{path} has no `log_history`; it is not a trainer's state.")
    log, notes = _log(state["log_history"])
    return _State(path, log, _whole(state.get("global_step")), _whole(state.get("max_steps")), notes)


def _log(history: Sequence[object]) -> tuple[list[Entry], list[str]]:
    """The numbers in a trainer's log, and what is odd about it."""
    log: list[Entry] = []
    strange = unplaced = large = 0
    for row in history:
        if not isinstance(row, Mapping):
            strange += 1
            continue
        entry = {key: _number(value) for key, value in row.items()}
        if any(map(_ours, entry)):
            large += sum(
                1 for key, value in entry.items() if math.isnan(value) and (_ours(key) or key == "loss") and _is_large(row[key])
            )
            if _whole(row.get("step")) is None:
                unplaced += 1
                entry["step"] = math.nan
        log.append(entry)
    notes = []
    if strange:
        notes.append(f"{_entries_were(strange)} left out, no mapping of names to numbers.")
    if unplaced:
        notes.append(f"{_entries_were(unplaced)} left out, without a step or with one that is none.")
    if large:
        notes.append(f"{'1 number was' if large == 1 else f'{large:,} numbers were'} left out, infinite or beyond ±{_LARGEST:.0e}.")
    return log, notes


def _entries_were(count: int) -> str:
    return "1 entry of the log was" if count == 1 else f"{count:,} entries of the log were"


def _number(value: object) -> float:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
    return float(value) if usable else math.nan  # type: ignore[arg-type]


def _is_large(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) > _LARGEST


def _whole(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= _LARGEST else None


def _of_training(key: str) -> bool:
    return key == "nll" or key.startswith("dwl/")


def _of_evaluation(key: str) -> bool:
    return key == "eval_nll" or key.startswith("eval_dwl/")


def _ours(key: str) -> bool:
    return _of_training(key) or _of_evaluation(key)


def _config_of(folder: Path) -> Path | None:
    return next((at / RESOLVED_CONFIG for at in (folder, folder.parent) if os.path.exists(at / RESOLVED_CONFIG)), None)


def _settings(path: Path, notes: list[str]) -> tuple[Block | None, Record | None]:
    """Those of the loss, and what the run was made of; runs of earlier versions kept the first alone."""
    record = None
    try:
        content = read_regular(path, MOST_KEPT_BYTES)
    except DWLError as error:
        notes.append(f"{error} Classes are named as they were logged.")
        return None, None
    try:
        raw = load_plain_yaml(content.decode(), str(path))
        if not isinstance(raw, Mapping) or any(_has_pack(raw)):
            raise DWLError("not what we write")
        with suppress(ValueError):
            record = Record.model_validate(raw["run"]) if "run" in raw else None
        return parse(raw), record
    except (ValueError, RecursionError, DWLError):
        notes.append(f"{path} cannot be read by this version; classes are named as they were logged.")
        return None, record


def _has_pack(raw: Mapping[str, Any]) -> Iterator[bool]:
    """A run's config has the classes of its packs; with a `pack` it is by somebody else, and reading that could fetch it."""
    for path, node, _ in nodes(raw.get("dwl"), "dwl"):
        yield isinstance(node, Mapping) and "pack" in node and (path == "dwl" or path.startswith("dwl.classes."))


def _entries(log: Iterable[Entry], ours: Callable[[str], bool], notes: list[str]) -> tuple[Entry, ...]:
    """The entries with a figure of ours by step; where a step was logged twice, the later one."""
    by_step = {_step(entry): entry for entry in log if any(map(ours, entry)) and math.isfinite(entry["step"])}
    steps = sorted(by_step)
    if (count := len(steps)) > _MOST_STEPS:
        steps = [steps[at * (count - 1) // (_MOST_STEPS - 1)] for at in range(_MOST_STEPS)]
        notes.append(f"Of {count:,} logged steps {_MOST_STEPS:,} are used, evenly spread.")
    return tuple(by_step[step] for step in steps)


def _step(entry: Entry) -> int:
    return int(entry["step"])


def _curve(steps: tuple[int, ...], entries: Sequence[Entry], key: str) -> LoggedCurve:
    return LoggedCurve(steps, tuple(entry.get(key, math.nan) for entry in entries))


def _token_shares(entries: Iterable[Entry], prefix: str) -> dict[str, float]:
    shares = defaultdict[str, list[float]](list)
    for entry in entries:
        for key, value in entry.items():
            if key.startswith(prefix) and math.isfinite(value):
                shares[key.removeprefix(prefix)].append(value)
    return {name: fmean(values) for name, values in shares.items()}


def _classes(block: Block | None, entries: Iterable[Entry]) -> tuple[str, ...]:
    """In the order of the config; what only the log knows follows, `rest` last."""
    logged = {
        key.split("/", 2)[2]: None
        for entry in entries
        for key in entry
        if key.removeprefix("eval_").startswith(("dwl/nll/", "dwl/token_share/"))
    }
    named = dict.fromkeys([*(block.class_names if block is not None else ()), *logged])
    return tuple(sorted(named, key=lambda name: name == REST))


def _data_sets(entries: Iterable[Entry]) -> tuple[str, ...]:
    before = "dwl/dataset/token_share/"
    keys = (key.removeprefix("eval_") for entry in entries for key in entry)
    return tuple(dict.fromkeys(key.removeprefix(before) for key in keys if key.startswith(before)))


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell the runs apart."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1 if len(folders) > 1 else 2, max((len(part) for part in parts), default=1) + 2):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise DWLError("The same run was named twice.")
