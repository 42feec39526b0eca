"""What `check`, `inspect`, `suggest`, `preflight` and `score` find out of a config, in three stages: the file is read
(`first_look`, which is told at once), Axolotl and the tokenizer validate it, and rows are looked at. Each stage works on what the
one before left, so that one mistake hides little else.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.classes import ClassSurvey, Labeller, empty_class_problems, survey, trained_on
from dwl_plugin.classes.data_codes import DATA_CODES
from dwl_plugin.cli.first_look import Findings, Raw, Teller, first_look
from dwl_plugin.cli.progress import progress
from dwl_plugin.cli.trust import dangers
from dwl_plugin.cli.wall import came_from_wall, look_only
from dwl_plugin.config import Block
from dwl_plugin.config.classes import may_be_empty
from dwl_plugin.config.salvage import salvage
from dwl_plugin.errors import ConfigError, Problem
from dwl_plugin.hosts import axolotl_preview as host
from dwl_plugin.hosts.axolotl_args import fused_losses_asked_for
from dwl_plugin.hosts.axolotl_data import data_set_names
from dwl_plugin.hosts.axolotl_keys import dropped_keys
from dwl_plugin.hosts.axolotl_preview import Rows
from dwl_plugin.hosts.needed_files import MISSING_DATA, MODELS
from dwl_plugin.hosts.plugin_line import LINE, names_plugin
from dwl_plugin.run.dataset_check import SURVEY_ROWS, labeller_of, no_rows, no_targets
from dwl_plugin.values import REST

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dwl_plugin.loss.reduction import ClassWeight

__all__ = ["ClassFigures", "LookedAt", "analyse", "looking"]

_ROWS = [{"path": "json", "type": "alpaca"}]
_STAND_INS = {
    "learning_rate": 1e-5,
    "datasets": _ROWS,
    "test_datasets": _ROWS,
    "pretraining_dataset": [{"path": "json", "type": "pretrain"}],
}
"""For what Axolotl must be given and is given wrongly: a value that changes nothing of what is looked at."""
_ROWS_OF = ("datasets", "pretraining_dataset")


class ClassFigures(NamedTuple):
    """A class in the rows looked at. `mass` is Σ|v|, as in a survey; `weight`, `alpha_end`: under `loss: dwl` without problems."""

    name: str
    tokens: int
    token_share: float
    mass: float
    rows_without: int
    weight: ClassWeight | None
    alpha_end: float


@dataclass(frozen=True)
class LookedAt:
    """A config as it is written and as Axolotl would train it, and rows of its data; `block` and `labeller` are of the classes that
    the tokenizer can serve, `survey` and `figures` of these in the rows, if there are any to look for."""

    raw: Mapping[str, Any]
    cfg: Any
    tokenizer: Any
    block: Block | None
    labeller: Labeller | None
    rows: Rows
    length: RunLength
    survey: ClassSurvey | None = None
    figures: tuple[ClassFigures, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The last is that of every target no class claims."""
        return (REST,) if self.labeller is None else self.labeller.names

    def members(self, sample: Mapping[str, Any], *, matched: bool = False) -> NDArray[np.bool_]:
        """(C, T) True where a target counts in a class of `class_names`; `matched`: where its selector matches, counted or not."""
        target_T = trained_on(sample)
        if self.labeller is None:
            return np.atleast_2d(target_T)
        found_KT = (
            self.labeller.members(sample["input_ids"], sample["labels"], sample.get("position_ids"), sample.get(DATA_CODES))
            & target_T
        )
        rest_1T = (target_T & ~found_KT.any(0))[None]
        if not matched and self.labeller.overlap == "first":
            found_KT &= np.cumsum(found_KT, axis=0) == 1
        return np.concatenate([found_KT, rest_1T])


def analyse(
    path: Path,
    samples: int,
    trust: bool,
    to_run: bool = False,
    spread: bool = False,
    change: Callable[[Raw], Raw] = dict,
    tell: Teller | None = None,
) -> tuple[Findings, LookedAt | None]:
    """Go through the stages as far as it goes.

    Args:
        path: the YAML.
        samples: rows of the training set to tokenise.
        trust: go on although the config could run code or fetch things.
        to_run: the model is about to be loaded here.
        spread: take the rows from all over the data, as a run does that looks at it before its first step; else from its head.
        change: what to read in place of the file's mapping.
        tell: told what the file alone shows, before anything is loaded.
    """
    found = Findings(path)
    try:
        raw, block = first_look(found, trust, tell or Teller(None), change)
        with progress("Axolotl is being loaded to look at the rest, 10 to 20 seconds") as step:
            found.dangers.extend([] if trust else dangers(raw))
            if found.dangers or any(problem.path in MODELS for problem in found.problems):
                return found, None
            with looking(found, trust) as lost:
                step("Axolotl reads the config")
                lost.append("; without it there is no tokenizer and no data")
                cfg = _host_config(raw, found, to_run)
                found.looked_at.append("Axolotl's own keys")
                lost.append("; without it there is no data either")
                tokenizer = host.load_tokenizer(cfg)
                found.looked_at.append("the tokenizer")
                block, labeller = _labeller(block, tokenizer, cfg, found)
                found.problems[:] = [problem for problem in found.problems if not _prepared_anyway(problem, cfg, tokenizer, block)]
                if any(problem.path.startswith(_ROWS_OF) for problem in found.problems):
                    return found, None
                step(f"Up to {samples:,} rows are tokenised and looked at")
                lost.append("")
                rows = host.load_rows(cfg, tokenizer, samples, block, spread=spread)
                found.looked_at.append(f"{rows.looked_at:,} rows")
                _dropped_weights(rows, raw, block, found)
                found.problems.extend(host.vocabulary_problems(cfg, tokenizer, rows.samples))
                return found, _look_at(LookedAt(raw, cfg, tokenizer, block, labeller, rows, run_length(cfg, rows)), found)
    except ConfigError as error:
        found.add(error)
    except ImportError as error:
        found.unseen.append(f"everything that Axolotl does: it cannot be imported here ({error})")
    return found, None


@contextlib.contextmanager
def looking(found: Findings, trust: bool) -> Iterator[list[str]]:
    """Behind the wall, unless the config is trusted; what goes wrong in the block is found, and does not leave it.

    The block may append what is lost with a part that cannot be loaded: the last is said.
    """
    lost = [""]
    with look_only(trust) as refused:
        try:
            yield lost
        except ConfigError as error:
            found.add(error)
        except host.NotSeenError as error:
            if not came_from_wall(error):
                found.unseen.append(f"{error}{lost[-1]}")
    found.dangers.extend(refused)


def _host_config(raw: Mapping[str, Any], found: Findings, to_run: bool) -> Any:
    """What Axolotl says. Our keys go with it only if they are right: a host's validator stops at the first error."""
    _plugin_line(raw, found, host.plugin_is_active(raw))
    if raw.get("loss") is not None and (fused := [f"`{key}`" for key in fused_losses_asked_for(raw)]):
        found.notes.append(f"a run switches {' and '.join(fused)} off: `loss: {raw['loss']}` is computed in its place")
    left_out = set(Block.model_fields) if found.problems else set()
    left_out |= {key for key in ("datasets", "test_datasets") if not _is_list_of_mappings(raw.get(key))}
    try:
        while True:
            given = {key: value for key, value in raw.items() if key not in left_out}
            given |= {key: value for key, value in _STAND_INS.items() if key in left_out}
            try:
                cfg, notes = host.load_cfg(given, found.path, to_run=to_run)
                found.notes.extend(notes)
                return cfg
            except ConfigError as error:
                told = [problem for problem in error.problems if not _for_want_of(left_out, problem)]
                if not came_from_wall(error):
                    found.add(ConfigError(told))
                wrong = {re.split(r"[.\[]", problem.path)[0] for problem in told} & given.keys()
                if not wrong or "base_model" in wrong:  # nothing to leave out and go on without
                    raise ConfigError(told) from error
                left_out |= wrong | set(Block.model_fields)
    finally:
        named = " ".join(problem.message for problem in found.problems)
        for key, what in dropped_keys(raw):
            if f"`{key}`" not in named and key not in Block.model_fields:
                found.hints.append(f"Axolotl does not know the key `{key}` and drops it{'; ' + what if what else ''}")


def _is_list_of_mappings(value: Any) -> bool:
    """Or nothing; over all else Axolotl's validators stumble."""
    return value is None or (isinstance(value, list) and all(isinstance(entry, (Mapping, list)) for entry in value))


def _for_want_of(left_out: set[str], problem: Problem) -> bool:
    """Whether Axolotl complains of what was kept from it, because it was wrong."""
    wanted = left_out - set(Block.model_fields)
    return problem.path in left_out or (problem.path == "axolotl" and bool(wanted & {*re.findall(r"\w+", problem.message)}))


def _plugin_line(raw: Mapping[str, Any], found: Findings, active: bool) -> None:
    """A `loss` that nobody computes is the worst mistake: the run trains plain cross-entropy and says nothing."""
    if raw.get("loss") is None:
        return
    if not active:
        message = "`loss` is set, but dwl_plugin is not active: the run would train plain cross-entropy"
        hint = f"add `- {LINE}` under `plugins:`"
        found.problems.append(Problem("plugins", message, raw.get("plugins"), hint=hint))
    elif not names_plugin(raw):
        found.hints.append(
            f"the plugin is active because it is installed here; add `- {LINE}` under `plugins:`, or a machine "
            "without the package trains plain cross-entropy and says nothing"
        )


def _labeller(block: Block | None, tokenizer: Any, cfg: Any, found: Findings) -> tuple[Block | None, Labeller | None]:
    """The labeller of the classes that the tokenizer can serve, and their block."""
    while block is not None and block.labels_tokens:
        try:
            return block, labeller_of(block, tokenizer, data_set_names(cfg, block))
        except ConfigError as error:
            found.add(error)
            left, _ = salvage(block.dump(), leave_out=[problem.path for problem in error.problems])
            if left is None or len(left.class_configs) >= len(block.class_configs):
                break
            block = left
    return block, None


def _dropped_weights(rows: Rows, raw: Mapping[str, Any], block: Block | None, found: Findings) -> None:
    """Weights of the data that change nothing; not where the config says `data_weights: false`, or means to read them."""
    written = raw.get("dwl")
    weights = None if block is None else block.data_weights
    if weights is None and isinstance(written, Mapping) and written.get("data_weights") is not None:
        return
    for weight in rows.dropped:
        (found.hints if weight.is_certain else found.notes).append(weight.sentence(weights, raw.get("loss") is not None))


def _look_at(seen: LookedAt, found: Findings) -> LookedAt:
    """Find the classes in the rows, and what a run would hint at its start."""
    from dwl_plugin.loss.reduction import class_weight_table
    from dwl_plugin.run.moving import alpha_of
    from dwl_plugin.run.startup import hints

    block, rows, length, classes = seen.block, seen.rows, seen.length, None
    if not rows.samples:
        why = f"of the {rows.looked_at:,} looked at {rows.too_long:,} are too long or too short, {rows.masked:,} have no target"
        found.problems.append(no_rows(why=why) if rows.looked_at else no_rows())
        return seen
    if block is None:
        return seen
    try:
        classes = survey(seen.labeller, rows.samples)
        if not classes.targets:
            found.problems.append(no_targets(classes.rows, taken_out=classes.taken_out[-1]))
            return seen
        _empty_classes(classes, block, rows, found)
    except ConfigError as error:  # a pattern that backtracks
        found.add(error)
    picks = (seen.cfg.metric_for_best_model or "loss") if seen.cfg.load_best_model_at_end else None
    start = end = block.alpha
    try:
        alpha_at = alpha_of(block, length)
        start, end = alpha_at(0), alpha_at(length.total_steps or 0)
        lines = hints(block, classes, alpha_at, length, picks)
        found.hints.extend(line.removeprefix("hint: ") for line in lines)
    except ConfigError as error:
        found.add(error)
    if classes is None or seen.labeller is None:
        return seen
    weighed = block.loss == "dwl" and not found.problems
    weights = class_weight_table(block.reduction, block.class_names, start, classes.counts, classes.masses)
    columns = zip(weights, end, classes.tokens, classes.mass, classes.rows_without, strict=False)
    figures = tuple(
        ClassFigures(weight.name, tokens, weight.token_share, mass, without, weight if weighed else None, alpha_end)
        for weight, alpha_end, tokens, mass, without in columns
    )
    return replace(seen, survey=classes, figures=figures)


def _empty_classes(classes: ClassSurvey, block: Block, rows: Rows, found: Findings) -> None:
    empty = empty_class_problems(classes, block.class_configs, may_be_empty(block.class_configs))
    if rows.looked_at >= min(SURVEY_ROWS, rows.total or SURVEY_ROWS):
        found.problems.extend(empty)
    else:  # the run looks at more rows before it stops for that
        found.notes.extend(f"{problem.path} {problem.message}; a run looks at {SURVEY_ROWS} rows" for problem in empty)


def run_length(cfg: Any, rows: Rows) -> RunLength:
    """How long the run would be, reckoned from the rows looked at; packing is taken to be 97 % full."""
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


def _prepared_anyway(problem: Problem, cfg: Any, tokenizer: Any, block: Block | None) -> bool:
    """Whether rows are missing that a run does not ask for, as those made of them are there."""
    key = problem.path.partition("[")[0]
    return problem.message in MISSING_DATA and key in ("datasets", "test_datasets") and host.is_prepared(cfg, tokenizer, key, block)
