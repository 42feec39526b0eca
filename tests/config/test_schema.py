"""The JSON Schema says of a config what the parser says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from dwl_plugin import extensions
from dwl_plugin.cli.main import main
from dwl_plugin.config import parse
from dwl_plugin.config.classes import ClassConfig
from dwl_plugin.config.schema import json_schema, merged_into
from dwl_plugin.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "example_configs").rglob("*.y*ml"))

NUMBER = {"number": {"regex": r"\d+"}}


def with_dwl(**dwl: Any) -> dict[str, Any]:
    return {"loss": "dwl", "dwl": {"classes": NUMBER, **dwl}}


GOOD: list[dict[str, Any]] = [
    {},
    {"seed": 1, "datasets": [{"path": "x"}]},
    {"loss": "nll"},
    {"loss": "dft", "dft": {"exponent": 0.5, "min_weight": 0.1}},
    {"loss": "nll", "dwl": {"classes": NUMBER}},
    with_dwl(),
    with_dwl(alpha={"number": 1, "rest": 2.5}, reduction="class_mean"),
    with_dwl(token_loss="dft"),
    {
        "loss": "dwl",
        "dwl": {
            "classes": {
                "ids": {"token_ids": [1, "4-9"]},
                "text": {"tokens": ["a"], "allow_empty": True},
                "own": {"token_regex": "a+"},
                "tags": {"between": ["<a>", "</a>"], "include_delimiters": False},
                "part": {"regex": "(?P<x>a)b", "group": "x", "token_loss": "dft", "dft": {"exponent": 0.3}},
            }
        },
    },
    with_dwl(overlap="sum", reduction="sequence_mean_token_sum"),
    {"loss": "nll", "dwl": {"data_weights": True}},
    {"loss": "dwl", "dwl": {"data_weights": {"row": "w", "token": "t"}, "reduction": "sample_sqrt"}},
    {"loss": "dft", "dwl": {"data_weights": {"allow_negative": True}, "classes": {"a": {"marked": 3}, "b": {"dataset": "x"}}}},
    {
        "loss": "dwl",
        "dwl": {
            "classes": {
                "turn": {"turn": "first"},
                "second": {"turn": 2},
                "tail": {"position": {"last": 32}},
                "tool": {"role": "tool"},
                "control": {"special": True},
                "added": {"added": True},
                "words": {"words": ["so", "then"]},
                "both": {"all": [{"regex": "a"}, {"not": {"any": [{"turn": "last"}, {"token_ids": [1]}]}}], "token_loss": "dft"},
            }
        },
    },
    with_dwl(schedule={"type": "cosine", "to": {"number": 2, "rest": 1}, "start": 10, "end": "2ep"}),
]

TYPOS: list[dict[str, Any]] = [
    {"loss": "dlw"},
    {"loss": True},
    {"dft": {"exponent": 1}},
    {"dwl": {"classes": NUMBER}},
    {"loss": "dwl"},
    {"loss": "dft", "dft": {"exponnent": 1}},
    {"loss": "dft", "dft": {"exponent": -1}},
    {"loss": "dft", "dft": {"min_weight": 1.5}},
    {"loss": "dft", "dft": {"exponent": "high"}},
    with_dwl(clases=NUMBER),
    with_dwl(reduction="mean"),
    with_dwl(token_loss="dtf"),
    with_dwl(alpha=[1, 2]),
    with_dwl(alpha={"number": "much", "rest": 1}),
    {"loss": "dwl", "dwl": {"classes": {"a": {"regx": "x"}}}},
    {"loss": "dwl", "dwl": {"classes": {"a": {}}}},
    {"loss": "dwl", "dwl": {"classes": {"a": "x"}}},
    {"loss": "dwl", "dwl": {"classes": {"a": {"regex": "x", "tokens": ["y"]}}}},
    {"loss": "dwl", "dwl": {"classes": {"a": {"regex": "x", "grp": 1}}}},
    {"loss": "dwl", "dwl": {"classes": {"a": {"between": ["x"]}}}},
    {"loss": "dwl", "dwl": {"classes": {"a": {"tokens": []}}}},
    {"loss": "dwl", "dwl": {"classes": {"a": {"token_ids": ["one"]}}}},
    {"loss": "dwl", "dwl": {"classes": {"a": {"turn": "frist"}}}},
    {"loss": "dwl", "dwl": {"classes": {"a": {"marked": ["a", "b"]}}}},
    {"loss": "dwl", "dwl": {"data_weights": "yes"}},
    {"loss": "dwl", "dwl": {"data_weights": {}}},
    {"loss": "dwl", "dwl": {"data_weights": {"rows": "weight"}}},
    {"loss": "dwl", "dwl": {"data_weights": {"row": 3}}},
    {"loss": "dwl", "dwl": {"classes": {"a": {"role": "robot"}}}},
    {"loss": "dwl", "dwl": {"classes": {"a": {"position": {"lsat": 3}}}}},
    {"loss": "dwl", "dwl": {"classes": {"a": {"any": [{"regx": "a"}, {"regex": "b"}]}}}},
    {"loss": "dwl", "dwl": {"classes": {"a": {"not": {"token_loss": "dft", "regex": "x"}}}}},
    {"loss": "dwl", "dwl": {"classes": {"rest": {"regex": "x"}}}},
    {"loss": "dwl", "dwl": {"classes": {"a b": {"regex": "x"}}}},
    with_dwl(controller={"type": "rlw", "max_change": 2}),
    with_dwl(schedule={"type": "cosinus", "to": {"number": 2, "rest": 1}}),
    with_dwl(schedule={"type": "cosine", "too": {"number": 2, "rest": 1}}),
    with_dwl(schedule={"type": "cosine", "to": {"number": 2, "rest": 1}, "start": "ten"}),
]


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(json.dumps(json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_accepted(validator: Any, path: Path) -> None:
    validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("config", GOOD, ids=str)
def test_what_parses_is_accepted(validator: Any, config: dict[str, Any]) -> None:
    parse(config)
    validator.validate(config)


@pytest.mark.parametrize("config", TYPOS, ids=str)
def test_what_does_not_parse_for_its_form_is_rejected(validator: Any, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse(config)
    assert not validator.is_valid(config)


def test_every_key_of_ours_says_what_it_is() -> None:
    schema = json_schema()
    nodes = [("", schema["properties"]), *((name, node.get("properties", {})) for name, node in schema["$defs"].items())]
    silent = [f"{where}.{key}" for where, properties in nodes for key, node in properties.items() if not node.get("description")]
    assert [name for name in silent if not name.endswith(".type")] == []


def test_every_selector_is_offered() -> None:
    def kinds(model: type) -> set[str]:
        below = {name for child in model.__subclasses__() for name in kinds(child)}
        return below or {model.__name__}

    choices = json_schema()["$defs"]["DWLConfig"]["properties"]["classes"]["additionalProperties"]["oneOf"]
    assert {choice["$ref"].rsplit("/", 1)[-1] for choice in choices} == kinds(ClassConfig)


def test_a_schedule_of_another_package_is_accepted_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "installed", lambda kind: {"bounce": []} if kind == "schedule" else {})
    validator = jsonschema.Draft202012Validator(json_schema())
    assert validator.is_valid(with_dwl(schedule={"type": "bounce", "height": 3}))
    assert not validator.is_valid(with_dwl(schedule={"type": "bounced"}))


def test_the_command_prints_it() -> None:
    result = CliRunner().invoke(main, ["schema"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads(json.dumps(json_schema()))


def test_beside_the_hosts_keys_ours_are_still_checked() -> None:
    host = {"properties": {"seed": {"type": "integer"}}, "$defs": {"X": {}}}
    schema = merged_into(host)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"seed": 1, "loss": "dft"})
    assert not validator.is_valid({"seed": "x"})
    assert not validator.is_valid({"loss": "dtf"})
