"""What a run logs, number by number: what it is called, which way is good, and what it says."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MOVING", "OF_THE_WHOLE", "SHOWN_ALWAYS", "Metric", "marked"]


class Metric(NamedTuple):
    """`better`: lower, higher, or neither."""

    title: str
    better: str
    says: str


SHOWN_ALWAYS = {
    "nll": Metric("nll", "lower", "−log p of a target, in nats, whatever α was: it compares any two runs on the same rows."),
    "p": Metric("p", "higher", "The probability that the model gives a target, the mean over the tokens."),
    "alpha": Metric("α", "neither", "How much a token or a class counts. Set by the config, its schedule or its controller."),
    "loss_share": Metric(
        "share of loss",
        "neither",
        "Of the loss that is trained. Above its share of the tokens, a class has more say than under SFT.",
    ),
    "loss": Metric("loss", "lower", "What is trained. It moves with α, and compares no two runs that differ in it."),
}

MOVING = {
    "signal": Metric("Signal", "neither", "What the controller compares in place of nll."),
    "exponent": Metric("Exponent of dft", "neither", "0 is nll, 1 is dft."),
    "min_weight": Metric("Least weight of dft", "neither", "What an improbable token still counts."),
    "kl": Metric("KL to the base model", "neither", "How far the model has gone from its base, in nats; 0 is nowhere."),
    "factor": Metric("Mean factor", "neither", "What the data makes a target count."),
    "p_negative": Metric("p where the factor is below 0", "lower", "Of tokens that are to become improbable."),
}
"""By class, `dwl/<key>/<class>`, and only in runs that have it."""

OF_THE_WHOLE = {
    "entropy": Metric(
        "Entropy", "neither", "How unsure the model is, in nats. It falls as the model learns; near 0 it is sure, right or wrong."
    ),
    "mean_token_accuracy": Metric("Token accuracy", "higher", "How often the target is the likeliest token."),
}
"""Of all targets, under the name that TRL gives them, and only in runs that have it."""


def marked(metric: Metric) -> str:
    """Its title with an arrow where one way is good."""
    return metric.title + {"lower": " ↓", "higher": " ↑", "neither": ""}[metric.better]
