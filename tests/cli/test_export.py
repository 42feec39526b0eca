"""`dwl export` on folders made by hand: what stays with whoever trained, what a stranger's folder can do, what is refused."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from dwl_plugin.cli.main import main
from dwl_plugin.config import parse
from dwl_plugin.hosts.as_it_ran import LEFT_OUT, config_to_keep
from dwl_plugin.run.record import Record
from dwl_plugin.run.startup import keep_config
from tests.cli.little_runs import DWL, evaluation, step, write_run

HISTORY = [evaluation(0, number=3.0, rest=1.0), step(1, alpha=0.2), step(2, alpha=0.7), evaluation(2, number=0.6, rest=1.1)]
SHA = "ab" * 32
CONFIG = {
    "base_model": "/home/anna/models/tiny",
    "plugins": ["dwl_plugin.DWLPlugin", "annas_plugin.AnnasPlugin"],
    "datasets": [
        {"path": "/home/anna/one/rows.jsonl", "type": "chat_template"},
        {"path": "../two/rows.jsonl", "type": "chat_template"},
        {"path": "rows/three.jsonl", "type": "chat_template"},
        {"path": "anna/rows", "split": "train", "revision": "v2"},
    ],
    "eot_tokens": ["/think", "</s>"],
    "special_tokens": {"pad_token": "<pad>"},
    "chat_template_jinja": "{% for message in messages %}\n{{ message }}\n{% endfor %}",
    "output_dir": "~/out",
    "wandb_project": "p",
    "use_wandb": True,
    "hub_model_id": "anna/m",
    "comet_api_key": LEFT_OUT,
    "resume_from_checkpoint": "/home/anna/out/checkpoint-9",
    "note": "hf_AbCdEfGhIjKlMnOpQrStUv",
    "learning_rate": 1e-05,
}
RECORD = {
    "began": "2026-11-27T10:05:12+00:00",
    "model": "/home/anna/models/tiny",
    "data": ["/home/anna/one/rows.jsonl", "../two/rows.jsonl", "rows/three.jsonl", "anna/rows"],
    "packs": {"/home/anna b/my pack.yml": SHA, "numbers": SHA},
    "files": {"/home/anna/models/tiny/model.safetensors": SHA, "/home/anna/one/rows.jsonl": SHA, "../two/rows.jsonl": None},
    "versions": {"dwl_plugin": "0.1.0", "axolotl": "0.21.0"},
}


def dwl(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def run_of(folder: Path, config: Any = CONFIG, record: Any = RECORD, **more: Any) -> Path:
    return write_run(folder / "run", HISTORY, {**DWL, "run": record, "axolotl": config, **more})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_of(tmp_path)


def test_nothing_of_whoever_trained_is_in_it_and_all_of_it_is_listed(run: Path) -> None:
    result = dwl(run)
    assert result.exit_code == 0, result.output
    text = result.stdout
    for own in ("/home", "anna b", "hub_model_id", "wandb", "comet", "hf_Ab", "resume", "~", "..", LEFT_OUT):
        assert own not in text.replace("...", ""), own
    left = ["wandb_project", "use_wandb", "hub_model_id", "comet_api_key", "resume_from_checkpoint", "note"]
    listed = result.stderr.partition("Left out\n")[2].partition("Otherwise")[0].splitlines()
    assert [line.strip(" ·") for line in listed if line] == left
    assert "base_model: /home/anna/models/tiny → ./tiny" in result.stderr
    assert "plugins[1]: annas_plugin.AnnasPlugin" in result.stderr


def test_what_is_no_path_of_the_disk_stays_and_each_path_has_a_name_of_its_own(run: Path) -> None:
    result = dwl(run)
    again = yaml.safe_load(result.stdout)
    assert [entry["path"] for entry in again["datasets"]] == ["./rows.jsonl", "./rows-2.jsonl", "rows/three.jsonl", "anna/rows"]
    for key in ("eot_tokens", "special_tokens", "chat_template_jinja", "learning_rate"):
        assert again[key] == CONFIG[key]
    assert again["output_dir"] == "./out"
    assert parse(again) == parse(DWL)


def test_two_files_stay_two_where_one_is_in_the_folder_already(tmp_path: Path) -> None:
    data = [{"path": "rows.jsonl"}, {"path": "/home/anna/rows.jsonl"}, {"path": "/rows.jsonl"}, {"path": "./../rows.jsonl"}]
    again = yaml.safe_load(dwl(run_of(tmp_path, {**CONFIG, "datasets": data})).stdout)
    assert [entry["path"] for entry in again["datasets"]] == ["rows.jsonl", *(f"./rows-{number}.jsonl" for number in (2, 3, 4))]


def test_a_short_path_is_a_path_where_one_is_meant(tmp_path: Path) -> None:
    data = [{"path": "json", "data_files": ["/rows.jsonl"]}]
    config = {"base_model": "/tiny", "datasets": data, "output_dir": "/out", "eot_tokens": ["/think"]}
    again = yaml.safe_load(dwl(run_of(tmp_path, config)).stdout)
    assert again["datasets"] == [{"path": "json", "data_files": ["./rows.jsonl"]}]
    assert (again["base_model"], again["output_dir"], again["eot_tokens"]) == ("./tiny", "./out", ["/think"])


def test_what_lies_in_a_folder_goes_by_its_folder_and_a_pattern_too(tmp_path: Path) -> None:
    own = "/home/anna/data/a.jsonl"
    data = [{"path": "/home/anna/data", "data_files": [own]}, {"path": "json", "data_files": "/home/anna/one/*.jsonl"}]
    config = {"base_model": "x/y", "datasets": data, "pretraining_dataset": "a/stream", "lora_model_dir": "anna/adapter"}
    result = dwl(run_of(tmp_path, config, {"files": {own: SHA, "/home/anna/data/b.jsonl": SHA}}))
    again = yaml.safe_load(result.stdout)["datasets"]
    assert again == [{"path": "./data", "data_files": ["./data/a.jsonl"]}, {"path": "json", "data_files": "./one/*.jsonl"}]
    assert [line.strip(" ·") for line in result.stderr.partition("Has to be there")[2].splitlines() if line] == [
        f"./data/a.jsonl   sha256 {SHA}",
        f"./data/b.jsonl   sha256 {SHA}",
        "x/y, which was not hashed",
        "anna/adapter, which was not hashed",
        "./one/*.jsonl, which was not hashed",
        "a/stream, which was not hashed",
    ]


def test_a_tilde_is_a_token_too(tmp_path: Path) -> None:
    config = {"base_model": "x/y", "eot_tokens": ["~"], "datasets": [{"path": "~", "type": {"format": "~~ {instruction}"}}]}
    again = yaml.safe_load(dwl(run_of(tmp_path, config, {})).stdout)
    assert again["eot_tokens"] == ["~"]
    assert again["datasets"] == [{"path": "./home", "type": {"format": "~~ {instruction}"}}]


def test_a_signed_address_is_in_no_fact_and_no_class(tmp_path: Path) -> None:
    address = "https://host/rows.jsonl?X-Amz-Signature=hush"
    config, ours = {"base_model": "x/y", "datasets": [{"path": address}]}, {"classes": {"own": {"dataset": address}}}
    result = dwl(run_of(tmp_path, config, {"data": [address]}, dwl={**ours, "alpha": {"own": 2, "rest": 1}}))
    assert "hush" not in result.output
    assert "datasets[0].path\n  · dwl.classes.own.dataset\n" in result.stderr


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85", "x\n\u2029 y: #"])
def test_line_ends_of_unicode_come_back(text: str, tmp_path: Path) -> None:
    assert yaml.safe_load(dwl(run_of(tmp_path, {"base_model": "x/y", "template": text})).stdout)["template"] == text
    block = parse({**DWL, "dwl": {"classes": {"end": {"regex": "a\x85é"}}, "alpha": {"end": 2, "rest": 1}}})
    assert block is not None
    keep_config(block, Record(), {"template": text}, tmp_path)
    kept = yaml.safe_load((tmp_path / "dwl_config.yaml").read_text(encoding="utf-8"))
    assert (kept["axolotl"]["template"], kept["dwl"]) == (text, block.dump()["dwl"])


def test_a_config_of_a_stranger_with_other_types_ends_in_no_traceback(tmp_path: Path) -> None:
    config = {"base_model": ["x"], "datasets": 5, "test_datasets": "x", "plugins": 7, 1: "y", None: 2}
    assert dwl(run_of(tmp_path, config)).exit_code == 0


def test_a_class_of_a_data_set_goes_by_its_new_name(tmp_path: Path) -> None:
    ours = {"classes": {"own": {"dataset": "/home/anna/one/rows.jsonl"}, "dataset": {"dataset": "anna/rows"}}}
    result = dwl(run_of(tmp_path, dwl={**ours, "alpha": {"own": 2, "dataset": 1, "rest": 1}}))
    classes = yaml.safe_load(result.stdout)["dwl"]["classes"]
    assert (classes["own"]["dataset"], classes["dataset"]["dataset"]) == ("./rows.jsonl", "anna/rows")
    assert "/home" not in result.stdout


def test_what_is_inside_a_longer_text_stays_and_is_told(tmp_path: Path) -> None:
    config = {**CONFIG, "note": "python /home/anna/prepare.py", "other": "C:\\Users\\anna", "plain": "see example.com/home/x"}
    told = dwl(run_of(tmp_path, config)).stderr
    assert "inside a longer text, and stays\n  · note\n\nHas to be there" in told


def test_what_has_to_be_there_has_the_names_of_the_file_and_is_told_with_its_hash(run: Path) -> None:
    told = dwl(run).stderr.partition("Has to be there")[2].splitlines()
    assert [line.strip(" ·") for line in told[1:] if line][:6] == [
        f"./tiny/model.safetensors   sha256 {SHA}",
        f"./rows.jsonl   sha256 {SHA}",
        "./rows-2.jsonl   not hashed",
        "rows/three.jsonl, which was not hashed",
        "anna/rows, which was not hashed, at v2",
        "Asks for trust, as it runs code",
    ]


def test_the_head_has_versions_packs_and_results(run: Path) -> None:
    head = dwl(run).stdout.partition("\n\nbase_model")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"# pack          my pack.yml   sha256 {SHA}" in head
    assert f"# pack          numbers   sha256 {SHA}" in head
    assert "dwl_plugin 0.1.0, axolotl 0.21.0" in head
    number = next(line.split() for line in head.splitlines() if line.startswith("# number"))
    assert number == ["#", "number", "25.0", "%", "0.200", "→", "0.700", "3.000", "→", "0.600"]
    assert "on the evaluation set" in head


def test_a_model_of_the_hub_is_held_at_the_commit_that_was_trained(tmp_path: Path) -> None:
    config, record = {**CONFIG, "base_model": "anna/m"}, {"model": "anna/m", "model_commit": "c" * 40}
    result = dwl(run_of(tmp_path, config, record))
    assert yaml.safe_load(result.stdout)["revision_of_model"] == "c" * 40
    assert f"revision_of_model: none → {'c' * 40}" in result.stderr
    for key in ("revision_of_model", "tokenizer_config"):  # with a name of their own for which the commit is none
        kept = yaml.safe_load(dwl(run_of(tmp_path / key, {**config, key: "x/y"}, record)).stdout)
        assert kept.get("revision_of_model") == {**config, key: "x/y"}.get("revision_of_model")


def test_a_run_that_has_logged_nothing_is_exported_without_results(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "dwl_config.yaml").write_text(yaml.safe_dump({**DWL, "run": {}, "axolotl": {"base_model": "x/y"}}))
    result = dwl(folder)
    assert result.exit_code == 0
    assert "Without results" in result.stdout
    assert "Without results: No trainer_state.json in" in result.stderr
    assert yaml.safe_load(result.stdout)["base_model"] == "x/y"


def test_a_long_template_is_in_it(tmp_path: Path) -> None:
    config = {**CONFIG, "chat_template_jinja": "{# " + "x" * 60_000 + " #}\n{{ messages }}"}
    again = yaml.safe_load(dwl(run_of(tmp_path, config)).stdout)
    assert again["chat_template_jinja"] == config["chat_template_jinja"]


def test_a_line_of_a_stranger_ends_no_comment(tmp_path: Path) -> None:
    data = ["a\u2028b: c\x85d: e"]
    record = {"model": "m\nplugins: [evil]", "data": data, "files": {"f\nevil: 1": None}, "packs": {"p\nevil: 1": SHA}}
    result = dwl(run_of(tmp_path, {"base_model": "x/y"}, record))
    assert result.exit_code == 0
    assert set(yaml.safe_load(result.stdout)) == {"base_model", *DWL}
    assert "\x1b" not in dwl(run_of(tmp_path / "2", {"base_model": "/a/\x1b[31m"}, record)).output


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (DWL, "no config of Axolotl"),
        ({**DWL, "axolotl": {}, "dwl": {"pack": "numbers"}}, "is not what a run writes"),
        ({"axolotl": {}}, "has no `loss`"),
        ({**DWL, "axolotl": {}, "loss": "dfl"}, "loss"),
        (None, "There is no dwl_config.yaml"),
    ],
)
def test_what_is_no_run_of_axolotl_is_refused_with_the_reason(tmp_path: Path, config: Any, said: str) -> None:
    result = dwl(write_run(tmp_path / "run", HISTORY, config))
    assert result.exit_code == 1
    assert said in result.output
    assert result.stdout == ""


def test_a_file_that_is_there_stays(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.yml"
    out.write_text("mine")
    result = dwl(run, "--out", out)
    assert result.exit_code == 1
    assert out.read_text() == "mine"


# --- what a run keeps of its config ----------------------------------------------------------------------------------------------


def test_a_run_keeps_settings_of_other_files_and_no_secret(tmp_path: Path) -> None:
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "template.jinja").write_text("{{ messages }}\n")
    shared = ["a"]
    kept = config_to_keep(
        {
            "deepspeed": str(tmp_path / "zero3.json"),
            "chat_template_jinja": "{{ text }}",
            "datasets": [{"path": "x", "chat_template_jinja": str(tmp_path / "template.jinja")}],
            "test_datasets": [{"path": "x", "chat_template_jinja": str(tmp_path / "template.jinja")}],
            "added_tokens_overrides": {7: "<x>"},
            "service": {"api_key": "hush", "deeper": [{"url": "https://me:hush@host"}]},
            "hub_token": "hush",
            "special_tokens": {"pad_token": "<pad>"},
            "hf_use_auth_token": True,
            "one": shared,
            "two": shared,
            "place": tmp_path,
            "loss": "dft",
            "dwl": {},
        }
    )
    assert kept["deepspeed"] == {"zero_optimization": {"stage": 3}}
    assert kept["chat_template_jinja"] == "{{ text }}"
    assert kept["datasets"][0]["chat_template_jinja"] == "{{ messages }}\n"
    assert kept["test_datasets"] == kept["datasets"]
    assert kept["added_tokens_overrides"] == {7: "<x>"}
    assert kept["service"] == {"api_key": LEFT_OUT, "deeper": [{"url": LEFT_OUT}]}
    assert (kept["hub_token"], kept["special_tokens"], kept["hf_use_auth_token"]) == (LEFT_OUT, {"pad_token": "<pad>"}, True)
    assert not {"loss", "dwl"} & set(kept)
    text = yaml.safe_dump(kept)
    assert "hush" not in text
    assert "&" not in text, "the reader of a stranger's run takes no aliases"


@pytest.mark.parametrize("key", ["tensor_parallel_size", "deepcompile"])
def test_settings_that_the_host_opens_as_a_file_stay_one(key: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{}")
    config = {"base_model": "x/y", "deepspeed": str(tmp_path / "ds.json"), key: 2}
    assert config_to_keep(config) == config
    assert "./ds.json, which was not hashed" in dwl(run_of(tmp_path, config, {})).stderr


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hf_token", "hush"),
        ("aws_session_token", "hush"),
        ("note", "glpat-AbCdEfGhIjKlMnOpQrSt"),
        ("note", "xoxb-123456789012-AbCdEfGhIj"),
        ("note", "gho_AbCdEfGhIjKlMnOpQrStUv"),
        ("token", "hush"),
        ("accessToken", "hush"),
        ("aws_access_key_id", "hush"),
        ("AWS_SECRET_ACCESS_KEY", "hush"),
        ("password", 12345),
        ("storage_options", {"key": "hush", "anon": False}),
        ("path", "https://bucket.s3.amazonaws.com/rows.jsonl?X-Amz-Date=1&X-Amz-Signature=ab"),
        ("path", "https://host/rows.jsonl?token=ab"),
        ("note", "OPENAI=sk-proj-AbCd-EfGh_IjKlMnOpQr"),
        ("note", "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh"),
        ("note", "AKIAABCDEFGHIJKLMNOP"),
    ],
)
def test_what_opens_a_service_is_left_out_wherever_it_stands(key: str, value: Any, tmp_path: Path) -> None:
    config = {"base_model": "x/y", "datasets": [{"path": "a/b", "inner": {key: value}}], "more": {"deep": [deepcopy(value)]}}
    in_a_list = key in ("path", "note")
    kept = config_to_keep(config)
    assert kept["datasets"][0]["inner"] == {key: LEFT_OUT}
    assert (kept["more"]["deep"] == [LEFT_OUT]) == in_a_list
    again = yaml.safe_load(dwl(run_of(tmp_path, config)).stdout)  # of a run that kept it
    assert again["datasets"] == [{"path": "a/b", "inner": {}}]
    assert (again["more"] == {"deep": []}) == in_a_list


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pad_token", "<pad>"),
        ("hf_use_auth_token", True),
        ("path", "hf-internal-testing/tiny_random_model_for_tests"),
        ("path", "https://host/rows.jsonl?download=true"),
        ("base_model", "risk-averse-model-of-twenty-letters"),
        ("api_key", None),
    ],
)
def test_what_opens_nothing_stays(key: str, value: Any) -> None:
    assert config_to_keep({"inner": {key: value}}) == {"inner": {key: value}}


def test_a_file_of_settings_that_is_too_large_to_keep_stays_a_path(tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text("x" * 65_537)
    config = {"base_model": "x/y", "chat_template_jinja": str(tmp_path / "template.jinja")}
    assert config_to_keep(config) == config


def test_a_config_that_is_too_large_to_read_is_not_kept_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block = parse(DWL)
    assert block is not None
    keep_config(block, Record(), {"chat_template_jinja": "x" * 262_144}, tmp_path)
    assert "it has more than 256 KiB; `dwl export` needs it" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "dwl_config.yaml").read_text()) == {**block.dump(), "run": {}}
    assert "no config of Axolotl" in dwl(tmp_path).output
