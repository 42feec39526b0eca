"""What is compared: arms, and the experiments that they are in.

An arm is a few keys of a config; everything else is the same for all. An experiment chooses one thing for each of its arms, the
learning rate, on rows of its own, and then repeats each arm with the same five seeds. A seed draws the rows, their order and the
adapter, so two arms of one seed differ in nothing else.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from dwl_plugin.values import Reduction

LRS = (0.001, 0.003, 0.01)
SEEDS = (0, 1, 2, 3, 4)
TURN_END, UNKNOWN_END = "<|im_end|>", "<file_sep>"
"""What ends a turn in the model's own template, and a token of its vocabulary that has never ended one."""

Measures = Mapping[str, float]


@dataclass(frozen=True)
class Arm:
    """The keys of a config that an arm has to itself."""

    keys: Mapping[str, Any]
    weights: Mapping[str, float] | None = None
    """A column `weight` in the data, by the kind of a row."""
    end: str = TURN_END
    decodes: bool = False
    """Whether calls of the test rows are decoded as well."""
    wants: Callable[[Measures], float] | None = None
    """What its learning rate is chosen by, the lower the better. None: what its experiment says for all arms."""


def _dwl(**options: Any) -> dict[str, Any]:
    return {"loss": "dwl", "dwl": options}


ARGUMENTS = {"pack": "tool_call.arguments"}
ANSWER = {"regex": "#### (.+)$", "group": 1}
PARTS = {
    "arguments": ARGUMENTS,
    "syntax": {"pack": "tool_call"},
    "answer": ANSWER,
    "number": {"regex": r"\d[\d,.]*"},
    "end": {"tokens": [TURN_END]},
}
LEANING = {"arguments": 0.5, "syntax": 0.1, "answer": 0.1, "number": 0.1, "end": 0.1, "rest": 0.1}
HALF_WAY = {name: round((alpha + 1 / len(LEANING)) / 2, 4) for name, alpha in LEANING.items()}
"""The mean of an α that goes from uniform to `LEANING` by half a cosine."""


CALL = {"call": {"pack": "tool_call"}}


def _mean(classes: dict[str, Any], **options: Any) -> Arm:
    return Arm(_dwl(classes=classes, reduction="class_mean", **options))


def _of_calls(alpha: float) -> dict[str, float]:
    return {"call": alpha, "rest": round(1 - alpha, 2)}


SHORT = {"every": 2, "ema": 0.5}
"""Windows for a run of 15 steps: with the defaults α would move once."""


def _steered(name: str, selector: dict[str, Any], measured: str, alpha: float, reduction: str) -> Arm:
    """One class against the rest; an arm wants what its α says."""
    return Arm(
        _dwl(classes={name: selector}, reduction=reduction, alpha={name: alpha, "rest": round(1 - alpha, 2)}),
        wants=lambda found: alpha * found[measured] + (1 - alpha) * found[f"nll/without {name}"],
    )


ENDS: dict[str, dict[str, Any]] = {
    "nll": {"loss": "nll"},
    "dft": {"loss": "dft"},
    "dft, end by nll": _dwl(token_loss="dft", classes={"end": {"tokens": ["END"], "token_loss": "nll"}}, reduction="weighted_mean"),
    "dft, min_weight 0.1": {"loss": "dft", "dft": {"min_weight": 0.1}},
    "nll to dft": {
        "loss": "dft",
        "dft": {"exponent": 0, "schedule": {"type": "linear", "to": {"exponent": 1}, "start": "10%", "end": "60%"}},
    },
}
"""What can be done for the ends of turns under DFT, with `END` for the token."""


def _ended(keys: dict[str, Any], end: str) -> Arm:
    return Arm(json.loads(json.dumps(keys).replace("END", end)), end=end, decodes=True)


ALPHAS = (0.05, 0.2, 0.5, 0.8, 0.95)
MAIN: tuple[Reduction, ...] = ("weighted_mean", "class_mean")
STEERED: dict[tuple[str, float, str], str] = {
    point: "{} {} {}".format(*point)
    for point in (
        *(("arguments", alpha, reduction) for reduction in MAIN for alpha in ALPHAS),
        *(("arguments", alpha, reduction) for reduction in get_args(Reduction) if reduction not in MAIN for alpha in ALPHAS[::2]),
        *(("answer", alpha, reduction) for reduction in MAIN for alpha in ALPHAS[::2]),
    )
}
"""The arm of a class, its α and a reduction."""
STEERED_CLASSES = {"arguments": (ARGUMENTS, "nll/call/arguments"), "answer": (ANSWER, "nll/maths/answer")}

ARMS: dict[str, Arm] = {
    "sft": Arm({"loss": "nll"}),
    # calls are what counts: one class against the rest, or weights of rows
    "calls: row weights": Arm(_dwl(data_weights={"row": "weight"}), weights={"call": 2.5, "maths": 0.5}),
    "calls: weighted_mean 5:1": Arm(_dwl(classes=CALL, reduction="weighted_mean", alpha={"call": 5, "rest": 1})),
    "calls: class_mean": _mean(CALL),
    "calls: class_mean 0.65": _mean(CALL, alpha=_of_calls(0.65)),
    "calls: cosine 0.5 to 0.8": _mean(CALL, alpha=_of_calls(0.5), schedule={"type": "cosine", "to": _of_calls(0.8)}),
    "calls: softmax_loss": _mean(CALL, controller={"type": "softmax_loss", **SHORT}),
    "calls: rlw": _mean(CALL, controller={"type": "rlw"}),
    # every part of a reply a class
    "weighted_mean, leaning": Arm(_dwl(classes=PARTS, reduction="weighted_mean", alpha=LEANING)),
    "class_mean": _mean(PARTS),
    "class_mean, leaning": _mean(PARTS, alpha=HALF_WAY),
    "cosine": _mean(PARTS, schedule={"type": "cosine", "to": LEANING}),
    "group_dro": _mean(PARTS, controller={"type": "group_dro", "eta": 0.1, **SHORT}),
    "softmax_loss": _mean(PARTS, controller={"type": "softmax_loss", **SHORT}),
    "dwa": _mean(PARTS, controller={"type": "dwa", "every": 2}),
    "rlw": _mean(PARTS, controller={"type": "rlw"}),
    # DFT; 0.6 is what the model believes of these targets before it is trained, on average
    "dft": Arm({"loss": "dft"}),
    "nll x mean p": Arm(_dwl(data_weights={"row": "weight"}, reduction="token_mean"), weights={"call": 0.6, "maths": 0.6}),
    # turns that end as the model's own do, and in a token it has never used
    **{f"turns: {name}": _ended(keys, TURN_END) for name, keys in ENDS.items()},
    **{f"end: {name}": _ended(keys, UNKNOWN_END) for name, keys in ENDS.items()},
    # one class, its α
    **{arm: _steered(name, *STEERED_CLASSES[name], alpha, by) for (name, alpha, by), arm in STEERED.items()},
}

PARTS_MEASURED = ("nll/call/arguments", "nll/call/syntax", "nll/maths/answer", "nll/maths/number", "nll/maths/words", "nll/end")


def mean_of_parts(found: Measures) -> float:
    return statistics.mean(found[part] for part in PARTS_MEASURED)


def both_kinds(found: Measures) -> float:
    """As if there were as many targets of calls as of maths."""
    return (found["nll/call"] + found["nll/maths"]) / 2


def believed(found: Measures) -> float:
    """What DFT asks for, p, so that its rate is not chosen by what NLL asks for; again calls and maths alike."""
    return -(found["p/call"] + found["p/maths"]) / 2


@dataclass(frozen=True)
class Experiment:
    """Some arms, and how the learning rate of each is chosen."""

    arms: tuple[str, ...]
    wants: Callable[[Measures], float] | None = None
    """Of the measures on the tuning rows; the lowest wins. None: every rate is run with every seed."""
    lrs: tuple[float, ...] = LRS
    baseline: str = "sft"


def _named(prefix: str) -> tuple[str, ...]:
    return tuple(name for name in ARMS if name.startswith(prefix))


EXPERIMENTS = {
    "steering": Experiment(("sft", *STEERED.values()), both_kinds),
    "rare_class": Experiment(("sft", *_named("calls: "), "weighted_mean, leaning", "class_mean"), lambda found: found["nll/call"]),
    "dft_step_size": Experiment(("sft", "dft", "nll x mean p"), lrs=(0.0003, *LRS)),
    "ends_of_turns": Experiment(_named("turns: "), believed, baseline="turns: nll"),
    "unknown_ends": Experiment(_named("end: "), believed, baseline="end: nll"),
    "controllers": Experiment(
        ("sft", "class_mean", "class_mean, leaning", "cosine", "group_dro", "softmax_loss", "dwa", "rlw"), mean_of_parts
    ),
}
