"""Values from the environment: what is taken, what is refused, and that the config itself stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dwl_plugin.config import parse
from dwl_plugin.config.overrides import overridden, overrides_of
from dwl_plugin.errors import ConfigError

RAW: dict[str, Any] = {
    "learning_rate": 0.001,
    "loss": "dwl",
    "dwl": {
        "classes": {"number": {"regex": r"\d+"}, "word": {"regex": r"\w+"}},
        "alpha": {"number": 0.5, "word": 0.3, "rest": 0.2},
        "schedule": {"type": "cosine", "to": {"number": 1, "word": 1, "rest": 1}, "start": "10%"},
    },
}


def resolved(text: str, **environ: str) -> dict[str, Any]:
    return overridden(RAW, overrides_of({"DWL_OVERRIDES": text, **environ}))


def problems_of(text: str, **environ: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse(resolved(text, **environ))
    return {problem.path: str(problem) for problem in caught.value.problems}


def test_dotted_words_set_values_as_yaml_reads_them() -> None:
    dwl = resolved("dwl.alpha.number=0.9  dwl.schedule.end=80% dwl.reduction=class_mean")["dwl"]
    assert dwl["alpha"] == {"number": 0.9, "word": 0.3, "rest": 0.2}
    assert dwl["schedule"] == {**RAW["dwl"]["schedule"], "end": "80%"}
    assert dwl["reduction"] == "class_mean"
    assert dwl["classes"] == RAW["dwl"]["classes"]


def test_quotes_hold_a_word_together_as_in_a_shell() -> None:
    dwl = resolved(r"""dwl.alpha="{number: 1, word: 1, rest: 2}" 'dwl.classes.number.regex=\d \d'""")["dwl"]
    assert dwl["alpha"] == {"number": 1, "word": 1, "rest": 2}
    assert dwl["classes"]["number"] == {"regex": r"\d \d"}
    assert resolved(r"""dwl.classes.number.regex="\d+" """)["dwl"]["classes"]["number"] == {"regex": r"\d+"}


def test_an_empty_value_takes_a_key_away() -> None:
    block = parse(resolved("dwl.schedule="))
    assert block is not None
    assert block.schedule is None


def test_the_loss_itself_can_be_overridden_where_there_was_none() -> None:
    assert overridden({"learning_rate": 1.0}, overrides_of({"DWL_OVERRIDES": "loss=dft dft.exponent=0.5"})) == {
        "loss": "dft",
        "dft": {"exponent": 0.5},
    }


@pytest.mark.parametrize(("name", "write"), [("o.yml", yaml.safe_dump), ("o.json", json.dumps)])
def test_a_file_holds_dotted_keys_and_nested_ones(tmp_path: Path, name: str, write: Any) -> None:
    path = tmp_path / name
    path.write_text(write({"dwl.alpha.number": 0.9, "dwl": {"schedule": {"end": "80%"}, "reduction": "class_mean"}}))
    dwl = resolved(f"@{path}")["dwl"]
    assert (dwl["alpha"]["number"], dwl["alpha"]["word"]) == (0.9, 0.3)
    assert dwl["schedule"] == {**RAW["dwl"]["schedule"], "end": "80%"}, "a nested mapping keeps what it does not name"
    assert dwl["reduction"] == "class_mean"


def test_a_dotted_key_replaces_the_whole_of_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "o.yml"
    path.write_text("dwl.schedule: {type: linear, to: {number: 0, word: 0, rest: 1}}")
    assert resolved(f"@{path}")["dwl"]["schedule"] == {"type": "linear", "to": {"number": 0, "word": 0, "rest": 1}}


def test_the_config_is_not_changed_and_twice_is_once() -> None:
    before = json.dumps(RAW)
    overrides = overrides_of({"DWL_OVERRIDES": "dwl.alpha.number=0.9 dwl.schedule="})
    once = overridden(RAW, overrides)
    assert json.dumps(RAW) == before
    assert overridden({**RAW, **once}, overrides) == once


def test_nothing_set_is_nothing_done() -> None:
    assert overrides_of({}) == overrides_of({"DWL_OVERRIDES": " ", "WANDB_SWEEP_PARAM_PATH": ""}) == []
    assert overridden(RAW, []) == {"loss": RAW["loss"], "dwl": RAW["dwl"]}


def test_all_that_is_wrong_is_said_at_once_with_paths() -> None:
    found = problems_of("learning_rate=3 stray dwl.=1 dwl.alpha.number=[")
    assert set(found) == {"learning_rate", "DWL_OVERRIDES", "dwl.", "dwl.alpha.number"}
    assert "--learning-rate=3" in found["learning_rate"]
    assert "'learning_rate=3 stray'" in found["DWL_OVERRIDES"]


def test_names_that_do_not_exist_are_the_configs_own_errors() -> None:
    found = problems_of("dwl.alpha.nubmer=1 dwl.shedule.end=80%")
    assert "did you mean `number`" in found["dwl.alpha.nubmer"]
    assert "schedule" in found["dwl.shedule"]


def test_a_path_through_a_value_is_refused() -> None:
    assert "`dwl.alpha.number` has nothing below it" in problems_of("dwl.alpha.number.x=1")["dwl.alpha.number.x"]


def test_two_values_for_one_path_contradict_each_other() -> None:
    assert "contradicts 0.1" in problems_of("dwl.alpha.number=0.1 dwl.alpha.number=0.2")["dwl.alpha.number"]


@pytest.mark.parametrize("content", [None, "- 1", "a: [", b"\xff\xfe"])
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "o.yml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "o.yml" in problems_of(f"@{path}")["DWL_OVERRIDES"]
    assert "o.yml" in problems_of("", WANDB_SWEEP_PARAM_PATH=str(path))["W&B sweep"]


def test_an_unclosed_quote_is_said() -> None:
    assert "quotation" in problems_of("dwl.alpha.number='1")["DWL_OVERRIDES"]


# The form in which a W&B agent writes down the parameters of a run.
SWEEP = {"wandb_version": 1, "dwl.alpha.number": {"desc": None, "value": 0.9}, "learning-rate": {"desc": None, "value": 0.01}}


def test_a_wandb_agents_parameters_are_taken_as_far_as_they_are_ours(tmp_path: Path) -> None:
    path = tmp_path / "config-abc.yaml"
    path.write_text(yaml.safe_dump(SWEEP))
    (override,) = overrides_of({"WANDB_SWEEP_PARAM_PATH": str(path)})
    assert str(override) == "W&B sweep: dwl.alpha.number = 0.9"
    found = problems_of("dwl.alpha.number=0.8", WANDB_SWEEP_PARAM_PATH=str(path))
    assert "contradicts 0.9 in W&B sweep" in found["dwl.alpha.number"]
    assert problems_of(f"@{path}").keys() == {"learning-rate"}, "a file that was named has to be ours as a whole"
