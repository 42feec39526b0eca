"""What a run writes before its first step: its settings, which loss replaced which, and what α does to one token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.alpha.schedules import Curve
from dwl_plugin.classes import ClassSurvey
from dwl_plugin.config import Block, ControllerOptions, LossControllerOptions
from dwl_plugin.errors import PREFIX, ConfigError, DWLError, printable, shortened
from dwl_plugin.files import write_whole
from dwl_plugin.loss.reduction import ClassWeight, class_weight_table
from dwl_plugin.loss.token_losses import SCHEDULED, DFTConfig
from dwl_plugin.run.moving import alpha_of, end_hints, token_losses_of
from dwl_plugin.run.record import MOST_KEPT_BYTES, RESOLVED_CONFIG, Record
from dwl_plugin.yaml_io import ExactDumper

__all__ = ["hints", "keep_config", "log_line", "other_length_lines", "other_options_lines", "startup_lines"]

_NEAR_ONE, _FAR_FROM_ONE = 0.8, 3
"""A loss of this share of SFT's size, and one that factors make so much larger or smaller, is not worth a hint."""


def log_line(line: str) -> None:
    """Print `line`, of several lines each, on the main process."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        with tqdm.external_write_mode():  # not behind the progress bar that the host has begun
            print("\n".join(f"{PREFIX} {printable(part)}" for part in line.splitlines()), flush=True)


def keep_config(block: Block, record: Record, config: Mapping[str, Any] | None, folder: Path) -> None:
    """For people, `dwl report` and `dwl export`. Training does not stop for want of it."""
    kept = {**block.dump(), "run": record.dump()}
    text = _yaml(kept if config is None else {**kept, "axolotl": dict(config)})
    if config is not None and len(text) > MOST_KEPT_BYTES:
        log_line(f"the config of this run is not kept: it has more than {MOST_KEPT_BYTES >> 10} KiB; `dwl export` needs it.")
        text = _yaml(kept)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RESOLVED_CONFIG, text)
    except (OSError, DWLError) as error:
        log_line(f"{error} Training goes on, and `dwl report` will not know this run's settings.")


def _yaml(kept: Mapping[str, Any]) -> bytes:
    return str(yaml.dump(dict(kept), Dumper=ExactDumper, sort_keys=False, allow_unicode=True)).encode()


def startup_lines(
    block: Block, found: ClassSurvey | None, alpha_at: Curve, length: RunLength, replaced: str, best_metric: str | None
) -> Iterator[str]:
    """Lines without their prefix. `found`: by a survey; `replaced`: the loss the model came with; `best_metric`: what the host
    picks checkpoints by, if it does."""
    yield f"dwl_plugin {version('axolotl-dwl')}: `loss: {block.loss}` replaces {replaced}"
    if block.loss == "dft" and len(block.class_names) == 1:
        dft = block.token_losses[0]
        assert isinstance(dft, DFTConfig)
        floor = f", at least {dft.min_weight:g}" if dft.min_weight else ""
        moving = "" if dft.schedule is None else f" at first (`dft.schedule`: {dft.schedule.type})"
        counts_as = f"a token counts p^{dft.exponent:g}{floor} times{moving}"
        yield f"{counts_as}; compare runs by `nll`, the DFT loss itself is several times smaller"
    if block.loss == "dwl" or len(block.class_names) > 1:
        yield from _table(block, found, alpha_at)
    if found is not None and found.weighed:
        taken_out = found.taken_out[-1]
        looked_at = found.targets + taken_out
        out = f"; {taken_out:,} of 0 are not trained" if taken_out else ""
        yield f"{found.weighed:,} of the {looked_at:,} targets looked at have a factor of the data other than 1{out}"
    if block.controller is not None:
        yield from _controller(block.controller)
    yield from hints(block, found, alpha_at, length, best_metric)


def _table(block: Block, found: ClassSurvey | None, alpha_at: Curve) -> Iterator[str]:
    names, alpha = block.class_names, alpha_at(0)
    width = max(len("class"), *(len(name) for name in names))
    if found is None or not found.targets:
        yield f"{'class':<{width}}       α"
        yield from (f"{name:<{width}}  {a:6.3f}" for name, a in zip(names, alpha, strict=True))
        return
    yield f"{'class':<{width}}   tokens       α   one token, vs SFT   share of the weight"
    for row in _weights(block, alpha, found):
        measured = f"{row.alpha:6.3f}" if block.loss == "dwl" else "     –"
        tokens, share = 100 * row.token_share, 100 * row.weight_share
        yield f"{row.name:<{width}}  {tokens:5.1f} %  {measured}  {row.one_token:17.2f}×  {share:17.1f} %"


def _size_hints(block: Block, found: ClassSurvey, alphas: Sequence[Sequence[float]]) -> Iterator[str]:
    """How large the whole loss is beside one in which every token counts once."""
    size_of = (math.fsum(row.token_share * row.one_token for row in _weights(block, alpha, found)) for alpha in alphas)
    sizes = list(size_of)
    first, low, high = sizes[0], min(sizes), max(sizes)
    if block.reduction == "sequence_mean_token_sum":
        each = found.targets / max(found.rows_with_targets, 1)
        yield (
            f"hint: the loss sums over a sample ({each:.0f} targets on average), so it and its gradients are {first:.3g}× those of "
            "SFT; look at `max_grad_norm`, or take `reduction: weighted_mean`, which keeps SFT's size"
        )
    elif block.reduction == "token_mean" and high > 2 * low:
        yield (
            f"hint: the mean weight of a token goes between {low:.3f} and {high:.3f} over the schedule, and the size of the "
            "gradients with it; `reduction: weighted_mean` keeps it steady"
        )
    elif (first < _NEAR_ONE or (found.weighed and first > _FAR_FROM_ONE)) and not block.writes_reduction:
        mean = "weight" if found.weighed else "α"
        yield (
            f"hint: the mean {mean} of a token is {first:.2f}, so the whole loss and its gradients are {first:.2f}× those of SFT, "
            "where a token counts 1; `reduction: weighted_mean` keeps SFT's size and the ratios of α (`reduction: token_mean`, "
            "written out, takes this hint away)"
        )


def _weights(block: Block, alpha: Sequence[float], found: ClassSurvey) -> list[ClassWeight]:
    return class_weight_table(block.reduction, block.class_names, alpha, found.counts, found.masses)


def _controller(options: ControllerOptions) -> Iterator[str]:
    looks_at = f"by the {options.signal} nll of the classes" if isinstance(options, LossControllerOptions) else "by itself"
    every = "step" if options.every == 1 else f"{options.every} steps"
    warmup = f", from {options.warmup} on" if options.warmup else ""
    yield f"{options.type} moves α every {every} {looks_at}{warmup}; no class falls below {options.min_alpha:g}"


def other_length_lines(block: Block, trained_for: RunLength, length: RunLength, tau: int) -> Iterator[str]:
    """A resumed run that is not as long as its checkpoint was trained for: shares and epochs lie elsewhere now."""
    if trained_for == length or not block.moves:
        return
    for what, key in (("steps", "total_steps"), ("steps per epoch", "steps_per_epoch")):
        old, new = getattr(trained_for, key), getattr(length, key)
        if old != new:
            yield f"resumed at step {tau}: the checkpoint was trained for {_known(old)} {what}, this run has {_known(new)}"
    for path in block.schedules:
        try:
            before, now = (_numbers(block, path, run, tau) for run in (trained_for, length))
        except ConfigError:  # the run before could not place its positions in the way they are written now
            continue
        if before != now:
            told = ", ".join(f"{name} {a:.3f} → {now[name]:.3f}" for name, a in before.items())
            what = "α jumps" if path == "dwl.schedule" else "its numbers jump"
            yield f"positions of `{path}` count in this run's length, so {what} at step {tau}: {told}"


def _numbers(block: Block, path: str, length: RunLength, tau: int) -> dict[str, float]:
    """What the schedule at `path` makes of its numbers at τ."""
    if path == "dwl.schedule":
        return dict(zip(block.class_names, alpha_of(block, length)(tau), strict=True))
    at = token_losses_of(block, length)
    assert at is not None
    loss = at(tau)[block.dft_paths.index(path.removesuffix(".schedule"))]
    return {name: getattr(loss, name) for name in SCHEDULED}


def other_options_lines(options: ControllerOptions, saved: Mapping[str, Any]) -> Iterator[str]:
    """A resumed run whose controller has other options than its checkpoint's, as `Controller.state` keeps them."""
    now = options.model_dump(mode="json")
    changed = [key for key in now.keys() | saved.keys() if now.get(key) != saved.get(key)]
    if changed:
        told = ", ".join(
            f"`{shortened(key)[1:-1]}` {shortened(saved.get(key))} → {shortened(now.get(key))}" for key in sorted(changed)
        )
        yield f"the controller goes on with what it has learned and with other options than its checkpoint's: {told}"


def _known(number: float | None) -> str:
    return "an unknown number of" if number is None else f"{number:g}"


def hints(block: Block, found: ClassSurvey | None, alpha_at: Curve, length: RunLength, best_metric: str | None) -> Iterator[str]:
    """What is likely not meant, in the arguments of `startup_lines`."""
    moves = block.schedule is not None or block.controller is not None
    if length.total_steps:
        yield from end_hints(block, length)
    alphas = [alpha_at(0)]
    if block.schedule is not None and length.total_steps:
        alphas = [alpha_at(tau) for tau in sorted({round((length.total_steps - 1) * k / 500) for k in range(501)})]
        if block.schedule.type != "constant" and len(set(alphas)) == 1:
            yield f"hint: the schedule does not move α within the {length.total_steps} steps of this run"
    if found is not None and found.targets and not found.weighed and (names := block.data_weights) is not None:
        asked = ", ".join(f"`{name}` of a {place}" for place, name in names.names.items())
        yield f"hint: `dwl.data_weights` changes nothing in the {found.rows:,} rows looked at, where every factor is 1 ({asked})"
    if found is not None and found.targets and block.loss != "dwl":
        mean = found.mass[-1] / found.targets
        if not 1 / _FAR_FROM_ONE < mean < _FAR_FROM_ONE:
            yield (
                f"hint: the mean factor of the data is {mean:.3g}, so the loss and its gradients are {mean:.3g}× as large; "
                "`loss: dwl` with `reduction: weighted_mean` divides by it"
            )
    if found is not None and found.targets and block.loss == "dwl":
        yield from _size_hints(block, found, alphas)
    if best_metric is not None and best_metric.removeprefix("eval_") == "loss" and (moves or block.loss == "dft"):
        why = "α moves" if moves else "is the DFT loss"
        yield (
            f"hint: checkpoints are picked by `eval_loss`, which {why}; `metric_for_best_model: eval_nll` compares "
            "what stays the same"
        )
