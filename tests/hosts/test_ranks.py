"""Two ranks train as one rank does on the same rows: Axolotl's own loop under DDP, and around a model that FSDP2 shards."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from dwl_plugin.config import parse
from dwl_plugin.errors import DWLError, NotFiniteError
from dwl_plugin.hosts.trainer import _require_cut_sequences, _share
from dwl_plugin.loss.seam import Seam
from dwl_plugin.loss.spec import LossSpec, PendingLoss
from dwl_plugin.loss.token_losses import Power
from dwl_plugin.run.collate import CLASS_IDS, LabellingCollator
from dwl_plugin.run.dataset_check import labeller_of
from tests.hosts import harness, ranks as on_ranks
from tests.hosts.ranks import Ranks, Report

Configure = Callable[..., dict[str, Any]]
CLASSES = {"number": {"regex": r"\d+", "allow_empty": True}, "control": {"tokens": ["<|im_end|>"], "token_loss": "nll"}}
ALPHA = {"number": 5, "control": 2, "rest": 3}
SPEC = LossSpec(weight=(0.5, 0.2, 0.3), objective=(Power(1.0), Power(0.0), Power(1.0)))


def dwl(reduction: str) -> dict[str, Any]:
    overlap = "sum" if reduction == "sequence_mean_token_sum" else "first"
    schedule = {"type": "linear", "to": {"number": 1, "control": 1, "rest": 8}, "start": 1, "end": "100%"}
    return {
        "classes": CLASSES,
        "alpha": ALPHA,
        "reduction": reduction,
        "overlap": overlap,
        "token_loss": "dft",
        "schedule": schedule,
    }


def five_steps(data: Path, reduction: str, **changes: Any) -> dict[str, Any]:
    source = {"path": str(data), "ds_type": "json", "type": None}
    return {
        "loss": "dwl",
        "dwl": dwl(reduction),
        "max_steps": 5,
        "num_epochs": 1,
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "datasets": [source],
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,
        **changes,
    }


def assert_same(two: Report, one: Report, rel: float = 0.0) -> None:
    logged = {key for entry in one.history for key in entry if key in ("loss", "nll", "eval_nll") or "dwl/" in key}
    assert {"loss", "nll", "dwl/nll/number", "dwl/p/rest", "dwl/loss_share/control"} <= logged
    for key in logged:
        assert two.logged(key) == pytest.approx(one.logged(key), rel=rel, abs=1e-6), key
    assert two.parameters.keys() == one.parameters.keys()
    for name, parameter in one.parameters.items():
        assert (two.parameters[name] - parameter).abs().max() <= 1e-6, name


@pytest.fixture(scope="module")
def alone(uneven: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    """The run of one rank that accumulates what two ranks have, once per reduction."""
    reports: dict[str, Report] = {}

    def of(reduction: str) -> Report:
        if reduction not in reports:
            out = tmp_path_factory.mktemp("alone")
            settings = five_steps(uneven, reduction, gradient_accumulation_steps=2)
            reports[reduction] = on_ranks.train(harness.config(model_folder, uneven, out, **settings))
        return reports[reduction]

    return of


def test_the_run_of_one_rank_learns_and_a_step_without_targets_costs_nothing(alone: Callable[[str], Report]) -> None:
    losses = alone("class_mean").logged("loss")
    assert len(losses) == 5
    assert all(loss > 0 for loss in losses[:4])
    assert losses[4] == 0.0


@pytest.mark.parametrize("reduction", ["token_mean", "class_mean", "sequence_mean_token_sum"])
def test_two_ranks_under_ddp_are_one_rank_with_the_same_rows(
    configure: Configure, uneven: Path, ranks: Ranks, alone: Callable[[str], Report], reduction: str
) -> None:
    two, other = ranks(on_ranks.train, configure(**five_steps(uneven, reduction)))
    assert_same(two, alone(reduction))
    for name, parameter in two.parameters.items():
        assert torch.equal(parameter, other.parameters[name]), name


def test_two_ranks_are_held_to_the_same_base_model_as_one(configure: Configure, uneven: Path, ranks: Ranks, tmp_path: Path) -> None:
    """The base model's forward runs inside DDP's, without gradients."""
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "lora_dropout": 0.0}
    settings = five_steps(uneven, "class_mean", dft={"anchor": 0.3}, learning_rate=0.3, **lora)
    one = on_ranks.train(configure(**settings, out=tmp_path / "one", gradient_accumulation_steps=2))
    two, _ = ranks(on_ranks.train, configure(**settings))
    assert one.logged("dwl/kl")[0] == pytest.approx(0.0, abs=1e-6)
    assert one.logged("dwl/kl")[3] > 1e-4
    assert_same(two, one)


CONTROLLERS: dict[str, dict[str, Any]] = {
    "softmax_loss": {"signal": "ratio_to_init", "temperature": 0.1},
    "dwa": {"temperature": 0.1},
    "softadapt": {"beta": 5},
    "group_dro": {"eta": 0.5, "max_change": 0.2},
    "doremi": {"reference": "base", "reference_rows": 20},
    "rlw": {},
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_two_ranks_with_unequal_rows_have_the_alpha_of_one(
    configure: Configure, uneven: Path, ranks: Ranks, tmp_path: Path, name: str
) -> None:
    every = 1 if name == "dwa" else 2  # it needs two windows
    controller = {"type": name, "every": every, "min_alpha": 0.02, **CONTROLLERS[name]}
    block = {"classes": CLASSES, "alpha": ALPHA, "reduction": "class_mean", "controller": controller}
    settings = five_steps(uneven, "class_mean", learning_rate=0.3) | {"dwl": block}
    one = on_ranks.train(configure(**settings, out=tmp_path / "one", gradient_accumulation_steps=2))
    first, second = ranks(on_ranks.train, configure(**settings))
    for key in (f"dwl/alpha/{of}" for of in ALPHA):
        assert first.logged(key) == second.logged(key), key
        assert first.logged(key) == pytest.approx(one.logged(key), abs=1e-6), key
        assert len(first.logged(key)) == 5
    assert len(set(one.logged("dwl/alpha/number"))) > 1, "nothing moved, so nothing was compared"


def test_every_controller_runs_on_two_ranks_here() -> None:
    from dwl_plugin.alpha import controllers

    assert set(CONTROLLERS) == set(controllers.CONTROLLERS)


def train_sharded(settings: dict[str, Any]) -> Report:
    """Axolotl refuses FSDP on a CPU, so its model is sharded after it was built, and not wrapped in DDP."""
    import axolotl.train

    def shard(trainer: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        for layer in trainer.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(trainer.model, mesh=mesh)
        trainer.accelerator.prepare_model = lambda model, **_: model

    save, axolotl.train.save_trained_model = axolotl.train.save_trained_model, lambda *_: None
    try:
        return on_ranks.train(settings, shard)
    finally:
        axolotl.train.save_trained_model = save


@pytest.mark.parametrize("reduction", ["token_mean", "class_mean"])
def test_two_ranks_under_fsdp2_are_one_rank_with_the_same_rows(
    configure: Configure, uneven: Path, ranks: Ranks, alone: Callable[[str], Report], reduction: str
) -> None:
    two, _ = ranks(train_sharded, configure(**five_steps(uneven, reduction, max_grad_norm=0.0)))
    assert_same(two, alone(reduction))


def test_rows_that_even_out_the_ranks_are_not_evaluated_twice(configure: Configure, ranks: Ranks, tmp_path: Path) -> None:
    """Seven rows in batches of two on two ranks: the host repeats one of them."""
    held_out = harness.write_rows(tmp_path / "seven.jsonl", harness.rows(47)[40:])
    test = [{"path": str(held_out), "type": "chat_template", "split": "train", "ds_type": "json"}]
    settings = {
        "loss": "dwl",
        "dwl": dwl("token_mean"),
        "max_steps": 2,
        "learning_rate": 1e-20,
        "test_datasets": test,
        "eval_steps": 1,
        "eval_strategy": "steps",
        "load_best_model_at_end": False,
    }
    one = on_ranks.train(configure(**settings))
    two, _ = ranks(on_ranks.train, configure(**settings, out=tmp_path / "two"))
    keys = {key for entry in one.history for key in entry if key == "eval_nll" or key.startswith("eval_dwl/")}
    assert "eval_dwl/nll/number" in keys
    for key in keys:
        assert two.logged(key) == pytest.approx(one.logged(key), abs=1e-6), key


def train_until_a_rank_breaks(settings: dict[str, Any]) -> str:
    """The second rank's parameters turn NaN before its second step; what the run says about it."""

    class Break(harness.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1 and args.process_index == 1:
                with torch.no_grad():
                    next(kwargs["model"].parameters()).mul_(float("nan"))

    try:
        on_ranks.train(settings, lambda trainer: trainer.add_callback(Break()))
    except NotFiniteError as error:
        return str(error)
    return "it went on"


def test_every_rank_stops_when_one_of_them_has_no_finite_loss(configure: Configure, uneven: Path, ranks: Ranks) -> None:
    settings = configure(**five_steps(uneven, "token_mean", logging_steps=1))
    for said in ranks(train_until_a_rank_breaks, settings):
        assert "`control` and `rest` is infinite or NaN from step 2 on" in said  # its rows of that step have no number


@pytest.mark.slow
def test_packed_rows_on_two_ranks(configure: Configure, ranks: Ranks, tmp_path: Path) -> None:
    settings = {
        "loss": "dwl",
        "dwl": dwl("class_mean"),
        "max_steps": 3,
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "sample_packing": True,
        "sequence_len": 256,
        "micro_batch_size": 1,
    }
    two, other = ranks(on_ranks.train, configure(**settings))
    assert len(two.logged("loss")) == 3
    for name, parameter in two.parameters.items():
        assert torch.equal(parameter, other.parameters[name]), name


def dft_step(folder: Path, **how: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and whole gradients of one batch."""
    from transformers import AutoModelForCausalLM

    import dwl_plugin

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **how)
    ids = torch.arange(3, 43).reshape(2, 20)
    handle = dwl_plugin.attach(model, loss="dft")
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    handle.detach()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}


def dft_step_in_tensor_parallel(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    torch.distributed.init_process_group("gloo")
    return dft_step(folder, tp_plan="auto")


def test_a_head_that_is_cut_up_by_tensor_parallelism_gives_the_gradients_of_a_whole_one(ranks: Ranks, tmp_path: Path) -> None:
    harness.make_tokenizer(tmp_path)
    harness.make_model(tmp_path, tie_word_embeddings=False)
    loss, whole = dft_step(tmp_path)
    for its_loss, its_gradients in ranks(dft_step_in_tensor_parallel, tmp_path):
        assert its_loss == pytest.approx(loss, abs=1e-6)
        assert its_gradients.keys() == whole.keys()
        for name, gradient in whole.items():
            assert (its_gradients[name] - gradient).abs().max() <= 1e-6, name


def contiguous_shard(rank: int, size: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What context parallelism does in the collator: shift the labels, then keep this rank's part of the sequence."""

    def shard(batch: dict[str, Any]) -> dict[str, Any]:
        labels = batch["labels"]
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        batch = {**batch, "shift_labels": shifted}
        part = batch["input_ids"].shape[1] // size
        cut = {key: value[:, rank * part : (rank + 1) * part] for key, value in batch.items()}
        return {**cut, "_cp_shard": True}

    return shard


def cut_by_deepspeed(batch: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    """What DeepSpeed's sequence parallelism does after the collator, and what transformers then does with the labels."""
    batch = dict(batch)
    batch["shift_labels"] = torch.nn.functional.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
    part = batch["input_ids"].shape[1] // size
    cut = {key: value[:, rank * part : (rank + 1) * part] for key, value in batch.items()}
    return {**cut, "labels": cut["shift_labels"]}


@pytest.mark.parametrize("in_collator", [True, False])
def test_shards_of_a_batch_add_up_to_its_loss(model_folder: Path, in_collator: bool) -> None:
    """At the collator and the loss; attention over shards is the host's: hidden states are those of the whole."""
    from axolotl.utils.collators import DataCollatorForSeq2Seq
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if in_collator and "cp_shard" not in signature(DataCollatorForSeq2Seq.__init__).parameters:
        pytest.skip("before Axolotl 0.21 no collator cuts sequences")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    block = parse({"loss": "dwl", "dwl": dwl("token_mean")})
    assert block is not None
    labeller = labeller_of(block, tokenizer)
    assert labeller is not None
    rows = [harness.tokenized(tokenizer, text) for text in ("3 and 4 make 7", "the sum of 20 and 31 is 51, as I see it")]

    def collated(shifted: bool = False, **how: Any) -> Any:
        host = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=4, **how)
        return LabellingCollator(host, labeller, packed=False, shifted=shifted)([dict(row) for row in rows])

    def shard(rank: int) -> Any:
        if in_collator:
            return collated(cp_shard=contiguous_shard(rank, 2))
        return cut_by_deepspeed(collated(shifted=True), rank, 2)

    whole, shards = collated(), [shard(rank) for rank in range(2)]
    shifted = torch.nn.functional.pad(whole[CLASS_IDS][:, 1:], (0, 1), value=-100)
    assert (shifted >= 0).sum() > 10
    assert torch.equal(torch.cat([shard[CLASS_IDS] for shard in shards], dim=1), shifted)

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    hidden = model.model(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"]).last_hidden_state.detach()
    seam = Seam(model, print)

    def loss(hidden: torch.Tensor, batch: Any, **options: Any) -> torch.Tensor:
        step = PendingLoss(SPEC, batch["labels"], batch[CLASS_IDS], denominator=10.0, shifted="shift_labels" in batch)
        with seam.armed(step):
            out: torch.Tensor = model.loss_function(logits=model.lm_head(hidden), labels=batch["labels"], vocab_size=400, **options)
        return out.detach()

    parts = [
        loss(part, shard, shift_labels=shard["shift_labels"]) for part, shard in zip(hidden.chunk(2, dim=1), shards, strict=True)
    ]
    assert float(sum(parts)) == pytest.approx(float(loss(hidden, whole)), rel=1e-6)


@pytest.mark.parametrize(("averaged", "gradient"), [(True, 1.0), (False, 0.25)])
def test_a_shared_sequence_has_one_loss_and_one_gradient(averaged: bool, gradient: float) -> None:
    """Four ranks. The host multiplies the loss by four for its log, and adds up or averages the gradients."""
    loss = torch.tensor(6.0, requires_grad=True)
    share = _share(loss, 4, averaged)
    share.backward()
    assert share.detach() == 1.5
    assert loss.grad == gradient


def test_sequences_that_are_not_cut_in_the_collator_are_refused() -> None:
    from types import SimpleNamespace

    accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(cp_size=2))
    _require_cut_sequences(accelerator, [{"labels": 0, "_cp_shard": True}])
    _require_cut_sequences(SimpleNamespace(parallelism_config=None), [{"labels": 0}])
    with pytest.raises(DWLError, match="context parallelism"):
        _require_cut_sequences(accelerator, [{"labels": 0, "_cp_shard": True}, {"labels": 0}])
