"""What is wrong with a controller is named with its path in the YAML, or when it is given what it cannot use."""

from __future__ import annotations

import pytest
import yaml

from dwl_plugin.alpha.controllers import Controller
from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.config import parse
from dwl_plugin.errors import ConfigError
from dwl_plugin.run.moving import controller_of


def found(controller: str, more: str = "", loss: str = "dwl") -> dict[str, str]:
    """path -> error; none if there is none."""
    dwl = f"{{classes: {{a: {{regex: a}}, b: {{regex: b}}}}, {more} controller: {{{controller}}}}}"
    try:
        block = parse(yaml.safe_load(f"{{loss: {loss}, dwl: {dwl}}}"))
    except ConfigError as error:
        return {problem.path.removeprefix("dwl."): str(problem) for problem in error.problems}
    assert block is not None
    assert parse(block.dump()) == block
    return {}


GIVEN = "{a: 1, b: 1, rest: 1}"


@pytest.mark.parametrize(
    ("controller", "more", "path", "words"),
    [
        ("type: grup_dro", "", "controller.type", "did you mean `group_dro`"),
        ("every: 3", "", "controller.type", "softmax_loss, dwa, softadapt, group_dro, doremi, rlw"),
        ("type: group_dro, etta: 1", "", "controller.etta", "did you mean `eta`"),
        ("type: rlw, ema: 0.5", "", "controller.ema", "unknown key"),
        ("type: dwa, signal: ratio_to_init", "", "controller.signal", "raw"),
        ("type: dwa, every: 0", "", "controller.every", "greater than or equal to 1"),
        ("type: dwa, ema: 1", "", "controller.ema", "less than 1"),
        ("type: dwa, max_change: 0", "", "controller.max_change", "greater than 0"),
        ("type: dwa, warmup: 0.1", "", "controller.warmup", "10%"),
        ("type: dwa, min_alpha: 0.34", "", "controller.min_alpha", "at most 0.3333"),
        ("type: softmax_loss, signal: excess_over_rf", "", "controller.signal", "write `signal: excess_over_ref`"),
        ("type: softmax_loss, signal: excess_over_ref", "", "controller.reference", "base"),
        (f"type: softmax_loss, reference: {GIVEN}", "", "controller.reference", "no effect with `signal: raw`"),
        ("type: doremi", "", "controller.reference", "required"),
        ("type: doremi, reference: {a: 1, b: 1}", "", "controller.reference", "missing: rest"),
        ("type: doremi, reference: {a: 1, b: 1, rest: 1, bb: 2}", "", "controller.reference.bb", "did you mean `b`"),
        ("type: dwa", "alpha: {a: 0, b: 1, rest: 1},", "alpha.a", "0 stays 0"),
        ("type: dwa, min_alpha: 0.2", "alpha: {a: 1, b: 4, rest: 5},", "alpha.a", "0.1, is below `dwl.controller.min_alpha`"),
        ("type: dwa", "schedule: {type: constant},", "controller", "`dwl.schedule` moves α already"),
    ],
)
def test_the_error_names_the_option(controller: str, more: str, path: str, words: str) -> None:
    problems = found(controller, more)
    assert words in problems[path]
    assert len(problems) == 1


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_where_no_alpha_is_used_no_controller_is_accepted(loss: str) -> None:
    problems = found("type: dwa", loss=loss)
    assert "write `loss: dwl`" in problems["controller"]
    assert len(problems) == 1


@pytest.mark.parametrize(
    "controller",
    [
        "type: softmax_loss, temperature: 2, signal: ratio_to_init",
        "type: dwa, every: 50, warmup: 10%",
        "type: softadapt, beta: -0.1, loss_weighted: true",
        "type: group_dro, max_change: 0.05, min_alpha: 0",
        "type: doremi, reference: base, reference_rows: 64",
        f"type: doremi, reference: {GIVEN}",
        "type: rlw, seed: 5",
    ],
)
def test_what_is_right_survives_its_own_dump(controller: str) -> None:
    assert found(controller) == {}


def made(controller: str, classes: str = "{a: {regex: a}}", length: RunLength | None = None) -> Controller:
    block = parse(yaml.safe_load(f"{{loss: dwl, dwl: {{classes: {classes}, controller: {{{controller}}}}}}}"))
    assert block is not None
    held = controller_of(block, length or RunLength(100, 10.0))
    assert held is not None
    return held


def test_a_warm_up_that_the_run_cannot_place_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"dwl\.controller\.warmup: this run has no known length"):
        made("type: dwa, warmup: 10%", length=RunLength(None, None))


@pytest.mark.parametrize(
    ("controller", "classes"),
    [("type: rlw", "{a: {regex: a}}"), ("type: dwa", "{b: {regex: a}}"), ("type: dwa", "{a: {regex: a}, b: {regex: b}}")],
)
def test_the_state_of_another_controller_or_other_classes_is_refused(controller: str, classes: str) -> None:
    with pytest.raises(ConfigError, match="written by `dwa` over a, rest"):
        made(controller, classes).load(made("type: dwa").state())


def test_a_class_that_the_reference_was_not_measured_on_is_named() -> None:
    with pytest.raises(ConfigError, match="no token of a was in the rows"):
        made("type: doremi, reference: base").compare_with({"rest": 1.0})
