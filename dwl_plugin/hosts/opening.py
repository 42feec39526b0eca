"""What a run says before its first step: which loss replaced which, and what α does to one token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import torch

from dwl_plugin.alpha.schedule import Alpha
from dwl_plugin.alpha.tau import RunLength
from dwl_plugin.config import Block
from dwl_plugin.loss.reduction import class_weights

__all__ = ["opening_lines"]


def opening_lines(
    block: Block,
    counts: Sequence[int] | None,
    alpha_at: Alpha,
    length: RunLength,
    replaced: str,
    best_metric: str | None,
) -> Iterator[str]:
    """Lines without their prefix. `counts`: surveyed targets per class; `replaced`: the loss the model came with;
    `best_metric`: what the host picks checkpoints by, if it does."""
    yield f"dwl_plugin {version('axolotl-dwl')}: `loss: {block.loss}` replaces {replaced}"
    if block.loss == "dft" and len(block.class_names) == 1:
        dft = block.token_losses[0]
        floor = f", at least {dft.min_weight:g}" if dft.min_weight else ""
        yield f"a token counts p^{dft.exponent:g}{floor} times; compare runs by `nll`, the DFT loss itself is several times smaller"
    if block.loss == "dwl" or len(block.class_names) > 1:
        yield from _table(block, counts, alpha_at)
    yield from _hints(block, counts, alpha_at, length, best_metric)


def _weights(block: Block, alpha: Sequence[float], counts: Sequence[int]) -> list[float]:
    """What one token of each class counts, where a token of SFT counts 1."""
    alpha_C, counts_C = torch.tensor(alpha, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)
    return [float(weight) for weight in class_weights(block.reduction, alpha_C, counts_C)]


def _table(block: Block, counts: Sequence[int] | None, alpha_at: Alpha) -> Iterator[str]:
    """DFT's own factor is left out of the weights here: it is not known before the model has run."""
    names, alpha = block.class_names, alpha_at(0)
    width = max(len("class"), *(len(name) for name in names))
    if counts is None or sum(counts) == 0:
        yield f"{'class':<{width}}       α"
        yield from (f"{name:<{width}}  {a:6.3f}" for name, a in zip(names, alpha, strict=True))
        return
    weights = _weights(block, alpha, counts)
    mass = [weight * count for weight, count in zip(weights, counts, strict=True)]
    yield f"{'class':<{width}}   tokens       α   one token, vs SFT   share of the weight"
    for name, a, count, weight, part in zip(names, alpha, counts, weights, mass, strict=True):
        tokens, share = 100 * count / sum(counts), 100 * part / (sum(mass) or 1.0)
        measured = f"{a:6.3f}" if block.loss == "dwl" else "     –"
        yield f"{name:<{width}}  {tokens:5.1f} %  {measured}  {weight:17.2f}×  {share:17.1f} %"


def _hints(
    block: Block, counts: Sequence[int] | None, alpha_at: Alpha, length: RunLength, best_metric: str | None
) -> Iterator[str]:
    moves = block.schedule is not None
    if moves and counts is not None and any(counts) and length.total_steps and block.reduction == "token_mean":
        means = [
            math.fsum(weight * count for weight, count in zip(alpha_at(tau), counts, strict=True)) / sum(counts)
            for tau in {round(length.total_steps * step / 100) for step in range(101)}
        ]
        low, high = min(means), max(means)
        if high > 2 * low:
            yield (
                f"hint: the mean weight of a token goes between {low:.3f} and {high:.3f} over the schedule, and the size of the "
                "gradients with it; `reduction: weighted_mean` keeps it steady"
            )
    if best_metric is not None and best_metric.removeprefix("eval_") == "loss" and (moves or block.loss == "dft"):
        why = "α moves" if moves else "is the DFT loss"
        yield (
            f"hint: checkpoints are picked by `eval_loss`, which {why}; `metric_for_best_model: eval_nll` compares "
            "what stays the same"
        )
