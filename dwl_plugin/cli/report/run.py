"""A run, read from what its trainer left on the disk: `trainer_state.json` and our `dwl_config.yaml`. No host is imported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from dwl_plugin.config import Block, parse
from dwl_plugin.errors import DWLError
from dwl_plugin.values import REST

__all__ = ["LoggedCurve", "Run", "read_runs"]

STATE = "trainer_state.json"
CONFIG = "dwl_config.yaml"

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class LoggedCurve:
    """One number over the run; NaN where the step has none, such as a class that was absent from it."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __bool__(self) -> bool:
        return any(map(math.isfinite, self.values))

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last value there is."""
        return self._known[0], self._known[-1]

    @property
    def tenths(self) -> tuple[float, float]:
        """The means of the first and of the last tenth of the values: single batches are noisy."""
        count = max(len(self._known) // 10, 1)
        return fmean(self._known[:count]), fmean(self._known[-count:])

    @property
    def mean(self) -> float:
        return fmean(self._known)

    @cached_property
    def _known(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)] or [math.nan]

    def thinned(self, limit: int) -> LoggedCurve:
        """At most `limit` points, each the mean of as many neighbours."""
        width = math.ceil(len(self.steps) / limit)
        if width <= 1:
            return self
        parts = [LoggedCurve(self.steps[at : at + width], self.values[at : at + width]) for at in range(0, len(self.steps), width)]
        return LoggedCurve(tuple(part.steps[-1] for part in parts), tuple(part.mean for part in parts))


@dataclass(frozen=True)
class Run:
    """What a run logged. `train` and `evals` are its log entries in the order of their steps, one a step."""

    name: str
    state: Path
    block: Block | None
    classes: tuple[str, ...]
    train: tuple[Entry, ...]
    evals: tuple[Entry, ...]
    step: int
    max_steps: int
    notes: list[str]

    def curve(self, key: str) -> LoggedCurve:
        """A number of the training batches, e.g. ``dwl/nll/number``."""
        return _curve(self.train, key)

    def eval_curve(self, key: str) -> LoggedCurve:
        """The same of the evaluation set."""
        return _curve(self.evals, f"eval_{key}")

    @property
    def weighs_classes(self) -> bool:
        """Whether α was in the loss; under `nll` and `dft` classes are only measured."""
        if self.block is not None:
            return self.block.loss == "dwl"
        values = [value for name in self.classes for value in self.curve(f"dwl/alpha/{name}").values]
        return any(math.isfinite(value) and value != 1.0 for value in values)

    def nll(self, name: str | None) -> tuple[float, float]:
        """nll of a class, or of all targets, at the start and at the end: of the evaluation set if there is one."""
        key = "nll" if name is None else f"dwl/nll/{name}"
        return self.eval_curve(key).ends if self.evals else self.curve(key).tenths


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises `DWLError` where a folder holds no run of ours."""
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _read(folder: Path, name: str) -> Run:
    notes: list[str] = []
    path, state = _newest_state(folder, notes)
    history = [entry for entry in state["log_history"] if isinstance(entry, Mapping)]
    train = _entries(history, lambda key: key == "nll" or key.startswith("dwl/"))
    evals = _entries(history, lambda key: key == "eval_nll" or key.startswith("eval_dwl/"))
    if not train and not evals:
        why = "it has logged nothing yet" if not history else "it was trained without `loss:`, or without dwl_plugin"
        raise DWLError(f"{path} has none of dwl_plugin's figures: {why}.")
    if not evals:
        notes.append("No evaluation was logged (`val_set_size`, `eval_steps`), so nll is that of the training batches.")
    block = _block(folder, notes)
    step, max_steps = state.get("global_step"), state.get("max_steps")
    step = step if isinstance(step, int) else _step(history[-1])
    max_steps = max_steps if isinstance(max_steps, int) else 0
    return Run(name, path, block, _classes(block, (*train, *evals)), train, evals, step, max_steps, notes)


def _newest_state(folder: Path, notes: list[str]) -> tuple[Path, Mapping[str, Any]]:
    """The state that was written last, or one further along in the same run (copying a folder shuffles its times)."""
    if not folder.is_dir():
        raise DWLError(f"{folder} is not a folder. A run's folder is the `output_dir` of its YAML.")
    written: dict[Path, float] = {}
    for path in (folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")):
        with suppress(OSError):  # absent, or removed by the running trainer since it was listed
            written[path] = path.stat().st_mtime
    if not written:
        hint = next((f" Did you mean {path.parents[1]}?" for path in folder.glob(f"*/checkpoint-*/{STATE}")), "")
        raise DWLError(
            f"No {STATE} in {folder} or in its checkpoint folders: the trainer writes one with every checkpoint "
            f"(`save_steps`).{hint}"
        )
    found: list[tuple[Path, Mapping[str, Any]]] = []
    for path in sorted(written, key=lambda path: written[path], reverse=True):
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            notes.append(f"{path} cannot be read: {error.strerror}.")
        except ValueError:
            notes.append(f"{path} is cut off or is not JSON, and was passed over.")
        else:
            if not isinstance(state, Mapping) or not isinstance(state.get("log_history"), list):
                notes.append(f"{path} has no `log_history`; it is not a trainer's state.")
            elif not found or _continues(state, found[-1][1]):
                found.append((path, state))
    if not found:
        raise DWLError("\n".join(["No state of the run can be read.", *notes]))
    return found[-1]


def _continues(later: Mapping[str, Any], earlier: Mapping[str, Any]) -> bool:
    known = earlier["log_history"]
    return len(later["log_history"]) > len(known) > 0 and later["log_history"][: len(known)] == known


def _block(folder: Path, notes: list[str]) -> Block | None:
    path = next((at / CONFIG for at in (folder, folder.parent) if (at / CONFIG).is_file()), None)
    if path is None:
        return None
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return parse(raw) if isinstance(raw, Mapping) else None
    except (OSError, ValueError, yaml.YAMLError, DWLError):
        notes.append(f"{path} cannot be read by this version; classes are named as they were logged.")
        return None


def _entries(history: Iterable[Entry], ours: Callable[[str], bool]) -> tuple[Entry, ...]:
    """The entries with a figure of ours by step; where a step was logged twice, the later one."""
    by_step = {_step(entry): entry for entry in history if any(isinstance(key, str) and ours(key) for key in entry)}
    return tuple(by_step[step] for step in sorted(by_step))


def _step(entry: Entry) -> int:
    step = entry.get("step")
    return step if isinstance(step, int) else 0


def _curve(entries: Sequence[Entry], key: str) -> LoggedCurve:
    return LoggedCurve(tuple(map(_step, entries)), tuple(_number(entry.get(key)) for entry in entries))


def _number(value: object) -> float:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else math.nan  # type: ignore[arg-type]


def _classes(block: Block | None, entries: Iterable[Entry]) -> tuple[str, ...]:
    """In the order of the config; what only the log knows follows, `rest` last."""
    logged = {
        key.split("/", 2)[2]: None
        for entry in entries
        for key in entry
        if isinstance(key, str) and key.removeprefix("eval_").startswith(("dwl/nll/", "dwl/token_share/"))
    }
    named = dict.fromkeys([*(block.class_names if block is not None else ()), *logged])
    return tuple(sorted(named, key=lambda name: name == REST))


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell the runs apart."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1 if len(folders) > 1 else 2, max((len(part) for part in parts), default=1) + 2):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise DWLError("The same run was named twice.")
