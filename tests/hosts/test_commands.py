"""Axolotl's other commands do with our keys in the config what they do without."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.harness import train

Configure = Callable[..., dict[str, Any]]
OURS = {"loss": "nll", "dwl": {"classes": {"number": {"regex": r"\d+"}}}}
DWL = {"loss": "dwl", "dwl": {"classes": {"number": {"regex": r"\d+"}}, "reduction": "class_mean"}}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


def load(settings: dict[str, Any]) -> Any:
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault

    return load_cfg(DictDefault(settings))


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["axolotl"])


def summary(folder: Path) -> dict[str, str]:
    lines = (folder / "run" / "eval_summary.csv").read_text().splitlines()
    return {line.split(",")[0]: line for line in lines}


@pytest.mark.slow
def test_evaluate(configure: Configure, tmp_path: Path) -> None:
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.evaluate import do_evaluate

    for name, keys in (("stock", {}), ("ours", OURS)):
        do_evaluate(load(configure(**keys, val_set_size=8, out=tmp_path / name)), TrainerCliArgs())
    stock, ours = summary(tmp_path / "stock"), summary(tmp_path / "ours")
    assert set(stock) < set(ours)
    assert "dwl/nll/number" in ours
    numbers = [[float(value) for value in table["loss"].split(",")[1:]] for table in (stock, ours)]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-4)


def test_preprocess(configure: Configure, tmp_path: Path) -> None:
    from axolotl.cli.args import PreprocessCliArgs
    from axolotl.cli.preprocess import do_preprocess
    from datasets import load_from_disk

    rows = []
    for name, keys in (("stock", {}), ("ours", DWL)):
        prepared = tmp_path / f"prepared {name}"
        do_preprocess(load(configure(**keys, dataset_prepared_path=str(prepared))), PreprocessCliArgs(download=False))
        rows.append(load_from_disk(str(next(path.parent for path in prepared.rglob("state.json")))).to_list())
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_merge_lora(configure: Configure, tmp_path: Path) -> None:
    from axolotl.cli.merge_lora import do_merge_lora

    train(configure(**LORA, **DWL, max_steps=1))
    merged = []
    for keys in (DWL, {}):
        cfg = load(configure(**LORA, **keys, lora_model_dir=str(tmp_path / "run")))
        do_merge_lora(cfg=cfg)
        (file,) = (tmp_path / "run" / "merged").glob("*.safetensors")
        merged.append(hashlib.sha256(file.read_bytes()).hexdigest())
        file.unlink()
    assert merged[0] == merged[1]


@pytest.mark.slow
def test_inference(configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from axolotl.cli import inference
    from axolotl.cli.args import InferenceCliArgs
    from transformers import GenerationConfig

    def short(**options: Any) -> Any:
        return GenerationConfig(**{**options, "max_new_tokens": 8})

    monkeypatch.setattr(inference, "GenerationConfig", short)
    said = []
    for keys in ({}, DWL):
        questions = iter(["What is 2 + 2?", ""])
        monkeypatch.setattr(inference, "get_multi_line_input", lambda questions=questions: next(questions))
        monkeypatch.setattr("sys.stdin", io.StringIO())
        cfg = load(configure(**keys))
        torch.manual_seed(0)
        capsys.readouterr()
        inference.do_inference(cfg=cfg, cli_args=InferenceCliArgs())
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "[dwl]" not in said[1]
    assert len(said[1]) > 100
