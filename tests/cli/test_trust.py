"""Every line by which a config could run code or fetch something is listed, and ordinary lines are not."""

from __future__ import annotations

import enum
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import AliasChoices, BaseModel, Field

from dwl_plugin.cli.trust import PACKS, RULES, Rule, dangers, fetched_packs
from dwl_plugin.hosts import axolotl_keys
from tests.hosts.test_options import input_args

pytestmark = pytest.mark.usefixtures("host")

RUNS: dict[str, dict[str, Any]] = {
    "plugins[0]": {"plugins": ["somebody.else.Plugin"]},
    "trust_remote_code": {"trust_remote_code": True},
    "datasets[0].trust_remote_code": {"datasets": [{"path": "x.jsonl", "trust_remote_code": True}]},
    "overrides_of_model_config": {"overrides_of_model_config": {"auto_map": {"AutoConfig": "x.Y"}}},
    "overrides_of_model_kwargs": {"overrides_of_model_kwargs": {"trust_remote_code": True}},
    "model_kwargs": {"model_kwargs": {"trust_remote_code": True}},
    "processor_kwargs": {"processor_kwargs": {"a": [{"trust_remote_code": 1}]}},
    "cls_model_config": {"cls_model_config": "somebody.Config"},
    "tokenizer_type": {"tokenizer_type": "RagRetriever"},
    "processor_type": {"processor_type": "RagRetriever"},
    "model_type": {"model_type": "RagRetriever"},
    "trainer_cls": {"trainer_cls": "somebody.Trainer"},
    "datasets[1].type": {"datasets": [{"path": "x.jsonl", "type": "alpaca"}, {"path": "y.jsonl", "type": "mine.strategy"}]},
    "datasets[0].type": {"datasets": [{"path": "x.jsonl", "type": "..load"}]},
    "test_datasets[0].type": {"test_datasets": [{"path": "x.jsonl", "type": "mine.strategy"}]},
    "pretraining_dataset.type": {"pretraining_dataset": {"path": "json", "type": "mine.strategy"}},
    "rl": {"rl": "dpo", "datasets": [{"path": "x.jsonl", "type": "alpaca"}, {"path": "x.jsonl", "type": "mine.load"}]},
    "datasets[0].input_transform": {"datasets": [{"path": "x.jsonl", "input_transform": "mine:change"}]},
    "datasets[0].path": {"datasets": [{"path": "loader.py"}]},
    "datasets[0].ds_type": {"datasets": [{"path": "rows.pkl", "ds_type": "pandas"}]},
    "test_datasets[0].ds_type": {"test_datasets": [{"path": "x", "ds_type": "org/reader"}]},
    "test_datasets[0].path": {"test_datasets": [{"path": "pandas", "data_files": "rows.pkl"}]},
    "pretraining_dataset": {"pretraining_dataset": "pandas"},
    "pretraining_dataset[0].path": {"pretraining_dataset": [{"path": "iceberg"}]},
    "datasets[0]": {"datasets": [[["path", "rows.pkl"], ["ds_type", "pandas"]]]},
    "datasets[0].data_files": {"datasets": [{"path": "x.jsonl", "data_files": ["a.json", "loader.py"]}]},
    "trl.reward_funcs[0]": {"trl": {"reward_funcs": ["mine.reward"]}},
    "trl.rollout_func": {"trl": {"rollout_func": "mine.rollout"}},
    "hatchery.reward_funcs[0]": {"hatchery": {"reward_funcs": ["mine.reward"]}},
    "vllm.serve_module": {"vllm": {"serve_module": "mine.serve"}},
    "vllm.worker_extension_cls": {"vllm": {"worker_extension_cls": "mine.Worker"}},
    "export.llama_cpp_dir": {"export": {"llama_cpp_dir": "./tools"}},
    "nemo_gym_dir": {"nemo_gym_dir": "./gym"},
    "nemo_gym_enabled": {"plugins": ["axolotl.integrations.nemo_gym.NemoGymPlugin"], "nemo_gym_enabled": True},
    "torch_compile_options": {"torch_compile_options": {"cpp.cxx": "./compiler"}},
    "flex_attn_compile_kwargs": {"flex_attn_compile_kwargs": {"options": {"cpp.cxx": "./compiler"}}},
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
    "test_datasets[0].path": {"test_datasets": [{"path": "evil/rows.jsonl"}]},
    "datasets[0].data_files": {"datasets": [{"path": "/x", "data_files": "https://example.org/x.jsonl"}]},
    "pretraining_dataset": {"pretraining_dataset": "org/corpus"},
    "pretraining_dataset[0].path": {"pretraining_dataset": [{"path": "s3://bucket/corpus"}]},
    "pretraining_dataset.data_files": {"pretraining_dataset": {"path": "json", "data_files": "file://a::https://b.org/c"}},
    "plugins[0]": {"plugins": ["axolotl.integrations.spectrum.SpectrumPlugin"]},
    "plugins[1]": {"plugins": ["dwl_plugin.DWLPlugin", "axolotl.integrations.swanlab.SwanLabPlugin"]},
    "dwl.pack": {"dwl": {"pack": "hf://somebody/pack@0123456789abcdef/pack.yaml"}},
    "dwl.classes.a.any[1].pack": {"dwl": {"classes": {"a": {"any": [{"regex": "x"}, {"pack": "hf://u/r@c/f.yaml"}]}}}},
}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub may be asked, and nothing of it is here yet."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, online: Path) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return online


@pytest.mark.parametrize("path", RUNS)
def test_what_runs_code_is_listed(path: str, offline: Path) -> None:
    (offline / "pandas").mkdir()  # what lies here changes nothing
    (offline / "iceberg").touch()
    assert [(danger.path, danger.does) for danger in dangers(RUNS[path]) if danger.path == path] == [(path, "runs code")]


@pytest.mark.parametrize("path", FETCHES)
@pytest.mark.usefixtures("online")
def test_what_fetches_is_listed(path: str) -> None:
    assert [(danger.path, danger.does) for danger in dangers(FETCHES[path])] == [(path, "fetches")]


def lay(folder: Path, **files: Any) -> str:
    """Files with that text, or JSON; `__` is the dot before a suffix."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return f"./{folder.name}"


CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}\n---\n# Rows\n"

FOLDERS: dict[str, dict[str, Any]] = {
    "the card in this folder says that the data lies elsewhere": {"README__md": CARD.format('"https:\\x2f/b.org/x.jsonl"')},
    "the adapter in this folder is for a model on the hub": {"adapter_config__json": {"base_model_name_or_path": "org/model"}},
    "what lies in this folder names code that is run": {"config__json": {"text_config": {"attn_implementation": "org/kernel"}}},
}


@pytest.mark.parametrize("what", FOLDERS)
def test_what_lies_in_a_folder_of_this_disk_is_listed(what: str, online: Path) -> None:
    (rule,) = [rule for rule in RULES if rule.what == what]
    for key in rule.keys:
        config = nested(key.split("."), lay(online / "it", **FOLDERS[what]))
        assert [(danger.does, danger.what) for danger in dangers(config)] == [(rule.does, what)]


def test_settings_of_numba_in_this_folder_are_listed_before_it_is_imported(offline: Path) -> None:
    lay(offline, __numba_config__yaml="chrome_trace: /tmp/victim")
    assert [(danger.value, danger.does) for danger in dangers({"loss": "dft"})] == [(".numba_config.yaml", "runs code")]


@pytest.mark.parametrize("name", ["dwl_plugin.cli.main.main", "axolotl.integrations.lm_eval.cli.lm_eval", "axolotl.integrations"])
def test_of_our_own_and_the_host_s_only_plugins_are_called(name: str) -> None:
    assert [danger.does for danger in dangers({"plugins": [name]})] == ["runs code"]


@pytest.mark.parametrize("path", ["reference::data:application/json;base64,e30=", "reference::refs.json", "hdfs://a/b"])
def test_a_path_that_a_filesystem_makes_up_is_listed(path: str, offline: Path) -> None:
    for config in ({"path": "json", "data_files": path}, {"path": "json", "data_files": [{"train": [path]}]}):
        assert [danger.does for danger in dangers({"datasets": [config]})] == ["fetches"]
    card = f"---\nx: 1\n---foo: bar\nconfigs:\n- data_files:\n  - split: train\n    path: {path}\n---\n"
    assert [danger.does for danger in dangers({"datasets": [{"path": lay(offline / "it", README__md=card)}]})] == ["fetches"]


def test_a_card_of_addresses_is_listed_without_a_hub_too(offline: Path) -> None:
    for files in ({"README__md": CARD.format("http://b.org/x")}, {"__huggingface__yaml": "configs: [{data_files: 'hf://x'}]"}):
        assert [danger.does for danger in dangers({"datasets": [{"path": lay(offline / "it", **files)}]})] == ["fetches"]
        lay(offline / "it", README__md="# no card")


def test_a_pipe_in_the_place_of_settings_is_not_waited_for(offline: Path) -> None:
    lay(offline / "it")
    for name in ("config.json", "adapter_config.json", "README.md"):
        os.mkfifo(offline / "it" / name)
    assert dangers({"base_model": "./it", "datasets": [{"path": "./it"}]}) == []


def test_a_kind_of_model_whose_code_runs_unasked_is_listed(offline: Path) -> None:
    folder = lay(offline / "it", config__json={"model_type": "stablelm_epoch"})
    config = {"base_model": folder, "trust_remote_code": False, "model_config": {"model_type": "btlm"}}
    assert [(danger.path, danger.does) for danger in dangers(config)] == [
        ("model_config", "runs code"),
        ("base_model", "runs code"),
    ]


def test_a_folder_with_a_script_of_its_own_name_is_listed(offline: Path) -> None:
    assert [danger.does for danger in dangers({"datasets": [{"path": lay(offline / "it", it__py="")}]})] == ["runs code"]


@pytest.mark.usefixtures("online")
def test_every_rule_is_tried() -> None:
    tried = {danger.what for config in (*RUNS.values(), *FETCHES.values()) for danger in dangers(config)}
    assert tried | FOLDERS.keys() == {rule.what for rule in (*RULES, PACKS)}


def nested(keys: list[str], value: Any) -> Any:
    """A config in which that path of a rule has this value."""
    first, *below = keys or [""]
    return value if not first else [nested(below, value)] if first == "*" else {first: nested(below, value)}


def values_tried(rule: Rule) -> list[Any]:
    """Those with which the examples above fall under a rule."""
    return [
        danger.value
        for config in (*RUNS.values(), *FETCHES.values())
        for danger in dangers(config)
        if (danger.does, danger.what) == (rule.does, rule.what)
    ]


@pytest.mark.usefixtures("online")
def test_every_key_of_a_rule_is_listed_under_each_of_its_names() -> None:
    tried = 0
    also = aliases()
    assert ("model_kwargs", "overrides_of_model_kwargs") in also
    for rule in RULES:
        value = next(iter(values_tried(rule)), None) if rule.keys != ("rl",) else None  # looks at more than its value
        for key in rule.keys if value is not None else ():
            last = key.replace(".*", "").rsplit(".", 1)[-1]
            for name in (last, *(alias for alias, own in also if own == last)):
                parts = key.split(".")
                parts[len(parts) - 1 - parts[::-1].index(last)] = name
                found = [(danger.path.split(".")[-1].partition("[")[0], danger.does) for danger in dangers(nested(parts, value))]
                assert (name, rule.does) in found, f"{'.'.join(parts)}: {value}"
                tried += 1
    assert tried > 60


def aliases() -> set[tuple[str, str]]:
    return {(alias, path.rsplit(".", 1)[-1]) for path, info in schema().items() for alias in names_of(info)}


def names_of(info: Any) -> list[str]:
    """Its aliases; an AliasPath, which no rule could follow, has no name here and is noticed."""
    return [
        choice
        for alias in (info.alias, info.validation_alias)
        if alias is not None
        for choice in getattr(alias, "choices", [alias])
        if choice.strip()
    ]


def parts_of(annotation: Any) -> Iterator[Any]:
    """The types that a type is made of, the words of a `Literal` left out."""
    if get_origin(annotation) is Literal:
        return
    inner = [part for part in get_args(annotation) if isinstance(part, type) or get_args(part) or isinstance(part, str)]
    yield from [annotation] if not inner or get_origin(annotation) in (dict, list) else []
    for part in inner:
        yield from parts_of(part)


def names_something(annotation: Any) -> bool:
    """Whether a value of that type can be a string, or hold one."""
    plain = (bool, int, float, type(None), enum.Enum, BaseModel)
    return any(
        not (isinstance(part, type) and issubclass(part, plain)) and get_origin(part) not in (list, tuple)
        for part in parts_of(annotation)
    )


def schema() -> dict[str, Any]:
    """Every key of Axolotl and its integrations, by its path without the places of lists."""
    import axolotl.integrations
    from axolotl.utils.schemas.config import AxolotlInputConfig

    found: dict[str, Any] = {}

    def walk(model: type[BaseModel], path: str, above: tuple[Any, ...]) -> None:
        for key, info in model.model_fields.items():
            if path + key not in found or not names_something(found[path + key].annotation):
                found[path + key] = info
            for part in parts_of(info.annotation):
                if isinstance(part, type) and issubclass(part, BaseModel) and part not in above:
                    walk(part, f"{path}{key}.", (*above, part))

    walk(AxolotlInputConfig, "", ())
    for folder in sorted(Path(axolotl.integrations.__path__[0]).iterdir()):
        if (folder / "args.py").is_file():
            module = module_of(folder / "args.py")
            for name in input_args(folder) & vars(module).keys():
                walk(getattr(module, name), "", ())
    return found


def module_of(file: Path) -> ModuleType:
    """Imported alone: the integration around it may need a package that is not here."""
    name = f"axolotl.integrations.{file.parent.name}.args"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def listed() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "axolotl_keys.yml").read_text(encoding="utf-8"))
    return table


def harmless() -> list[str]:
    return [key for group in listed()["keys"] for key in group["keys"]]


def plain(key: str) -> str:
    """A key's path without places in lists; datasets of all kinds have the same keys."""
    path = ".".join(part for part in key.split(".") if part != "*")
    first, dot, below = path.partition(".")
    return f"datasets.{below}" if dot and first in ("test_datasets", "pretraining_dataset") else path


RULED = {plain(key) for rule in RULES for key in rule.keys}
READ_AND_NO_OPTION = {"processor_config"}
"""Axolotl's loaders ask for it, its schema does not have it."""

of_this_version = pytest.mark.skipif(not version("axolotl").startswith("0.21."), reason="the list is of Axolotl 0.21")


@of_this_version
def test_every_key_that_could_name_something_has_a_rule_or_a_reason() -> None:
    naming = {plain(path) for path, info in schema().items() if names_something(info.annotation)}
    assert naming - RULED - set(harmless()) == set(), (
        "look these up in Axolotl's source: a rule in cli/trust.py, or axolotl_keys.yml"
    )
    assert set(harmless()) - naming == set(), "these are no keys any more, or take only numbers and fixed words"
    assert set(harmless()) & RULED == set()
    assert len(harmless()) == len(set(harmless()))


@of_this_version
def test_what_a_rule_looks_at_is_a_key_of_axolotl() -> None:
    """One that Axolotl renames would be looked for in vain, and nobody would be warned."""
    assert RULED - {plain(path) for path in schema()} == READ_AND_NO_OPTION


@of_this_version
def test_the_hooks_of_every_integration_were_read() -> None:
    import axolotl.integrations

    folders = Path(axolotl.integrations.__path__[0]).iterdir()
    assert sorted(folder.name for folder in folders if (folder / "__init__.py").is_file()) == listed()["integrations"]


def test_every_reader_of_data_was_looked_at() -> None:
    from datasets import packaged_modules

    from dwl_plugin.cli.trust import _OTHER_READERS, _READERS

    assert set(packaged_modules._PACKAGED_DATASETS_MODULES) <= _READERS | _OTHER_READERS
    assert not _READERS & _OTHER_READERS


class Inner(BaseModel):
    reward_funcs: list[str] | None = Field(default=None, validation_alias=AliasChoices("reward_funcs", "rewards"))


class Future(BaseModel):
    """A schema of which nobody has looked at `trainer_of_the_future`."""

    trl: Inner | None = None
    trainer_of_the_future: dict[str, Any] | None = None
    plugins: list[str] | None = Field(default=None, alias="extensions")


def test_new_names_and_new_keys_of_a_new_axolotl_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import axolotl.utils.schemas.config

    monkeypatch.setattr(axolotl.utils.schemas.config, "AxolotlInputConfig", Future)
    axolotl_keys.other_names.cache_clear()
    try:
        config = {"trl": {"rewards": ["mine.reward"]}, "extensions": ["mine.Plugin"]}
        assert [danger.path for danger in dangers(config)] == ["extensions[0]", "trl.rewards[0]"]
    finally:
        axolotl_keys.other_names.cache_clear()
    naming = {plain(path) for path, info in schema().items() if names_something(info.annotation)}
    assert naming - RULED - set(harmless()) == {"trainer_of_the_future"}


def test_without_axolotl_the_rules_hold_for_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking() -> Any:
        raise ImportError

    monkeypatch.setattr(axolotl_keys, "other_names", lacking)
    assert [danger.path for danger in dangers({"overrides_of_model_kwargs": {"weights_only": False}})] == [
        "overrides_of_model_kwargs"
    ]


def test_packs_are_found_without_axolotl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(axolotl_keys, "other_names")
    assert [danger.path for danger in fetched_packs(FETCHES["dwl.pack"] | {"trust_remote_code": True})] == ["dwl.pack"]


FREE: dict[str, tuple[dict[str, Any], bool]] = {
    "numbers": ({"use_cache": False, "rope_scaling": {"type": "linear", "factor": 2.0}, "dtype": "bfloat16"}, False),
    "kept safe": ({"trust_remote_code": False, "weights_only": True, "attn_implementation": "sdpa"}, False),
    "pickled weights": ({"weights_only": False}, True),
    "a kernel": ({"text_config": {"attn_implementation": "org/kernel"}}, True),
    "another config": ({"config": "gpt2"}, True),
    "another revision": ({"revision": "refs/pr/99"}, True),
    "code of another repository": ({"code_revision": "main"}, True),
}


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("key", ["model_kwargs", "model_config", "processor_kwargs"])
@pytest.mark.usefixtures("offline")
def test_free_settings_are_listed_if_they_name_or_switch_on_anything(name: str, key: str) -> None:
    settings, listed = FREE[name]
    assert [danger.path for danger in dangers({key: settings})] == [key] * listed


@pytest.mark.parametrize("key", ["type", "config"])
def test_a_list_that_stands_twice_in_a_yaml_is_seen_under_both_keys(key: str) -> None:
    shared = ["gpt2"]
    other = {"type": "config", "config": "type"}[key]
    assert dangers({"model_kwargs": {key: shared, other: shared}})


@pytest.mark.usefixtures("online")
def test_an_ordinary_local_config_is_trusted() -> None:
    lay(Path("model"), config__json={"model_type": "llama", "auto_map": {}, "_attn_implementation": "eager"})
    Path("rows.jsonl").touch()
    lay(Path("rows"), README__md="---\nlicense_link: https://example.org\nconfigs: [{data_files: '*.json'}]\n---\n")
    lay(Path("adapter"), adapter_config__json={"base_model_name_or_path": "org/model"})
    config = {
        "plugins": ["dwl_plugin.DWLPlugin", "axolotl.integrations.liger.LigerPlugin"],
        "base_model": "./model",
        "lora_model_dir": "./adapter",
        "model_type": "AutoModelForCausalLM",
        "tokenizer_type": "PreTrainedTokenizerFast",
        "trust_remote_code": False,
        "attn_implementation": "flash_attention_2",
        "datasets": [
            {"path": "rows.jsonl", "type": "chat_template", "ds_type": "json"},
            {"path": "./no/such.jsonl", "type": "context_qa.load_v2"},
            {"path": "./rows", "type": "axolotl.integrations.kd.chat_template"},
        ],
        "pretraining_dataset": {"path": "json", "data_files": "rows.jsonl"},
        "loss": "dwl",
        "dwl": {"classes": {"a": {"regex": "https?://"}}},
    }
    assert dangers(config) == []


@pytest.mark.usefixtures("online")
def test_a_plugin_whose_name_only_looks_like_ours_is_not_ours() -> None:
    names = ["dwl_plugin_evil.Plugin", "axolotl.integrations_evil.X", "evil.dwl_plugin.DWLPlugin"]
    assert len(dangers({"plugins": names})) == 3


SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(online: Path) -> str:
    folder = online / "hub" / "models--org--model"
    (folder / "snapshots" / SHA).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(SHA)
    return "org/model"


@pytest.mark.parametrize("key", ["revision_of_model", "model_revision"])
@pytest.mark.parametrize(
    ("revision", "found"), [(None, 0), ("main", 0), (SHA, 0), ("refs/pr/99", 1), ("f" * 40, 1), ("../snapshots", 1), ("\0", 1)]
)
def test_a_model_in_the_cache_is_not_fetched_and_another_revision_of_it_is(
    key: str, revision: Any, found: int, cached: str
) -> None:
    assert [danger.path for danger in dangers({"base_model": cached, key: revision})] == ["base_model"] * found


def test_a_file_or_an_empty_folder_of_the_name_does_not_keep_the_hub_from_being_asked(online: Path) -> None:
    (online / "gpt2").touch()
    (online / "org" / "adapter").mkdir(parents=True)
    (online / "s3:" / "bucket").mkdir(parents=True)
    config = {"base_model": "gpt2", "lora_model_dir": "org/adapter", "datasets": [{"path": "s3://bucket"}]}
    assert [danger.path for danger in dangers(config)] == [*list(config)[:2], "datasets[0].path"]


@pytest.mark.parametrize("name", ["evil/model.json", "evil/rows.parquet", "model.txt"])
@pytest.mark.usefixtures("online")
def test_a_name_of_the_hub_may_look_like_a_file(name: str) -> None:
    assert [danger.does for danger in dangers({"base_model": name, "datasets": [{"path": name}]})] == ["fetches"] * 2


@pytest.mark.usefixtures("offline")
def test_offline_nothing_is_fetched_from_the_hub() -> None:
    assert dangers({"base_model": "org/model", "datasets": [{"path": "org/data"}]}) == []
