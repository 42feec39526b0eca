"""What `dwl check` says of configs as people have them: no problem that is none, and none missed."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

from dwl_plugin.errors import did_you_mean
from dwl_plugin.hosts.axolotl_keys import dropped_keys, integration_keys
from dwl_plugin.hosts.needed_files import file_problems, on_the_hub_perhaps
from tests.hosts import harness

Check = Callable[..., Result]
Write = Callable[..., Path]

LIGER = "axolotl.integrations.liger.LigerPlugin"


def found_by(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def told(result: Result) -> list[str]:
    return [f"{problem['path']}: {problem['message']}" for problem in found_by(result)["problems"]]


# A key that stands twice.


def test_a_doubled_key_is_a_hint_with_the_line_that_counts(dwl: Check, write_config: Write) -> None:
    config = write_config(loss="dft", dft={"exponent": 1.0})
    last = len(config.read_text().splitlines()) + 1
    config.write_text(f"{config.read_text()}dft: {{exponent: 0.5, exponent: 0.25}}\n")
    result = dwl("check", config, "--json")
    assert result.exit_code == 0, result.output
    hints = [hint for hint in found_by(result)["hints"] if "stands twice" in hint]
    assert [hint.partition(" stands")[0] for hint in hints] == ["`dft`", "`dft.exponent`"]
    assert all(f"line {last} counts. Delete the other" in hint for hint in hints)


# One fault, one problem.


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"datasets": [{"path": "rows.jsonl", "type": "sharegpt", "conversation": "chatml"}]}, "datasets"),
        ({"datasets": "rows.jsonl"}, "datasets"),
        ({"datasets": None, "pretraining_dataset": 7, "max_steps": 2}, "pretraining_dataset"),
        ({"test_datasets": [7], "eval_strategy": "steps", "eval_steps": 2}, "test_datasets"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"sequence_len": "long", "sample_packing": True}, "sequence_len"),
    ],
    ids=["old type", "no list", "stream", "test", "rate", "length"],
)
def test_one_fault_is_one_problem(
    dwl: Check, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    problems = found_by(dwl("check", write_config(loss="dft", **changes), "--json"))["problems"]
    assert {problem["path"].partition(".")[0].partition("[")[0] for problem in problems} == {path}
    assert "SFTDataset(" not in str(problems)


def test_a_fault_in_the_datasets_hides_none_of_the_classes(dwl: Check, write_config: Write) -> None:
    classes = {"several": {"tokens": ["<think>"]}}
    config = write_config(datasets=[{"path": "rows.jsonl", "type": "sharegpt"}], loss="dwl", dwl={"classes": classes})
    assert {line.partition(":")[0] for line in told(dwl("check", config, "--json"))} >= {
        "datasets",
        "dwl.classes.several.tokens[0]",
    }


# Keys that Axolotl drops.


def hints_of(**raw: Any) -> dict[str, str]:
    return dict(dropped_keys(raw))


@pytest.mark.usefixtures("host")
def test_a_key_of_a_plugin_that_is_not_listed_names_the_plugin() -> None:
    found = hints_of(liger_rope=True, liger_cross_entropy=False, use_scattermoe=True, kd_alpha=0.5)
    assert f"add `- {LIGER}`" in found["liger_rope"]
    assert f"add `- {LIGER}`" in found["liger_cross_entropy"]
    assert "axolotl.integrations.kernels.KernelsPlugin" in found["use_scattermoe"]
    assert "KDPlugin`, which is not under `plugins:`" in found["kd_alpha"]
    assert "add" not in found["kd_alpha"], "it would be refused"
    assert hints_of(plugins=[LIGER], liger_rope=True) == {}
    assert "liger_rope`? That belongs to" in hints_of(liger_rpoe=True)["liger_rpoe"]


@pytest.mark.usefixtures("host")
def test_every_plugin_that_is_named_can_be_listed() -> None:
    """Those whose packages are here."""
    from importlib import import_module

    plugins = set(integration_keys().values())
    assert len(plugins) > 8
    for plugin in plugins:
        module, _, name = plugin.rpartition(".")
        try:
            found = import_module(module)
        except ImportError:
            assert module.endswith(("llm_compressor", "densemixer", "lm_eval", "swanlab"))
            continue
        assert hasattr(found, name), plugin


@pytest.mark.usefixtures("host")
def test_only_what_has_a_value_is_dropped_and_blocks_are_looked_into() -> None:
    data = {"path": "x", "type": "alpaca", "field_instruction": "q", "roles_to_trian": ["assistant"], "shards": 2}
    found = hints_of(debug=None, fsdp=[], special_tokens={"pad_tokn": "x"}, datasets=[data], padding_side="right", data_seed=4)
    assert found == {
        "special_tokens.pad_tokn": "did you mean `pad_token`?",
        "datasets[0].field_instruction": "",
        "datasets[0].roles_to_trian": "did you mean `roles_to_train`?",
        "padding_side": "",
        "data_seed": "",
    }


def test_a_key_that_a_problem_of_axolotl_names_is_not_said_to_be_dropped(dwl: Check, write_config: Write) -> None:
    found = found_by(dwl("check", write_config(loss="dft", fsdp=["full_shard"]), "--json"))
    if any("`fsdp`" in problem["message"] for problem in found["problems"]):  # since Axolotl 0.20
        assert not any("`fsdp`" in hint for hint in found["hints"])


# "Did you mean".


def slip(word: str, rng: random.Random) -> str:
    i, letter = rng.randrange(len(word) - 1), rng.choice("abcdefghijklmnopqrstuvwxyz")
    return rng.choice(
        [
            word[:i] + word[i + 1 :],
            word[:i] + letter + word[i:],
            word[:i] + letter + word[i + 1 :],
            word[:i] + word[i + 1] + word[i] + word[i + 2 :],
        ]
    )


@pytest.mark.usefixtures("host")
def test_did_you_mean_finds_slips_and_nothing_else() -> None:
    """Keys of other libraries are no slips: of 113 of them 84 were told the name of a key that does something else."""
    import peft
    import transformers
    import trl
    from axolotl.integrations.config import merge_input_args

    known = list(merge_input_args()[0].model_fields)
    rng = random.Random(0)
    pairs = [(slip(word, rng), word) for word in rng.sample(known, 60)]
    right = sum(did_you_mean(written, known) == f"did you mean `{word}`?" for written, word in pairs if written not in known)
    assert right >= 56
    foreign = {field.name for kind in (transformers.TrainingArguments, trl.SFTConfig, peft.LoraConfig) for field in fields(kind)}
    foreign -= set(known)
    told_of = {name: hint for name in foreign if (hint := did_you_mean(name, known))}
    assert len(foreign) > 80
    assert len(told_of) <= 1, told_of


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("micro-batch-size", ["micro_batch_size"], "micro_batch_size"),
        ("learningRate", ["learning_rate"], "learning_rate"),
        ("dlw", ["nll", "dft", "dwl"], "dwl"),
        ("load_in_16bit", ["load_in_8bit"], ""),
        ("liger_rope", ["lr_groups"], ""),
        ("liger_cross_entropy", ["chunked_cross_entropy"], ""),
        ("flash_attn_fuse_qkv", ["flash_attn_fuse_mlp"], ""),
        ("eos_token", ["eot_tokens"], ""),
        ("r", ["rl"], ""),
        ("x", [], ""),
    ],
)
def test_near_is_a_slip_of_the_fingers(word: str, known: list[str], meant: str) -> None:
    assert did_you_mean(word, known) == (f"did you mean `{meant}`?" if meant else "")


# Files that a run reads.


def lay(folder: Path) -> None:
    """A model, an adapter, rows, a checkpoint, and a pipe and a link to a device."""
    harness.write_rows(folder / "rows.jsonl", harness.rows(2))
    for name, files in {
        "model": {"config.json": "{}", "model.safetensors": "x"},
        "bare": {"config.json": "{}"},
        "torn": {
            "config.json": "{}",
            "a.safetensors": "",
            "model.safetensors.index.json": '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}',
        },
        "twofold": {
            "model.safetensors.index.json": '{"weight_map": {"x": "a.safetensors"}}',
            "a.safetensors": "",
            "pytorch_model.bin.index.json": '{"weight_map": {"x": "a.bin"}}',  # as a download with `--exclude "*.bin"` leaves it
        },
        "adapter": {"adapter_config.json": "{}"},
        "checkpoint-2": {"trainer_state.json": '{"global_step": 2}'},
        "checkpoint-4": {"trainer_state.json": '{"global'},
        "piped": {"model.safetensors": "x"},
        "endless": {"model.safetensors": "x"},
    }.items():
        (folder / name).mkdir()
        for file, text in files.items():
            (folder / name / file).write_text(text)
    os.mkfifo(folder / "piped" / "config.json")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "endless" / "config.json").symlink_to("/dev/zero")
    (folder / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    (folder / "torn.json").write_text('{"zero')
    (folder / "template.jinja").write_text("{{ messages }}")


MISSING: dict[str, tuple[dict[str, Any], str]] = {
    "deepspeed": ({"deepspeed": "deepspeed_configs/zero2.json"}, "there is no such file"),
    "deepspeed, cut off": ({"deepspeed": "torn.json"}, "this file is not JSON"),
    "deepspeed, a pipe": ({"deepspeed": "pipe.jsonl"}, "is not read: it is a pipe"),
    "resume_from_checkpoint": ({"resume_from_checkpoint": "./checkpoint-999"}, "there is no such folder"),
    "resume_from_checkpoint, cut off": ({"resume_from_checkpoint": "checkpoint-4"}, "its trainer_state.json breaks off"),
    "lora_model_dir": ({"lora_model_dir": "./nowhere", "adapter": "lora"}, "there is no such folder"),
    "lora_model_dir, empty": ({"lora_model_dir": "model", "adapter": "lora"}, "no adapter_config.json"),
    "base_model": ({"base_model": "models/of/mine"}, "there is no such folder"),
    "base_model, a pipe": ({"base_model": "piped"}, "config.json is no file: it is a pipe"),
    "base_model, a device": ({"base_model": "endless"}, "config.json is no file: it is a device"),
    "base_model, no weights": ({"base_model": "bare"}, "there are no weights in this folder"),
    "base_model, a shard": ({"base_model": "torn"}, "b.safetensors among them"),
    "base_model_config": ({"base_model_config": "/nowhere"}, "there is no such folder"),
    "tokenizer_config": ({"tokenizer_config": "./nowhere"}, "there is no such folder"),
    "processor_config": ({"processor_config": "~/nowhere"}, "there is no such folder"),
    "datasets[1].path": ({"datasets": [{"path": "rows.jsonl"}, {"path": "lost.jsonl"}]}, "no such file or folder"),
    "datasets[0].path": ({"datasets": [{"path": "pipe.jsonl"}]}, "it is a pipe"),
    "test_datasets[0].path": ({"test_datasets": [{"path": "./data/lost"}]}, "no such file or folder"),
    "pretraining_dataset": ({"pretraining_dataset": "/lost"}, "no such file or folder"),
    "pretraining_dataset[0].data_files": (
        {"pretraining_dataset": [{"path": "json", "data_files": ["rows.jsonl", "lost.jsonl"]}]},
        "there is no such file",
    ),
    "datasets[0].data_files": ({"datasets": [{"path": "json", "data_files": "pipe.jsonl"}]}, "it is a pipe"),
    "resume_from_checkpoint, no name": ({"resume_from_checkpoint": "x" * 5000}, "cannot be read: File name too long"),
    "chat_template_jinja": ({"chat_template_jinja": "lost.jinja"}, "there is no such file"),
    "datasets[0].chat_template_jinja": ({"datasets": [{"path": "rows.jsonl", "chat_template_jinja": "./x.j2"}]}, "no such file"),
}
THERE: list[dict[str, Any]] = [
    {"base_model": "org/name", "tokenizer_config": "gpt2", "deepspeed": "zero.json", "resume_from_checkpoint": "checkpoint-2"},
    {"base_model": "model", "lora_model_dir": "adapter", "adapter": "lora", "chat_template_jinja": "template.jinja"},
    {"base_model": "twofold"},
    {"base_model": "bare", "reinit_weights": True, "resume_from_checkpoint": None, "deepspeed": {"zero_optimization": {}}},
    {"chat_template_jinja": "{% for m in messages %}{{ m }}{% endfor %}", "lora_model_dir": "./nowhere"},
    {
        "chat_template": "chatml",
        "chat_template_jinja": "lost.jinja",
        "datasets": [{"path": "org/data"}, {"path": "s3://b/x.jsonl"}],
    },
    {"datasets": [{"path": "rows.jsonl"}, {"path": "json", "data_files": ["r*.jsonl", "https://x.org/a.jsonl"]}, {"path": None}]},
]


def dotted(path: str) -> str:
    return path if path != "pretraining_dataset.path" else "pretraining_dataset"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", MISSING)
def test_a_file_that_the_run_needs_and_is_not_there_is_named_with_its_key(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path)
    monkeypatch.chdir(tmp_path)
    config, words = MISSING[case]
    (problem,) = file_problems(config)
    assert dotted(problem.path) == case.partition(",")[0]
    assert words in problem.message


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: str) -> list[str]:  # root may read everything
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "listdir", refuse)
    named = {"base_model": str(tmp_path), "datasets": [{"path": str(tmp_path)}]}
    assert [problem.message for problem in file_problems(named)] == ["this folder cannot be read: Permission denied"] * 2


@pytest.mark.parametrize("config", THERE)
def test_what_is_there_or_may_be_on_the_hub_is_no_problem(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert list(file_problems(config)) == []


def test_what_only_the_hub_may_have_is_said_not_to_have_been_asked_for() -> None:
    config = {"lora_model_dir": "org/adapter", "adapter": "lora", "test_datasets": [{"path": "org/data"}]}
    assert [line.partition(":")[0] for line in on_the_hub_perhaps(config)] == [
        "lora_model_dir org/adapter",
        "test_datasets[0].path org/data",
    ]
    assert list(on_the_hub_perhaps({"lora_model_dir": "org/adapter"})) == []


def test_data_that_only_the_hub_may_have_is_not_looked_at(dwl: Check, write_config: Write) -> None:
    result = dwl("check", write_config(loss="dft", datasets=[{"path": "org/never-seen", "type": "chat_template"}]))
    assert result.exit_code == 2
    (line,) = [line for line in result.output.splitlines() if "org/never-seen" in line]
    assert "without it" not in line
    assert result.output.endswith("No problem in what was: `loss`, `dft` and `dwl`, Axolotl's own keys, the tokenizer.\n")


@pytest.mark.timeout(120)
def test_check_stops_at_missing_files_and_opens_no_pipe(
    dwl: Check, write_config: Write, little_model: Path, tmp_path: Path
) -> None:
    lost = {"deepspeed": "deepspeed_configs/zero2.json", "resume_from_checkpoint": "./out/checkpoint-999"}
    result = dwl("check", write_config(loss="dft", **lost), "--json")
    assert result.exit_code == 1
    assert told(result) == ["deepspeed: there is no such file", "resume_from_checkpoint: there is no such folder"]
    assert found_by(result)["hints"] == []
    lay(tmp_path)
    for model, kind in (("piped", "pipe"), ("endless", "device")):
        result = dwl("check", write_config(model=tmp_path / model, loss="dft"), "--json")
        assert told(result) == [f"base_model: config.json is no file: it is a {kind}"]


# What is said of a run.


def test_losses_that_a_run_switches_off_are_named(dwl: Check, write_config: Write) -> None:
    plugins = ["dwl_plugin.DWLPlugin", LIGER]
    config = write_config(loss="dft", plugins=plugins, liger_fused_linear_cross_entropy=True, liger_rope=True)
    notes = found_by(dwl("check", config, "--json"))["notes"]
    assert "a run switches `liger_fused_linear_cross_entropy` off: `loss: dft` is computed in its place" in notes


@pytest.mark.parametrize("said", [True, None, False])
def test_kernels_for_lora_are_said_to_need_a_gpu(dwl: Check, write_config: Write, said: bool | None) -> None:
    import torch

    kernels = {"lora_mlp_kernel": said, "lora_qkv_kernel": said, "lora_o_kernel": said}
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_linear": True}
    path = write_config(loss="dft", bf16=True, **lora, **kernels)
    raw = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**raw, **({"lora_embedding_kernel": False} if said is False else {})}))
    lines = [note for note in found_by(dwl("check", path, "--json"))["notes"] if "lora_qkv_kernel" in note]
    assert len(lines) == (0 if said is False or torch.cuda.is_available() else 1)
    assert all("run on a GPU only" in line for line in lines)


@pytest.mark.parametrize("folder", [None, "here"])
def test_rows_prepared_earlier_are_told_with_their_folder(
    dwl: Check, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str | None
) -> None:
    from axolotl.utils.data import prepare_datasets

    from dwl_plugin.hosts import axolotl_preview as preview

    monkeypatch.chdir(tmp_path)
    path = write_config(loss="dft")
    raw = yaml.safe_load(path.read_text()) | {"dataset_prepared_path": folder}
    path.write_text(yaml.safe_dump(raw))
    cfg, _ = preview.load_cfg(raw, path)
    with preview.quiet():
        prepare_datasets(cfg, preview.load_tokenizer(cfg))
    (tmp_path / "rows.jsonl").unlink()  # prepared on another machine, as it were
    result = dwl("check", path, "--json")
    assert result.exit_code == 0, result.output
    (note,) = [note for note in found_by(result)["notes"] if "prepared earlier" in note]
    assert f"under {folder or 'last_run_prepared'}, as" in note
