"""Every option of Axolotl is tested with us, refused, taken over, or named as one that cannot matter, with the reason."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from dwl_plugin.config import parse
from dwl_plugin.hosts import incompatible
from dwl_plugin.hosts.axolotl_args import FUSED_LOSSES
from dwl_plugin.hosts.incompatible import REFUSALS, refused

HERE = Path(__file__).parent
OURS = {"loss", "dft", "dwl"}
FROM_OTHER_HOSTS = {"label_smoothing", "label_smoothing_factor"}
"""Refused, and no option of Axolotl's: TrainingArguments that reach the trainer some other way."""


def listed_table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load((HERE / "axolotl_options.yml").read_text(encoding="utf-8"))
    return table


def listed() -> dict[str, list[str]]:
    """option -> where it is listed, the tables of the code included."""
    table = listed_table()
    groups = {"tested": table["tested"], **{group["why"]: group["options"] for group in table["irrelevant"]}}
    places: dict[str, list[str]] = {}
    for place, options in groups.items():
        for option in options:
            places.setdefault(option, []).append(place)
    for option in FUSED_LOSSES:
        places.setdefault(option, []).append("taken over")
    for option in {refusal.key for refusal in REFUSALS if not refusal.name} - FROM_OTHER_HOSTS:
        places.setdefault(option, []).append("refused")
    return places


def schema() -> set[str]:
    """The options of the installed Axolotl, those of its integrations included; `Class.field` are options of a block inside one
    that is tested (of a dataset, say)."""
    import axolotl.integrations
    from axolotl.utils.schemas.config import AxolotlInputConfig

    tested = set(listed_table()["tested"])
    options = set(AxolotlInputConfig.model_fields)
    for option in tested & options:
        for block in models_in(AxolotlInputConfig.model_fields[option].annotation):
            options |= {f"{block.__name__}.{field}" for field in block.model_fields}
    for folder in Path(axolotl.integrations.__path__[0]).iterdir():
        if not (folder / "args.py").is_file():
            continue
        models = args_models(folder)
        for name in input_args(folder) & set(models):
            options |= set(models[name])
            for option in tested & set(models[name]):
                blocks = set(re.findall(r"\w+", models[name][option])) & set(models)
                options |= {f"{block}.{field}" for block in blocks for field in models[block]}
    return options - OURS


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def input_args(folder: Path) -> set[str]:
    """The classes whose fields the plugins of this integration add to the host's schema."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
    return set(re.findall(r"def get_input_args.*?return\s*\(?\s*[\"'][\w.]*?(\w+)[\"']", text, re.DOTALL))


def args_models(folder: Path) -> dict[str, dict[str, str]]:
    """class -> its fields and their types, read and not imported: an integration may need a package that is not here."""
    tree = ast.parse((folder / "args.py").read_text(encoding="utf-8"))
    return {
        node.name: {
            item.target.id: ast.unparse(item.annotation)
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


of_this_version = pytest.mark.skipif(not version("axolotl").startswith("0.21."), reason="the list is of Axolotl 0.21")


@of_this_version
def test_every_option_is_listed_once() -> None:
    places = listed()
    new = sorted(schema() - set(places))
    assert not new, f"look these up in Axolotl's source, and list them in axolotl_options.yml or refuse them: {new}"
    twice = {option: where for option, where in places.items() if len(where) > 1}
    assert not twice


@of_this_version
def test_no_option_is_listed_that_this_version_lacks() -> None:
    assert sorted(set(listed()) - schema()) == []


@of_this_version
def test_an_option_that_nobody_has_looked_at_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.utils.schemas.config import AxolotlInputConfig

    fields = {**AxolotlInputConfig.model_fields, "loss_of_the_future": None}
    monkeypatch.setattr(AxolotlInputConfig, "__pydantic_fields__", fields)
    assert schema() - set(listed()) == {"loss_of_the_future"}


def test_a_tested_option_is_in_a_test() -> None:
    text = "\n".join(file.read_text(encoding="utf-8") for file in HERE.parent.rglob("*.py"))
    untested = [name for name in listed_table()["tested"] if not re.search(rf"\b{name.partition('.')[2] or name}\b", text)]
    assert not untested


COMBINATIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"deepspeed": "zero2.json"}, []),
    ({"context_parallel_size": 2}, []),
    ({"deepspeed": "zero2.json", "context_parallel_size": 2}, []),
    ({"deepspeed": "zero2.json", "context_parallel": {"size": 2}}, []),
    ({"context_parallel": {"size": 2}}, []),
    ({"context_parallel": {"size": 2, "load_balance": "distflash"}}, ["context_parallel"]),
    ({"context_parallel": {"size": 2, "shard_in_collator": False}}, ["context_parallel"]),
    ({"streaming": True}, []),
    ({"streaming": True, "context_parallel_size": 2}, ["streaming"]),
    ({"streaming": True, "sequence_parallel_degree": 2, "accelerator_config": {"dispatch_batches": False}}, []),
    ({"pretraining_dataset": [{"path": "x"}], "context_parallel_size": 2}, ["pretraining_dataset"]),
    ({"plugins": ["axolotl.integrations.diffusion_decision.DiffusionDecisionPlugin"]}, ["plugins"]),
    ({"model_type": "AutoModelForSequenceClassification"}, ["model_type"]),
    ({"type_of_model": "LlamaForTokenClassification", "num_labels": 2}, ["type_of_model"]),
    ({"model_type": "AutoModelForCausalLM", "type_of_model": "LlavaForConditionalGeneration"}, []),
    ({"plugins": ["axolotl.integrations.liger.LigerPlugin"]}, []),
]


@pytest.mark.parametrize(("cfg", "paths"), COMBINATIONS)
def test_combinations_are_refused_and_their_parts_are_not(cfg: dict[str, Any], paths: list[str]) -> None:
    assert [problem.path for problem in refused(cfg, "dwl")] == paths


def test_sequences_cannot_be_shared_before_axolotl_cuts_them_up_with_their_class_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incompatible, "release", lambda _: (0, 20))
    for size in ({"context_parallel_size": 2}, {"context_parallel": {"size": 2}}):
        assert [problem.path for problem in refused({"deepspeed": "zero2.json", **size}, "dwl")] == ["deepspeed"]
    assert not list(refused({"deepspeed": "zero2.json"}, "dwl"))


def test_a_refused_key_is_named_beside_the_other_problems() -> None:
    assert parse({"loss": "dft"}) is not None
    assert [problem.path for problem in refused({"rl": "dpo", "do_bench_eval": True}, "dft")] == ["rl", "do_bench_eval"]
