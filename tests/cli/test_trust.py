"""Every line by which a config could run code or fetch something is listed, and ordinary lines are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from dwl_plugin.cli.trust import RULES, dangers

RUNS: dict[str, dict[str, Any]] = {
    "plugins[0]": {"plugins": ["somebody.else.Plugin"]},
    "trust_remote_code": {"trust_remote_code": True},
    "datasets[0].trust_remote_code": {"datasets": [{"path": "x.jsonl", "trust_remote_code": True}]},
    "overrides_of_model_config": {"overrides_of_model_config": {"auto_map": {"AutoConfig": "x.Y"}}},
    "overrides_of_model_kwargs": {"overrides_of_model_kwargs": {"trust_remote_code": True}},
    "cls_model_config": {"cls_model_config": "somebody.Config"},
    "trainer_cls": {"trainer_cls": "somebody.Trainer"},
    "datasets[1].type": {"datasets": [{"path": "x.jsonl", "type": "alpaca"}, {"path": "y.jsonl", "type": "mine.strategy"}]},
    "test_datasets[0].type": {"test_datasets": [{"path": "x.jsonl", "type": "mine.strategy"}]},
    "pretraining_dataset.type": {"pretraining_dataset": {"path": "json", "type": "mine.strategy"}},
    "datasets[0].input_transform": {"datasets": [{"path": "x.jsonl", "input_transform": "mine:change"}]},
    "datasets[0].path": {"datasets": [{"path": "loader.py"}]},
    "datasets[0].ds_type": {"datasets": [{"path": "x", "ds_type": "reader.py"}]},
    "datasets[0].data_files": {"datasets": [{"path": "x.jsonl", "data_files": ["a.json", "loader.py"]}]},
    "trl.reward_funcs[0]": {"trl": {"reward_funcs": ["mine.reward"]}},
    "trl.rollout_func": {"trl": {"rollout_func": "mine.rollout"}},
    "attn_implementation": {"attn_implementation": "somebody/kernel"},
    "experts_implementation": {"experts_implementation": "somebody/kernel"},
    "use_kernels": {"use_kernels": True},
    "eval_causal_lm_metrics[0]": {"eval_causal_lm_metrics": ["somebody/metric"]},
}

FETCHES: dict[str, dict[str, Any]] = {
    "base_model": {"base_model": "org/model"},
    "base_model_config": {"base_model_config": "org/model"},
    "tokenizer_config": {"tokenizer_config": "org/model"},
    "processor_config": {"processor_config": "org/model"},
    "lora_model_dir": {"lora_model_dir": "org/adapter"},
    "datasets[0].path": {"datasets": [{"path": "org/data", "type": "chat_template"}]},
    "datasets[0].ds_type": {"datasets": [{"path": "x.jsonl", "ds_type": "org/reader"}]},
    "datasets[0].data_files": {"datasets": [{"path": "x.jsonl", "data_files": "https://example.org/x.jsonl"}]},
    "pretraining_dataset": {"pretraining_dataset": "org/corpus"},
    "pretraining_dataset[0].path": {"pretraining_dataset": [{"path": "s3://bucket/corpus"}]},
    "dwl.pack": {"dwl": {"pack": "hf://somebody/pack@0123456789abcdef/pack.yaml"}},
    "dwl.classes.a.any[1].pack": {"dwl": {"classes": {"a": {"any": [{"regex": "x"}, {"pack": "hf://u/r@c/f.yaml"}]}}}},
}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub may be asked, and nothing of it is here yet."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", RUNS)
def test_what_runs_code_is_listed(path: str) -> None:
    assert [(danger.path, danger.does) for danger in dangers(RUNS[path]) if danger.path == path] == [(path, "runs code")]


@pytest.mark.parametrize("path", FETCHES)
@pytest.mark.usefixtures("online")
def test_what_fetches_is_listed(path: str) -> None:
    assert [(danger.path, danger.does) for danger in dangers(FETCHES[path])] == [(path, "fetches")]


@pytest.mark.usefixtures("online")
def test_every_rule_is_tried() -> None:
    tried = {danger.what for config in (*RUNS.values(), *FETCHES.values()) for danger in dangers(config)}
    assert tried == {rule.what for rule in RULES}


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Those among which a value of that type is chosen, or of which it is a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def is_option(model: type[BaseModel], keys: list[str]) -> bool:
    first, *below = keys
    field = model.model_fields.get(first)
    return field is not None and (not below or any(is_option(inner, below) for inner in models_in(field.annotation)))


READ_AND_NO_OPTION = {"processor_config"}
"""Axolotl's loaders ask for it, its schema does not have it."""


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("key", sorted({key for rule in RULES for key in rule.keys if not key.startswith("dwl.")}))
def test_what_a_rule_looks_at_is_an_option_of_axolotl(key: str) -> None:
    """One that Axolotl renames would be looked for in vain, and nobody would be warned."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    assert is_option(AxolotlInputConfig, [part for part in key.split(".") if part != "*"]) == (key not in READ_AND_NO_OPTION)


@pytest.mark.usefixtures("online")
def test_an_ordinary_local_config_is_trusted() -> None:
    Path("model").mkdir()
    config = {
        "plugins": ["dwl_plugin.DWLPlugin", "axolotl.integrations.liger.LigerPlugin"],
        "base_model": "./model",
        "trust_remote_code": False,
        "attn_implementation": "flash_attention_2",
        "datasets": [{"path": "rows.jsonl", "type": "chat_template"}, {"path": "./no/such.jsonl", "type": "context_qa.load_v2"}],
        "loss": "dwl",
        "dwl": {"classes": {"a": {"regex": "https?://"}}},
    }
    assert dangers(config) == []


@pytest.mark.usefixtures("online")
def test_a_plugin_whose_name_only_looks_like_ours_is_not_ours() -> None:
    names = ["dwl_plugin_evil.Plugin", "axolotl.integrations_evil.X", "evil.dwl_plugin.DWLPlugin"]
    assert len(dangers({"plugins": names})) == 3


def test_a_model_in_the_cache_is_not_fetched(online: Path) -> None:
    (online / "hub" / "models--org--model" / "snapshots").mkdir(parents=True)
    assert dangers({"base_model": "org/model"}) == []


@pytest.mark.usefixtures("online")
def test_offline_nothing_is_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert dangers({"base_model": "org/model", "datasets": [{"path": "org/data"}]}) == []
