"""One mistake does not hide the next: what is right in a block is still there to be looked at."""

from __future__ import annotations

from typing import Any

import pytest

from dwl_plugin.config.salvage import salvage

GOOD = {"number": {"regex": r"\d+"}, "think": {"between": ["<think>", "</think>"]}}


def block(**dwl: Any) -> dict[str, Any]:
    return {"loss": "dwl", "dwl": {"classes": dict(GOOD), **dwl}}


def looked_at(raw: dict[str, Any], **options: Any) -> tuple[list[str] | None, set[str]]:
    left, problems = salvage(raw, **options)
    return None if left is None else list(left.class_configs), {problem.path for problem in problems}


def test_a_block_without_errors_is_left_as_it_is() -> None:
    raw = block(alpha={"number": 1, "think": 2, "rest": 1}, reduction="weighted_mean")
    left, problems = salvage(raw)
    assert problems == []
    assert left is not None
    assert left.alpha == (0.25, 0.5, 0.25)
    assert left.reduction == "weighted_mean"


def test_a_config_without_our_keys_has_nothing_to_salvage() -> None:
    assert salvage({"seed": 1}) == (None, [])


def test_a_wrong_class_is_left_out_and_the_others_stay() -> None:
    raw = block()
    raw["dwl"]["classes"]["bad"] = {"regex": "("}
    assert looked_at(raw) == (["number", "think"], {"dwl.classes.bad.regex"})


def test_a_wrong_alpha_costs_no_class() -> None:
    left, paths = looked_at(block(alpha={"nubmer": 1, "think": 1, "rest": 1}))
    assert left == ["number", "think"]
    assert paths == {"dwl.alpha.nubmer"}


def test_alpha_of_a_class_that_went_is_no_second_problem() -> None:
    raw = block(alpha={"number": 1, "think": 1, "bad": 1, "rest": 1})
    raw["dwl"]["classes"]["bad"] = {"tokens": []}
    assert looked_at(raw) == (["number", "think"], {"dwl.classes.bad.tokens"})


def test_what_only_shows_once_the_rest_parses_is_found_too() -> None:
    raw = block(reduction="mean")
    raw["dwl"]["classes"]["final"] = {"regex": "x(y)", "group": 7}
    left, paths = looked_at(raw)
    assert left == ["number", "think"]
    assert paths == {"dwl.reduction", "dwl.classes.final.group"}


@pytest.mark.parametrize("loss", [{}, {"loss": "dlw"}])
def test_the_classes_are_looked_at_without_a_right_loss(loss: dict[str, str]) -> None:
    left, paths = looked_at({**loss, "dwl": {"classes": GOOD}})
    assert left == ["number", "think"]
    assert paths == {"loss"} if loss else {"dwl"}


def test_what_is_left_out_is_left_out_in_silence() -> None:
    assert looked_at(block(), leave_out=["dwl.classes.think.between"]) == (["number"], set())


def test_nothing_is_changed_in_place() -> None:
    raw = block(alpha={"x": 1})
    raw["dwl"]["classes"]["bad"] = {}
    before = repr(raw)
    salvage(raw)
    assert repr(raw) == before


def test_a_pack_with_a_typo_hides_nothing_else() -> None:
    classes = {"bad": {"regex": "("}, "both": {"regex": "a", "words": ["b"]}, "group": {"regex": "x(y)", "group": 7}}
    raw = block(
        pack="reasonning",
        classes=classes,
        alpha={"group": -1, "both": 1, "bad": 1, "thinking": 2, "rest": 1},
        schedule={"type": "linear", "to": {"group": -1, "both": 1, "bad": 1, "thinking": 2, "rest": 1}, "oevr": 1},
        reductoin="class_mean",
    )
    _, paths = looked_at(raw)
    assert paths == {
        "dwl.pack",
        "dwl.alpha.group",
        "dwl.classes.bad.regex",
        "dwl.classes.both",
        "dwl.classes.group.group",
        "dwl.schedule.to.group",
        "dwl.schedule.oevr",
        "dwl.reductoin",
    }


def test_a_pack_that_is_not_to_be_looked_into_hides_nothing_else_in_a_list_either() -> None:
    hub = f"hf://user/repo@{'0' * 40}/p.yml"
    for pack, left_out in ((hub, "dwl.pack"), (["numbers", hub], "dwl.pack[1]")):
        raw = {"loss": "dwl", "dwl": {"pack": pack, "alpha": {"result": 9}, "reduction": "weigthed_mean"}}
        assert looked_at(raw, leave_out=[left_out])[1] == {"dwl.reduction"}
        del raw["dwl"]["reduction"]  # type: ignore[attr-defined]
        assert looked_at(raw, leave_out=[left_out])[1] == set()
