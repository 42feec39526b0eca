"""What is wrong with a schedule is named with its path in the YAML."""

from __future__ import annotations

import pytest
import yaml

from dwl_plugin.alpha.schedules import Keyframes
from dwl_plugin.config import parse
from dwl_plugin.errors import ConfigError

ONE, TWO = "{a: 1, rest: 1}", "{a: 1, rest: 3}"


def parsed(schedule: str) -> dict[str, str]:
    """path -> error; none if there is none."""
    text = f"{{loss: dwl, dwl: {{classes: {{a: {{regex: a}}}}, schedule: {{{schedule}}}}}}}"
    try:
        block = parse(yaml.safe_load(text))
    except ConfigError as error:
        return {problem.path.removeprefix("dwl.schedule."): str(problem) for problem in error.problems}
    assert block is not None
    assert parse(block.dump()) == block
    return {}


@pytest.mark.parametrize(
    ("schedule", "path", "words"),
    [
        (f"type: sigmiod, to: {ONE}", "type", "did you mean `sigmoid`"),
        (f"to: {ONE}", "type", "constant, linear, cosine, exponential, sigmoid, step, keyframes, warmup, cyclic"),
        (f"type: linear, to: {ONE}, strat: 5", "strat", "did you mean `start`"),
        ("type: linear, to: {a: -1, rest: 1}", "to.a", "negative"),
        ("type: linear, to: {a: 0, rest: 0}", "to", "above 0"),
        ("type: linear, to: {a: 1}", "to", "missing: rest"),
        ("type: linear, to: {a: 1, rest: 1, b: 2}", "to.b", "no such class"),
        (f"type: linear, to: {ONE}, start: 9, end: 9", "end", "after `start`, which is 9"),
        (f"type: linear, to: {ONE}, start: 100%", "end", "after `start`, which is 100%"),
        (f"type: exponential, to: {ONE}, rate: 0", "rate", "cannot be 0"),
        (f"type: sigmoid, to: {ONE}, steepness: -1", "steepness", "greater than 0"),
        (f"type: step, to: {ONE}", "at", "required"),
        (f"type: cyclic, to: {ONE}, period: 0%", "period", "cannot be 0"),
        (f"type: warmup, to: {ONE}, decay: 5%", "decay", "after `hold`, which is 10%"),
        (f"type: warmup, to: {ONE}, final: {{a: 1}}", "final", "missing: rest"),
        ("type: constant, to: {a: 1, rest: 1}", "to", "unknown key"),
        ("type: keyframes, at: {}", "at", "at least 1"),
        (f"type: keyframes, at: {{soon: {ONE}}}", "at.soon", "2ep"),
        (f"type: keyframes, at: {{0.5: {ONE}}}", "at.0.5", "50%"),
        (f"type: keyframes, at: {{on: {ONE}, 5: {TWO}}}", "at", "booleans"),
        (f"type: keyframes, at: {{0: {ONE}}}", "at.0", "outside the schedule"),
        (f"type: keyframes, at: {{0%: {ONE}}}", "at.0%", "outside the schedule"),
        (f"type: keyframes, at: {{90: {ONE}, 50: {TWO}}}", "at.50", "after the keyframe 90"),
        (f"type: keyframes, at: {{9: {ONE}, '9': {TWO}}}", "at.9", "after the keyframe 9"),
        (f"type: keyframes, at: {{50%: {ONE}, 8: {TWO}, 9%: {ONE}}}", "at.9%", "after the keyframe 50%"),
        ("type: keyframes, at: {5: {a: -1, rest: 1}}", "at.5.a", "negative"),
        (f"type: keyframes, at: {{5: {ONE}}}, interpolation: cubic", "interpolation", "hold"),
    ],
)
def test_the_error_names_the_option(schedule: str, path: str, words: str) -> None:
    found = parsed(schedule)
    assert words in found[path]
    assert len(found) == 1


def test_one_typo_does_not_hide_what_else_is_wrong() -> None:
    found = parsed("type: keyframes, at: {90: {a: -1, rest: 1}, 50: {b: 1}}, interpolatoin: hold")
    assert set(found) == {"interpolatoin", "at.90.a", "at.50", "at.50.b"}


@pytest.mark.parametrize(
    "schedule",
    [
        "type: constant",
        f"type: warmup, to: {ONE}, start: 5, hold: 10%, decay: 1ep",
        f"type: keyframes, at: {{10: {ONE}, '2.5ep': {TWO}, 100: {ONE}}}",
        f"type: cyclic, to: {ONE}, period: 0.5ep",
    ],
)
def test_what_is_right_survives_its_own_dump(schedule: str) -> None:
    assert parsed(schedule) == {}


def test_a_keyframe_written_as_a_number_is_a_string_from_here_on() -> None:
    """The host writes its config down with sorted keys, and those must all be strings."""
    block = parse({"loss": "dwl", "dwl": {"schedule": {"type": "keyframes", "at": {200: {"rest": 1}, "50%": {"rest": 1}}}}})
    assert block is not None
    assert isinstance(block.schedule, Keyframes.Options)
    assert list(block.schedule.at) == ["200", "50%"]
