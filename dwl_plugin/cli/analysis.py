"""What `check`, `inspect` and `preflight` see of a config: its problems, its classes, the rows that it would train on.

In order: the file, what it could run or fetch (`trust`), our block, what Axolotl says of the rest, the tokenizer, the first
rows. Each stage works on what the ones before it left, so that one mistake hides as little as possible.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dwl_plugin.cli.config_file import read_config
from dwl_plugin.cli.trust import Danger, dangers
from dwl_plugin.config import IGNORE_INDEX, REST, Block
from dwl_plugin.config.overrides import overridden, overrides_of
from dwl_plugin.config.salvage import salvage
from dwl_plugin.errors import ConfigError, Problem, did_you_mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dwl_plugin.alpha.run_length import RunLength
    from dwl_plugin.classes import ClassSurvey, Labeller
    from dwl_plugin.hosts.axolotl_preview import Rows

__all__ = ["Examination", "examine", "quiet_environment"]

_STAND_INS = {"learning_rate": 1e-5}
"""For what Axolotl must be given and is given wrongly: a value that changes nothing of what is looked at."""


@dataclass
class Examination:
    """Everything found. `block` is what is left of ours where `problems` is not empty."""

    config: Path
    raw: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    dangers: list[Danger] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    block: Block | None = None
    cfg: Any = None
    tokenizer: Any = None
    labeller: Labeller | None = None
    rows: Rows | None = None
    survey: ClassSurvey | None = None
    length: RunLength | None = None

    @property
    def stopped(self) -> bool:
        """There is something to trust first, and nobody said so."""
        return bool(self.dangers)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the rows looked at; the last is that of every target no class claims."""
        return (REST,) if self.labeller is None else self.labeller.names

    def members(self, sample: Mapping[str, Any], *, matched: bool = False) -> NDArray[np.bool_]:
        """(C, T) True where a target counts in a class of `class_names`; `matched`: where its selector matches, counted or not."""
        target_T: NDArray[np.bool_] = np.not_equal(sample["labels"], IGNORE_INDEX)
        if self.labeller is None:
            return np.atleast_2d(target_T)
        found_KT = self.labeller.members(sample["input_ids"], sample["labels"], sample.get("position_ids"))
        rest_1T = (target_T & ~found_KT.any(0))[None]
        if not matched and self.labeller.overlap == "first":
            found_KT &= np.cumsum(found_KT, axis=0) == 1
        return np.concatenate([found_KT, rest_1T])

    @property
    def status(self) -> int:
        """0: nothing wrong; 1: problems; 2: no problem, but not all could be looked at."""
        return 1 if self.problems else 2 if self.unseen or self.stopped else 0


def quiet_environment() -> None:
    """Before the host is imported: it is to report to nobody and to write no log of its own."""
    os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def examine(
    config: Path,
    samples: int,
    *,
    trust: bool,
    to_run: bool = False,
    spread: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Examination:
    """Look at a config as far as it goes; `say` is told each stage that takes time.

    Args:
        config: the YAML.
        samples: rows of the training set to tokenise.
        trust: go on although the config could run code or fetch things.
        to_run: the model is about to be loaded here.
        spread: take the rows from all over the data, as a run does that looks at it before its first step; else from its head.
    """
    seen = Examination(config)
    try:
        seen.raw, odd = read_config(config)
    except ConfigError as error:
        seen.problems += error.problems
        return seen
    seen.problems += odd
    _overrides(seen)
    seen.dangers = [] if trust else dangers(seen.raw)
    _our_block(seen)
    if seen.stopped:
        return seen
    quiet_environment()
    say("Axolotl reads the config")
    if not _host_config(seen, to_run):
        return seen
    say("The tokenizer")
    if not _tokenizer(seen):
        return seen
    say(f"{samples} rows")
    _look_at_rows(seen, samples, spread)
    _hints(seen)
    return seen


def _overrides(seen: Examination) -> None:
    """What the environment sets over the YAML, as the run would take it."""
    try:
        found = overrides_of(os.environ)
        seen.raw |= overridden(seen.raw, found) if found else {}
        seen.notes += map(str, found)
    except ConfigError as error:
        seen.problems += error.problems


def _our_block(seen: Examination) -> None:
    """`loss`, `dft`, `dwl`, and what cannot stand beside them."""
    from dwl_plugin.hosts.incompatible import refused

    seen.block, problems = salvage(seen.raw, [danger.path for danger in seen.dangers], folder=seen.config.parent)
    seen.problems += problems
    if not any(seen.raw.get(key) is not None for key in Block.model_fields):
        close = [f"`{key}`: {hint}" for key in seen.raw if (hint := did_you_mean(key, list(Block.model_fields)))]
        seen.problems.append(
            Problem(
                "loss",
                "this config has no `loss`, so dwl_plugin does nothing in it",
                allowed="nll, dft, dwl",
                hint="; ".join(close),
            )
        )
    loss = seen.raw.get("loss")
    seen.problems += refused(seen.raw, loss if loss in ("nll", "dft", "dwl") else "dwl") if loss is not None else []


def _host_config(seen: Examination, to_run: bool) -> bool:
    """What Axolotl says. Our keys go with it only if they are right: a host's validator stops at the first error."""
    from dwl_plugin.hosts import axolotl_preview as host

    try:
        _plugin_line(seen, host.plugin_is_active(seen.raw))
        left_out = set(Block.model_fields) if seen.problems else set()
        while seen.cfg is None:
            given = {key: value for key, value in seen.raw.items() if key not in left_out}
            given |= {key: value for key, value in _STAND_INS.items() if key in left_out}
            try:
                seen.cfg, notes = host.load_cfg(given, seen.config, to_run=to_run)
                seen.notes += notes
            except ConfigError as error:
                seen.problems += [problem for problem in error.problems if problem not in seen.problems]
                wrong = {re.split(r"[.\[]", problem.path)[0] for problem in error.problems} & given.keys()
                if not wrong or "base_model" in wrong:  # nothing to leave out and go on without
                    break
                left_out |= wrong | set(Block.model_fields)
    except host.NotSeenError as error:
        seen.unseen.append(f"{error}; without it there is no tokenizer and no data")
    except ImportError as error:
        seen.unseen.append(f"everything that Axolotl does: it cannot be imported here ({error})")
        return False
    _unknown_keys(seen, host)
    return seen.cfg is not None


def _plugin_line(seen: Examination, active: bool) -> None:
    """A `loss` that nobody computes is the worst mistake: the run trains plain cross-entropy and says nothing."""
    if seen.raw.get("loss") is None:
        return
    if not active:
        message = "`loss` is set, but dwl_plugin is not active: the run would train plain cross-entropy"
        hint = "add `- dwl_plugin.DWLPlugin` under `plugins:`"
        seen.problems.append(Problem("plugins", message, seen.raw.get("plugins"), hint=hint))
    elif not any("dwl_plugin" in str(name) for name in seen.raw.get("plugins") or ()):
        seen.hints.append(
            "the plugin is active because it is installed here; add `- dwl_plugin.DWLPlugin` under `plugins:`, or a machine "
            "without the package trains plain cross-entropy and says nothing"
        )


def _unknown_keys(seen: Examination, host: Any) -> None:
    for key in host.unknown_keys(seen.raw):
        close = did_you_mean(key, host.known_keys())
        seen.hints.append(f"Axolotl does not know the key `{key}` and drops it{'; ' + close if close else ''}")


def _tokenizer(seen: Examination) -> bool:
    """The tokenizer, and the classes that it can serve."""
    from dwl_plugin.hosts import axolotl_preview as host

    try:
        seen.tokenizer = host.load_tokenizer(seen.cfg)
    except ConfigError as error:
        seen.problems += error.problems
        return False
    except host.NotSeenError as error:
        seen.unseen.append(f"{error}; without it there is no data either")
        return False
    if seen.block is not None:
        seen.block, seen.labeller, problems = _labeller(seen.block, seen.tokenizer)
        seen.problems += problems
    return True


def _labeller(block: Block, tokenizer: Any) -> tuple[Block, Labeller | None, list[Problem]]:
    """The labeller of the classes that this tokenizer can serve, their block, and what is wrong with the others."""
    from dwl_plugin.run.dataset_check import labeller_of

    problems: list[Problem] = []
    while block.class_configs:
        try:
            return block, labeller_of(block, tokenizer), problems
        except ConfigError as error:
            problems += error.problems
            left, _ = salvage(block.dump(), leave_out=[problem.path for problem in error.problems])
            if left is None or len(left.class_configs) >= len(block.class_configs):
                return block, None, problems
            block = left
    return block, None, problems


def _look_at_rows(seen: Examination, samples: int, spread: bool) -> None:
    from dwl_plugin.classes import empty_class_problems, survey
    from dwl_plugin.config.classes import may_be_empty
    from dwl_plugin.hosts import axolotl_preview as host
    from dwl_plugin.run.dataset_check import SURVEY_ROWS

    try:
        seen.rows = host.load_rows(seen.cfg, seen.tokenizer, samples, spread=spread)
    except ConfigError as error:
        seen.problems += error.problems
        return
    except host.NotSeenError as error:
        seen.unseen.append(f"{error}{_beside_the_config(seen)}")
        return
    if seen.rows.looked_at and not seen.rows.samples:
        why = f"{seen.rows.too_long:,} are too long or too short, {seen.rows.masked:,} have no target"
        seen.problems.append(Problem("datasets", f"none of the {seen.rows.looked_at:,} rows looked at is left: {why}"))
        return
    seen.length = run_length(seen.cfg, seen.rows)
    if seen.block is None or seen.labeller is None:
        return
    try:
        seen.survey = survey(seen.labeller, seen.rows.samples)
    except ConfigError as error:  # a pattern that backtracks
        seen.problems += error.problems
        return
    empty = empty_class_problems(seen.survey, seen.block.class_configs, may_be_empty(seen.block.class_configs))
    if not seen.survey.targets or seen.rows.looked_at >= min(SURVEY_ROWS, seen.rows.total or SURVEY_ROWS):
        seen.problems += empty
    else:  # the run looks at more rows before it stops for that
        seen.notes += [f"{problem.path} {problem.message}; a run looks at {SURVEY_ROWS} rows" for problem in empty]


def run_length(cfg: Any, rows: Rows) -> RunLength:
    """How long the run would be, reckoned from the rows looked at; packing is taken to be 97 % full."""
    from dwl_plugin.alpha.run_length import RunLength

    per_epoch = None
    if rows.total and rows.looked_at and rows.samples:
        kept = rows.total * len(rows.samples) / rows.looked_at
        per_step = (cfg.micro_batch_size or 1) * (cfg.gradient_accumulation_steps or 1) * max(cfg.world_size or 1, 1)
        if rows.packs is not None:
            mean = sum(len(sample["input_ids"]) for sample in rows.samples) / len(rows.samples)
            kept *= mean / (0.97 * cfg.sequence_len)
        per_epoch = max(kept / per_step, 1.0)
    total = cfg.max_steps or (round(per_epoch * (cfg.num_epochs or 1)) if per_epoch else None)
    return RunLength(total, per_epoch)


def _beside_the_config(seen: Examination) -> str:
    """Axolotl takes relative paths from where it is started, not from where the config lies."""
    for entry in _entries(seen.raw):
        path = entry.get("path")
        if isinstance(path, str) and not Path(path).exists() and (seen.config.parent / path).exists():
            return f"; {path} lies beside the config, and Axolotl looks in the folder it is started from"
    return ""


def _entries(raw: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for entry in raw.get("datasets") or () if isinstance(raw.get("datasets"), Sequence) else ():
        if isinstance(entry, Mapping):
            yield entry


def _hints(seen: Examination) -> None:
    """What the run itself would say at its start."""
    from dwl_plugin.alpha.schedule import alpha_of
    from dwl_plugin.run.startup import hints

    if seen.block is None or seen.rows is None or seen.length is None:
        return
    picks = (seen.cfg.metric_for_best_model or "loss") if seen.cfg.load_best_model_at_end else None
    counts = None if seen.survey is None else seen.survey.counts
    try:
        alpha_at = alpha_of(seen.block, seen.length)
        seen.hints += [line.removeprefix("hint: ") for line in hints(seen.block, counts, alpha_at, seen.length, picks)]
    except ConfigError as error:
        seen.problems += [problem for problem in error.problems if problem not in seen.problems]
