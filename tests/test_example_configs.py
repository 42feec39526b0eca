"""Every file in `example_configs/` is a config that a person can copy: ours, Axolotl's, and trained for two steps."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from dwl_plugin.cli import init, quickstart
from dwl_plugin.cli.quickstart.problems import generate, with_mistakes
from dwl_plugin.config import parse

FOLDER = Path(__file__).parents[1] / "example_configs"
EXAMPLES = sorted(FOLDER.rglob("*.y*ml"))
each = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)

BY_CARD = {
    "qlora-8gb-numbers": ("numbers", "8GB"),
    "qlora-12gb-tool-calls": ("tool-calls", "12GB"),
    "qlora-16gb-reasoning": ("reasoning", "16GB"),
    "qlora-24gb-code": ("code", "24GB"),
    "full-fsdp2-answers": ("answers", "4x24GB-fsdp2"),
    "full-zero3-json": ("json", "4x24GB-zero3"),
}
SEVERAL_CARDS = ("fsdp_version", "fsdp_config", "deepspeed")
CONSUMER_GPU = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "n_node": 1, "compute_capability": "sm_89"}


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def test_there_are_sixteen() -> None:
    assert len(EXAMPLES) == 16, "a new example needs a number here"


@pytest.mark.parametrize("name", BY_CARD)
def test_a_config_by_card_is_what_init_writes(name: str) -> None:
    assert (FOLDER / f"{name}.yml").read_text(encoding="utf-8") == init.written(*BY_CARD[name])


def test_each_card_has_a_config() -> None:
    assert [card for _, card in BY_CARD.values()] == list(init.CARDS)


@each
def test_our_keys_parse(path: Path) -> None:
    block = parse(load(path))
    assert block is not None
    assert parse(block.dump()) == block


@each
def test_the_plugin_is_required_by_name(path: Path) -> None:
    """Without this line a machine that lacks the package trains plain cross-entropy and says nothing."""
    assert load(path)["plugins"] == ["dwl_plugin.DWLPlugin"]


@each
def test_it_begins_with_what_it_is_for_what_it_needs_and_what_to_watch(path: Path) -> None:
    head = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    assert head is not None
    assert re.findall(r"^# (What for|Needs|Watch): ", head[0], flags=re.M) == ["What for", "Needs", "Watch"]


def test_gpu_examples_use_what_their_owners_use() -> None:
    for path in EXAMPLES:
        if path.name == "quickstart.yml" or path.name.startswith("full-"):
            continue
        usual = {
            "adapter": "qlora",
            "load_in_4bit": True,
            "sample_packing": True,
            "optimizer": "paged_adamw_8bit",
            "bf16": "auto",
            "attn_implementation": "flash_attention_2",
            "gradient_checkpointing": True,
        }
        assert usual.items() <= load(path).items(), path.name


def test_the_quickstart_example_is_the_packages_template() -> None:
    """One text: the wheel carries the template, the repository shows it beside the others."""
    assert (FOLDER / "quickstart.yml").read_text(encoding="utf-8") == quickstart.template()


def test_the_quickstart_writes_the_template_with_its_paths_and_steps(tmp_path: Path) -> None:
    out = tmp_path / "a b: #c"  # a path that YAML would take apart
    written = yaml.safe_load(quickstart.render(quickstart.template(), Path("/models/x"), out, 3))
    changed = {
        "base_model": "/models/x",
        "datasets": [{"path": str(out / "problems.jsonl"), "type": "chat_template"}],
        "dataset_prepared_path": str(out / "prepared"),
        "output_dir": str(out / "out"),
        "max_steps": 3,
        "eval_steps": 3,
        "save_steps": 3,
    }
    assert written == {**yaml.safe_load(quickstart.template()), **changed}


def test_the_baseline_of_the_quickstart_is_the_same_run_without_weights() -> None:
    config, plain = (yaml.safe_load(text) for text in (quickstart.template(), quickstart.baseline(quickstart.template())))
    changed = {"loss": "nll", "dwl": {"classes": config["dwl"]["classes"]}, "output_dir": "./baseline"}
    assert list(config["dwl"]) == ["classes", "reduction", "alpha", "schedule"]
    assert plain == {**config, **changed}


def test_the_command_imports_neither_torch_nor_a_host() -> None:
    heavy = ("torch", "axolotl", "transformers", "rich")
    code = f"import sys, dwl_plugin.cli.main; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.fixture(scope="module")
def axolotl() -> None:
    """Fifteen seconds, once; its import warns about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import axolotl.utils.config  # noqa: F401


@each
@pytest.mark.usefixtures("axolotl")
@pytest.mark.filterwarnings("ignore")  # pydantic's, about the fields of the host that are deprecated
def test_axolotl_accepts_it_on_a_consumer_gpu(path: Path) -> None:
    import torch
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("axolotl")
    logger.addHandler(listener)
    try:
        cfg = DictDefault(load(path))
        prepare_plugins(cfg)
        version = torch.__version__.split("+")[0]
        validated = validate_config(cfg, capabilities=CONSUMER_GPU, env_capabilities={"torch_version": version})
    finally:
        logger.removeHandler(listener)
    assert parse(validated.to_dict()) == parse(load(path))
    assert set(load(path)) <= set(validated), "Axolotl dropped a key that it does not know"
    assert not [line for line in said if "deprecated" in line]


@pytest.fixture(scope="module")
def host() -> None:
    """What every run asks for is done once, or kept from its collections: a second a run in the place of twenty."""
    from tests.hosts import harness

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        harness.import_host()


def rows(dataset: dict[str, Any]) -> list[dict[str, Any]]:
    """Word problems in the data set's own form, with an answer in each notation that an example looks for, and a word of the data's
    own on what they count."""
    field = dataset.get("field_messages", "messages")
    keys = dataset.get("message_property_mappings", {"role": "role", "content": "content"})
    out = []
    for number, problem in enumerate(with_mistakes(generate(64, seed=3), 1, seed=3)):
        messages = problem.row()["messages"]
        code = f"\n```python\nanswer = {problem.answer}\n```"
        notations = f"{code}\n\\boxed{{{problem.answer}}}\nThe answer is: {problem.answer}\n#### "
        call = f'<tool_call>\n{{"name": "add", "arguments": {{"to": {problem.answer}}}}}\n</tool_call>'
        messages[1]["content"] = messages[1]["content"].replace("\n#### ", notations).replace("#### ", f"{call}\n#### ")
        own = {"weight": 0.5, "mark": "critical"} if number % 3 == 0 else {}
        out.append({field: [{theirs: message[ours] for ours, theirs in keys.items()} for message in messages], **own})
    return out


def with_local_data(path: Path, folder: Path) -> dict[str, Any]:
    """The example on rows in `folder`, in the place of its data set, and writing there."""
    from tests.hosts import harness

    example = load(path)
    (dataset,) = example["datasets"]
    data = harness.write_rows(folder / "rows.jsonl", rows(dataset))
    local = {key: value for key, value in dataset.items() if key not in ("name", "split")} | {"path": str(data)}
    return {**example, "datasets": [local], "dataset_prepared_path": str(folder / "prepared"), "output_dir": str(folder / "out")}


@pytest.mark.slow
@each
@pytest.mark.usefixtures("host")
@pytest.mark.filterwarnings("ignore")  # the host's and its libraries', in a whole run
def test_it_trains_two_steps(path: Path, tmp_path: Path) -> None:
    """nf4 and all, on a tiny model: what is changed is what a CPU needs, and the sizes."""
    from tests.hosts import harness

    harness.make_tokenizer(tmp_path / "model")
    harness.make_model(tmp_path / "model")
    run = harness.train(
        {
            **{key: value for key, value in with_local_data(path, tmp_path).items() if key not in SEVERAL_CARDS},
            **harness.CPU,
            "base_model": str(tmp_path / "model"),
            "optimizer": "adamw_torch",
            "sequence_len": 512,
            "gradient_accumulation_steps": 1,
            "val_set_size": 0.2,
            "max_steps": 2,
            "logging_steps": 1,
            "dataset_num_proc": 1,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": False,
        }
    )
    assert len(run.logged("loss")) == 2
    assert len(run.logged("nll")) == 2
    assert len(run.logged("eval_nll")) >= 2
    block = parse(load(path))
    assert block is not None
    may_be_empty = {name for name, spec in block.class_configs.items() if spec.allow_empty}
    for name in set(block.class_names) - may_be_empty:
        assert run.logged(f"dwl/nll/{name}") or block.class_names == ("rest",)
