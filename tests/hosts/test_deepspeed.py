"""DeepSpeed's engine on two ranks (CPU, gloo) trains as one rank on the same rows: ZeRO-2, ZeRO-3, sequence parallelism (ALST).
Needs `deepspeed`: `.ci/run deepspeed`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hosts import harness, ranks as on_ranks
from tests.hosts.ranks import Ranks, Report, train_with_deepspeed
from tests.hosts.test_ranks import ALPHA, CLASSES, assert_same, dwl, five_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Settings = dict[str, Any]
TIMEOUT = 600.0  # seconds that a run may take on a machine that does much else; four on one that does not

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "lora_dropout": 0.0}
ON_THE_HEAD = {**LORA, "lora_target_linear": None, "lora_target_modules": ["q_proj", "lm_head"]}
CONTROLLER = {"type": "group_dro", "eta": 0.5, "every": 1, "min_alpha": 0.02}
ADAM = {"optimizer": "adamw_torch", "learning_rate": 0.003}

DFT = {"loss": "dft", "dwl": {"classes": {"number": {"regex": r"\d+", "allow_empty": True}, "control": {"tokens": ["<|im_end|>"]}}}}

CASES: dict[str, Settings] = {
    "dft": DFT,
    "dwl": {},
    "dwl, accumulated": {"micro_batch_size": 1, "gradient_accumulation_steps": 2},
    "dwl, LoRA, held to the base model": {**LORA, "dft": {"anchor": 0.3}},
    "dwl, LoRA on the head": ON_THE_HEAD,
    "controller": {"dwl": {"classes": CLASSES, "alpha": ALPHA, "reduction": "class_mean", "controller": CONTROLLER}},
}
SHARED: dict[str, Settings] = {"dft": DFT, "dwl": {}, "dwl, samples": {"dwl": dwl("sequence_mean_token_sum")}, "dwl, LoRA": LORA}


def zero(stage: int) -> Settings:
    """Under ZeRO-3 every parameter in pieces, and again after each use: by default it keeps small ones whole."""
    pieces = dict.fromkeys(("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"), 0)
    whole = {**pieces, "stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    auto = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")
    return {"zero_optimization": {"stage": stage, **whole}, **dict.fromkeys(auto, "auto")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head of its own, which is trained."""
    folder = tmp_path_factory.mktemp("untied")
    harness.make_tokenizer(folder)
    harness.make_model(folder, tie_word_embeddings=False)
    return folder


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    pair = Ranks(2, fresh=True)
    yield pair
    pair.stop()


@pytest.fixture
def run(folder: Path, uneven: Path, tmp_path: Path) -> Callable[..., Settings]:
    def config(name: str, **changes: Any) -> Settings:
        return harness.config(folder, uneven, tmp_path / name, **five_steps(uneven, "class_mean", **changes))

    return config


def assert_alike(two: Report, one: Report) -> None:
    """fp32: DeepSpeed adds up in another order, so above 1 it is 1e-6 of the value."""
    assert len(one.logged("loss")) == 5
    assert one.logged("loss")[3] > 0
    assert_same(two, one, rel=1e-6)
    assert two.logged("grad_norm") == pytest.approx(one.logged("grad_norm"), rel=1e-5)


def on_one_rank(config: Settings, accumulated: int) -> Report:
    return on_ranks.train({**config, "gradient_accumulation_steps": accumulated * config["gradient_accumulation_steps"]})


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_under_zero_are_one_rank(run: Callable[..., Settings], pair: Ranks, case: str) -> None:
    one = on_one_rank(run("one", **CASES[case]), 2)
    for stage in (2, 3):
        two, _ = pair(train_with_deepspeed, run(f"zero{stage}", **CASES[case], deepspeed=zero(stage)), timeout=TIMEOUT)
        assert_alike(two, one)


@pytest.mark.parametrize(("stage", "case"), [(2, "controller"), (3, "controller"), (3, "dwl, LoRA on the head")])
def test_a_resumed_run_under_zero_is_the_whole_run(run: Callable[..., Settings], pair: Ranks, stage: int, case: str) -> None:
    settings = {**CASES[case], **ADAM, "deepspeed": zero(stage), "save_strategy": "steps", "save_steps": 2}
    whole, _ = pair(train_with_deepspeed, run("whole", **settings), timeout=TIMEOUT)
    checkpoint = Path(run("whole")["output_dir"]) / "checkpoint-2"
    assert list(checkpoint.glob("global_step2/*_optim_states.pt")), "this is no checkpoint of DeepSpeed"
    again, _ = pair(train_with_deepspeed, run("again", **settings, resume_from_checkpoint=str(checkpoint)), timeout=TIMEOUT)
    keys = {key for entry in whole.history for key in entry if key in ("loss", "nll") or "dwl/" in key}
    assert {"loss", "nll", "dwl/alpha/number"} <= keys
    for key in keys:
        assert again.logged(key) == whole.logged(key), key
    for name, parameter in whole.parameters.items():
        assert torch.equal(again.parameters[name], parameter), name


@pytest.mark.parametrize("case", SHARED)
def test_two_ranks_that_share_each_sequence_are_one_rank(run: Callable[..., Settings], pair: Ranks, case: str) -> None:
    """Padded to one length, for gloo gathers no batches of different ones."""
    one = on_one_rank(run("one", **SHARED[case]), 2)
    shared = {"context_parallel_size": 2, "gradient_accumulation_steps": 2, "sequence_len": 128, "pad_to_sequence_len": True}
    shared |= {"tiled_mlp": True}
    for stage in (2, 3):
        settings = run(f"shared{stage}", **SHARED[case], **shared, deepspeed=zero(stage))
        two, _ = pair(train_with_deepspeed, settings, timeout=TIMEOUT)
        assert_alike(two, one)
