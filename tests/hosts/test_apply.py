"""`apply`: the same losses, classes, α and metrics under `transformers.Trainer` and TRL's `SFTTrainer` as under Axolotl."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dwl_plugin
from dwl_plugin.errors import ConfigError, LossNotTakenError
from dwl_plugin.hosts import versions
from dwl_plugin.hosts.versions import release
from dwl_plugin.run.dataset_check import picked_rows
from tests.hosts import harness
from tests.hosts.harness import CLASSES, Batches, Build, Recorder, logged, rows, stock

TRL = release("trl")
NAMES = ("reasoning", "number", "control", "rest")
DWL = {
    "classes": CLASSES,
    "alpha": {"reasoning": 1, "number": 5, "control": 2, "rest": 2},
    "token_loss": "dft",
    "reduction": "class_mean",
    "schedule": {"type": "cosine", "to": {"reasoning": 4, "number": 1, "control": 1, "rest": 4}, "start": "10%", "end": "90%"},
}
CONFIG = {"loss": "dwl", "dft": {"exponent": 0.5}, "dwl": DWL}
# the same numbers as under Axolotl


@pytest.fixture(scope="module")
def under_axolotl(model_folder: Path, samples: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("axolotl")
    folder = tmp_path_factory.mktemp("axolotl")
    data = harness.write_rows(folder / "ids.jsonl", samples)
    seen: list[Batches] = []
    settings = harness.config(
        model_folder,
        data,
        folder,
        datasets=[{"path": str(data), "ds_type": "json", "type": None}],
        max_steps=10,
        gradient_accumulation_steps=2,
        dataset_prepared_path=str(folder / "prepared"),
        **CONFIG,
    )
    run = harness.train(settings, before=lambda trainer: seen.append(Batches(trainer)))
    del run.trainer.get_batch_samples
    return run, seen[0]


@pytest.mark.parametrize("host", ["trainer_of", "sft_of"])
def test_losses_metrics_and_parameters_are_axolotls_on_the_same_batches(
    host: str, request: pytest.FixtureRequest, under_axolotl: Any
) -> None:
    run, their_batches = under_axolotl
    trainer = request.getfixturevalue(host)(train_dataset=run.trainer.train_dataset)
    dwl_plugin.apply(trainer, CONFIG)
    batches = Batches(trainer)
    trainer.train()
    assert len(batches.fed) == 20
    for ours, theirs in zip(batches.fed, their_batches.fed, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("input_ids", "labels", "attention_mask"))
    measured = (
        "loss",
        "nll",
        *(f"dwl/{kind}/{name}" for kind in ("nll", "p", "alpha", "token_share", "loss_share") for name in NAMES),
    )
    for key in measured:
        ours, theirs = logged(trainer, key), run.logged(key)
        assert len(theirs) == 10
        assert ours == pytest.approx(theirs, abs=1e-6), key
    expected = dict(run.trainer.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert (parameter - expected[name]).abs().max() <= 1e-6, name


@pytest.mark.parametrize("host", ["trainer_of", pytest.param("sft_of", marks=stock)])
def test_one_class_at_weight_one_is_the_hosts_own_loss(
    host: str, request: pytest.FixtureRequest, model: Any, samples: list[dict[str, Any]]
) -> None:
    from datasets import Dataset

    build = request.getfixturevalue(host)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    losses, gradients, metrics = [], [], []
    for config in (None, {"loss": "dwl", "dwl": {"alpha": {"rest": 1}}}):
        model.load_state_dict(start)
        evaluated = {"eval_strategy": "steps", "eval_steps": 2, "prediction_loss_only": True}
        trainer = build({"max_steps": 4, **evaluated}, eval_dataset=Dataset.from_list(samples[:7]))
        recorder = Recorder()
        trainer.add_callback(recorder)
        if config is not None:
            dwl_plugin.apply(trainer, config)
        trainer.train()
        losses.append(logged(trainer, "loss"))
        gradients.append(recorder.gradients[0])
        trls = ("entropy", "mean_token_accuracy", "num_tokens")
        metrics.append({key: logged(trainer, key) for key in ("eval_loss", *trls, *(f"eval_{key}" for key in trls))})
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() <= 1e-5 * max(g.abs().max() for g in gradients[0].values())
    for key, values in metrics[0].items():  # TRL's own, from all logits in the run without us
        assert metrics[1][key] == pytest.approx(values, abs=1e-5), key
    assert bool(metrics[0]["entropy"]) == (host == "sft_of")


@pytest.mark.parametrize("host", ["trainer_of", "sft_of"])
def test_gradients_of_the_fused_loss_are_scaled_by_nothing_afterwards(
    host: str, request: pytest.FixtureRequest, coming_back: list[float]
) -> None:
    trainer = request.getfixturevalue(host)({"max_steps": 2, "gradient_accumulation_steps": 3})
    dwl_plugin.apply(trainer, CONFIG)
    trainer.train()
    assert coming_back == [1.0] * 6


@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
def test_trls_token_metrics_need_no_full_logits(sft_of: Build, capsys: pytest.CaptureFixture[str], loss_type: str) -> None:
    trainer = sft_of({"max_steps": 1, "loss_type": loss_type})
    dwl_plugin.apply(trainer, CONFIG)
    trainer.train()
    assert len(logged(trainer, "entropy")) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[dwl]")]
    assert not any("in full" in line for line in said)
    if TRL < (1, 15):
        assert ("`loss_type: chunked_nll`" in said[0]) == (loss_type == "chunked_nll")
    else:
        assert "`fused_lm_head`" in said[0]


def test_a_run_that_resumes_goes_on_as_if_it_had_not_stopped(sft_of: Build, model: Any) -> None:
    start = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = sft_of(arguments)
    dwl_plugin.apply(whole, CONFIG)
    whole.train()
    model.load_state_dict(start)
    resumed = sft_of(arguments)
    dwl_plugin.apply(resumed, CONFIG)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
    for key in ("loss", "nll", "dwl/alpha/number", "dwl/nll/number"):
        assert logged(resumed, key)[3:] == logged(whole, key)[3:], key
        assert len(logged(whole, key)) == 6


# whoever makes the labels


def digits(tokenizer: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[int, int]:
    """Targets whose own text has a digit, and all targets, one decoded token at a time."""
    found = total = 0
    for batch in batches:
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            targets = [token for token, label in zip(ids[1:], labels[1:], strict=True) if label != -100]
            total += len(targets)
            found += sum(any(c.isdigit() for c in tokenizer.decode([token])) for token in targets)
    return found, total


def chat() -> dict[str, Any]:
    return {"train_dataset": [{"messages": row["messages"]} for row in rows(24)]}


def prompt_completion() -> dict[str, Any]:
    data = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows(24)]
    return {"train_dataset": data, "arguments": {"completion_only_loss": True}}


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "messages": chat,
    "completion_only_loss": prompt_completion,
    "assistant_only_loss": lambda: {**chat(), "arguments": {"assistant_only_loss": True}},
    "padding_free": lambda: {**chat(), "arguments": {"padding_free": True}},
    "packing": lambda: {**chat(), "arguments": {"packing": True, "max_length": 256}},
    "neftune": lambda: {**chat(), "arguments": {"neftune_noise_alpha": 5.0}},
    "streaming": lambda: {**chat(), "stream": True},
}
MASKED = harness.CHATML.replace(
    "{{ message['content'] }}<|im_end|>",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}",
)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_classes_are_found_however_trl_makes_its_labels(sft_of: Build, tokenizer: Any, way: str) -> None:
    from datasets import Dataset

    settings = WAYS[way]()
    data = Dataset.from_list(settings["train_dataset"])
    if settings.get("stream"):
        data = data.to_iterable_dataset()
    tokenizer.chat_template, was = MASKED, tokenizer.chat_template
    try:
        trainer = sft_of({"max_steps": 1, **settings.get("arguments", {})}, train_dataset=data)
        dwl_plugin.apply(trainer, {"loss": "dwl", "dwl": {"classes": {"number": {"regex": r"\d+"}}}})
        batches = Batches(trainer)
        trainer.train()
    finally:
        tokenizer.chat_template = was
    found, total = digits(tokenizer, batches.fed)
    assert 0 < found < total
    assert logged(trainer, "dwl/token_share/number") == pytest.approx([found / total])


def test_a_packed_rows_classes_end_where_its_samples_end(tokenizer: Any) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from dwl_plugin.classes import build_labeller
    from dwl_plugin.config import parse
    from dwl_plugin.run.collate import CLASS_IDS, LabellingCollator

    block = parse({"loss": "dwl", "dwl": {"classes": {"open": {"between": ["<think>", "</think>"]}}}})
    assert block is not None
    first, second = tokenizer("7 <think>8")["input_ids"], tokenizer("9 9")["input_ids"]
    row = {"input_ids": first + second, "labels": first + second, "seq_lengths": [len(first), len(second)]}
    labeller = build_labeller(block.class_configs, tokenizer)
    collate = LabellingCollator(DataCollatorForLanguageModeling(0, padding_free=True), labeller, packed=True)
    ids = collate([row])[CLASS_IDS][0].tolist()
    assert ids[len(first) - 1] == 0  # the 8, inside
    assert ids[len(first)] == -100  # TRL masks the first token of each sample
    assert ids[len(first) + 1 :] == [1] * (len(second) - 1)


def test_labels_that_the_collator_makes_itself_are_classified(trainer_of: Build, tokenizer: Any) -> None:
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling

    ids = tokenizer("1 and 22 make 23")["input_ids"]
    data = Dataset.from_list([{"input_ids": ids, "labels": [-100] * len(ids), "attention_mask": [1] * len(ids)}] * 4)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = trainer_of({"max_steps": 1}, train_dataset=data, data_collator=collate)
    dwl_plugin.apply(trainer, {"loss": "dwl", "dwl": {"classes": {"number": {"regex": r"\d+"}}}})
    trainer.train()
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}
    found, total = digits(tokenizer, [batch])
    assert logged(trainer, "dwl/token_share/number") == pytest.approx([found / total])


@pytest.mark.parametrize(
    "host",
    ["trainer_of", pytest.param("sft_of", marks=pytest.mark.skipif(TRL >= (1, 15), reason="TRL 1.15 began to refuse it itself"))],
)
def test_an_adapter_on_the_head_is_trained(host: str, request: pytest.FixtureRequest, model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights="gaussian", target_modules={"q_proj", "lm_head"})
    arguments = {"max_steps": 2, **({"loss_type": "nll"} if host == "sft_of" else {})}
    trainer = request.getfixturevalue(host)(arguments, model=get_peft_model(model, adapter))
    dwl_plugin.apply(trainer, CONFIG)
    trainer.train()
    trained = {name: p for name, p in trainer.model.named_parameters() if "lm_head.lora_B" in name}
    assert all(p.abs().max() > 0 for p in trained.values())
    assert trained


# evaluation


def test_the_lower_eval_nll_is_the_better_checkpoint(
    trainer_of: Build, samples: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import Dataset

    settings = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_nll",
        "learning_rate": 0.5,
    }
    trainer = trainer_of(settings, eval_dataset=Dataset.from_list(samples[:4]))
    assert trainer.args.greater_is_better is True  # what the arguments made of a name they do not know
    dwl_plugin.apply(trainer, CONFIG)
    assert "greater_is_better is now False" in capsys.readouterr().out
    trainer.train()
    measured = logged(trainer, "eval_nll")
    assert len(set(measured)) == 4
    assert trainer.state.best_metric == min(measured)


def test_metrics_whose_names_end_in_ppl_are_as_they_were_computed(sft_of: Build, samples: list[dict[str, Any]]) -> None:
    from datasets import Dataset

    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_word_ppl", "greater_is_better": False}
    own = {"ppl": 1.5, "word_ppl": 2.5}
    trainer = sft_of(settings, eval_dataset=Dataset.from_list(samples[:2]), compute_metrics=lambda outcome: own)
    dwl_plugin.apply(trainer, {"loss": "dft"})
    trainer.train()
    assert {key: logged(trainer, f"eval_{key}") for key in own} == {"ppl": [1.5], "word_ppl": [2.5]}
    assert trainer.state.best_metric == 2.5


def test_a_trainer_whose_model_got_another_loss_is_told_so(trainer_of: Build) -> None:
    first, second = trainer_of({"max_steps": 1}), trainer_of({"max_steps": 1})
    handles = [dwl_plugin.apply(trainer, {"loss": "dft"}) for trainer in (first, second)]
    for step in (lambda: None, handles[1].detach):
        step()
        with pytest.raises(LossNotTakenError, match="another trainer over the same model gets a loss of its own"):
            first.train()
    handles[0].detach()
    dwl_plugin.apply(first, {"loss": "dft"})
    first.train()
    assert len(logged(first, "nll")) == 1


def test_predictions_are_the_models_and_metrics_are_computed_from_them(
    sft_of: Build, samples: list[dict[str, Any]], model: Any
) -> None:
    from datasets import Dataset

    seen = []

    def compute_metrics(outcome: Any) -> dict[str, float]:
        seen.append(outcome.predictions)
        return {"rows": float(len(outcome.predictions))}

    data = Dataset.from_list(samples[:2])
    trainer = sft_of(eval_dataset=data, compute_metrics=compute_metrics)
    dwl_plugin.apply(trainer, CONFIG)
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 2
    assert metrics["eval_nll"] > 0
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([samples[0]["input_ids"]])).logits[0]
    got = torch.as_tensor(seen[0][0][: len(expected)])
    assert torch.allclose(got, expected, atol=1e-5)


def test_rows_without_labels_can_be_predicted_on(trainer_of: Build, samples: list[dict[str, Any]]) -> None:
    from datasets import Dataset
    from transformers import DataCollatorWithPadding

    trainer = trainer_of()
    dwl_plugin.apply(trainer, CONFIG)
    trainer.data_collator = DataCollatorWithPadding(trainer.processing_class)
    unlabelled = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in samples[:2]]
    assert trainer.predict(Dataset.from_list(unlabelled)).predictions.shape[0] == 2


# what stops, and when


def problems_of(trainer: Any, config: Any = None) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        dwl_plugin.apply(trainer, {"loss": "dft"} if config is None else config)
    return {problem.path: str(problem) for problem in caught.value.problems}


def test_problems_of_config_and_trainer_are_reported_together(trainer_of: Build) -> None:
    trainer = trainer_of({"label_smoothing_factor": 0.1}, compute_loss_func=lambda *args, **kwargs: None)
    found = problems_of(trainer, {"loss": "dwl", "dwl": {"classes": {"a": {"regex": "("}}, "alpha": {"b": 1}}})
    assert {"dwl.classes.a.regex", "dwl.alpha.b", "args.label_smoothing_factor", "compute_loss_func"} <= set(found)


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"loss_type": "dft"}, "args.loss_type"),
        ({"use_liger_kernel": True, "liger_kernel_config": {"cross_entropy": True}}, "args.use_liger_kernel"),
    ],
)
def test_trls_other_losses_are_refused(sft_of: Build, arguments: dict[str, Any], path: str) -> None:
    assert set(problems_of(sft_of(arguments))) == {path}


def test_ligers_loss_is_refused_and_its_other_kernels_are_not(trainer_of: Build) -> None:
    found = problems_of(trainer_of({"use_liger_kernel": True}))
    assert "'fused_linear_cross_entropy': False" in found["args.use_liger_kernel"]
    off = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    dwl_plugin.apply(trainer_of({"use_liger_kernel": True, "liger_kernel_config": off}), {"loss": "dft"})


def test_a_trainer_with_an_objective_of_its_own_is_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pair = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
    settings = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = DPOTrainer(model, args=settings, train_dataset=Dataset.from_list([pair] * 4), processing_class=tokenizer)
    assert "DPOTrainer computes an objective of its own" in problems_of(trainer)["trainer"]


def test_what_is_no_trainer_is_refused(model: Any) -> None:
    assert "dwl_plugin.attach" in problems_of(model)["trainer"]


@pytest.mark.parametrize("method", ["compute_loss", "get_batch_samples"])
def test_a_method_put_on_the_instance_is_refused(trainer_of: Build, method: str) -> None:
    trainer = trainer_of()
    setattr(trainer, method, lambda *args, **kwargs: None)
    assert set(problems_of(trainer)) == {f"trainer.{method}"}


def test_a_model_that_is_made_anew_is_refused(trainer_of: Build, model: Any) -> None:
    assert set(problems_of(trainer_of(model=None, model_init=lambda: model))) == {"model_init"}


def test_copies_of_the_model_in_one_process_are_refused(trainer_of: Build) -> None:
    trainer = trainer_of()
    trainer.args._n_gpu = 2
    assert "torchrun" in problems_of(trainer)["args"]


def test_ranks_that_share_sequences_are_refused(trainer_of: Build) -> None:
    from accelerate import ParallelismConfig

    trainer = trainer_of()
    trainer.accelerator.state.parallelism_config = ParallelismConfig(sp_size=2)
    try:
        assert "context_parallel_size" in problems_of(trainer)["args.parallelism_config"]
    finally:
        trainer.accelerator.state.parallelism_config = None


def test_applying_twice_is_refused_until_the_first_is_detached(trainer_of: Build) -> None:
    trainer = trainer_of()
    handle = dwl_plugin.apply(trainer, CONFIG)
    assert "detach()" in problems_of(trainer)["trainer"]
    handle.detach()
    assert dwl_plugin.apply(trainer, {"loss": "dft"}).block.loss == "dft"


def test_a_trainer_that_the_axolotl_plugin_has_joined_is_refused(under_axolotl: Any) -> None:
    from dwl_plugin.config import parse
    from dwl_plugin.hosts.trainer import install, uninstall

    run, _ = under_axolotl
    block = parse({"loss": "dft"})
    assert block is not None
    install(run.trainer, block, None)
    try:
        assert "Axolotl" in problems_of(run.trainer)["trainer"]
    finally:
        uninstall(run.trainer)


@pytest.mark.parametrize("host", ["trainer_of", "sft_of"])
def test_detached_trainer_and_model_are_as_they_were(host: str, request: pytest.FixtureRequest) -> None:
    trainer = request.getfixturevalue(host)()

    def state() -> Iterator[Any]:
        yield type(trainer)
        yield trainer.args.to_dict()
        yield {key: value for key, value in vars(trainer).items() if isinstance(value, (bool, int, str))}
        yield [type(callback) for callback in trainer.callback_handler.callbacks]
        for module in trainer.model.modules():
            yield sorted((key, value) for key, value in vars(module).items() if callable(value))

    before = list(state())
    handle = dwl_plugin.apply(trainer, CONFIG)
    assert list(state()) != before
    handle.detach()
    handle.detach()
    assert list(state()) == before


def test_a_subclass_that_returns_the_models_loss_trains(trainer_of: Build) -> None:
    from transformers import Trainer

    class Counting(Trainer):
        calls = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            type(self).calls += 1
            return super().compute_loss(*args, **kwargs)

    trainer = trainer_of({"max_steps": 1}, kind=Counting)
    dwl_plugin.apply(trainer, CONFIG)
    trainer.train()
    assert logged(trainer, "nll")
    assert Counting.calls == 0 and type(trainer).calls == 2  # noqa: PT018


def test_a_subclass_that_returns_another_loss_stops_the_run(trainer_of: Build) -> None:
    from transformers import Trainer

    class Doubling(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return (2 * loss, outputs) if return_outputs else 2 * loss

    trainer = trainer_of({"max_steps": 1}, kind=Doubling)
    dwl_plugin.apply(trainer, CONFIG)
    with pytest.raises(LossNotTakenError, match=r"Doubling\.compute_loss"):
        trainer.train()


@pytest.mark.parametrize("host", ["trainer_of", "sft_of"])
def test_a_class_that_is_nowhere_in_the_data_stops_before_training(host: str, request: pytest.FixtureRequest) -> None:
    classes = {"code": {"regex": "```"}, "number": {"regex": r"\d+"}}
    found = problems_of(request.getfixturevalue(host)(), {"loss": "dwl", "dwl": {"classes": classes}})
    assert set(found) == {"dwl.classes.code"}
    assert "40 rows" in found["dwl.classes.code"]


@pytest.mark.parametrize("host", ["trainer_of", "sft_of"])
@pytest.mark.parametrize("loss", ["nll", "dft", "dwl"])
@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset", "one of two"])
def test_rows_without_a_target_stop_before_training(
    host: str, loss: str, which: str, samples: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    from datasets import Dataset

    masked = Dataset.from_list([{**row, "labels": [-100] * len(row["labels"])} for row in samples[:4]])
    held_out: Any = {"a": Dataset.from_list(samples[:4]), "b": masked} if which == "one of two" else masked
    changes = {"train_dataset": masked} if which == "train_dataset" else {"eval_dataset": held_out}
    trainer = request.getfixturevalue(host)(**changes)
    classes = {"classes": {"number": {"regex": r"\d", "allow_empty": True}}}
    found = problems_of(trainer, {"loss": loss, **({"dwl": classes} if loss == "dwl" else {})})
    (path,) = found
    assert path == ("train_dataset" if which == "train_dataset" else "eval_dataset")
    assert "no target token in any row" in found[path]
    assert "train_on_inputs" not in found[path]  # no option of this trainer


@pytest.mark.parametrize("loss", ["nll", "dwl"])
def test_targets_that_are_rare_stop_nothing(trainer_of: Build, samples: list[dict[str, Any]], loss: str) -> None:
    """The look at some rows does not meet the one that has targets."""
    from datasets import Dataset

    (left_out, *_) = set(range(600)) - set(picked_rows(600, seed=harness.ARGUMENTS["seed"]))
    masked = {**samples[1], "labels": [-100] * len(samples[1]["labels"])}
    rare = Dataset.from_list([samples[0] if number == left_out else masked for number in range(600)])
    classes = {"classes": {"number": {"regex": r"\d"}}}
    trainer = trainer_of(train_dataset=rare, eval_dataset=rare)
    applied = dwl_plugin.apply(trainer, {"loss": loss, **({"dwl": classes} if loss == "dwl" else {})})
    assert applied.survey is not None
    assert applied.survey.targets == sum(label != -100 for label in samples[0]["labels"])


def test_rows_that_are_not_for_the_collator_are_left_to_the_loaders_of_the_trainer(trainer_of: Build) -> None:
    from datasets import Dataset
    from transformers import Trainer

    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            return list(self.train_dataset)

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            return {"eval_answered": float(len(self.eval_dataset))}

    questions = Dataset.from_list([{"question": "What is 1 + 1?", "answer": "2"}])
    dwl_plugin.apply(trainer_of(kind=Own, train_dataset=questions, eval_dataset=questions), {"loss": "dft"})


def test_a_perplexity_of_something_else_is_left_alone(trainer_of: Build) -> None:
    from transformers import Trainer

    class Logging(Trainer):
        def log(self, logs: dict[str, float], *args: Any) -> None:
            super().log({**logs, "wiki_ppl": 12.0}, *args)

    trainer = trainer_of({"max_steps": 1}, kind=Logging)
    dwl_plugin.apply(trainer, {"loss": "dft"})
    trainer.train()
    assert set(logged(trainer, "wiki_ppl")) == {12.0}


def test_a_token_that_the_model_does_not_have_stops_before_training(trainer_of: Build, samples: list[dict[str, Any]]) -> None:
    from datasets import Dataset

    ids = [*samples[0]["input_ids"][:-1], 400]
    found = problems_of(
        trainer_of(train_dataset=Dataset.from_list([*samples[1:], {**samples[0], "input_ids": ids}])), {"loss": "nll"}
    )
    assert "`input_ids` of 1 of the rows looked at name tokens that the model does not have (got 400)" in found["train_dataset"]


def test_an_empty_data_set_is_a_sentence(trainer_of: Build) -> None:
    assert "there is no row to train on" in problems_of(trainer_of(train_dataset=[]), {"loss": "nll"})["train_dataset"]


def test_the_look_at_the_data_changes_nothing_that_the_run_draws(trainer_of: Build) -> None:
    trainer = trainer_of(data_collator=lambda features: {"labels": torch.randint(9, (1, 9)), "input_ids": torch.ones(1, 9)})
    before = torch.random.get_rng_state()
    dwl_plugin.apply(trainer, {"loss": "dwl", "dwl": {"classes": {"a": {"token_ids": [1], "allow_empty": True}}}})
    assert torch.equal(torch.random.get_rng_state(), before)


def test_rows_cut_anywhere_cannot_have_classes_by_text(sft_of: Build) -> None:
    trainer = sft_of({"packing": True, "packing_strategy": "wrapped", "max_length": 64})
    assert set(problems_of(trainer, CONFIG)) == {"args.packing_strategy"}
    dwl_plugin.apply(trainer, {"loss": "dwl", "dwl": {"classes": {"control": {"tokens": ["<|im_end|>"]}}}})


def test_classes_without_a_tokenizer_are_refused(trainer_of: Build) -> None:
    trainer = trainer_of(processing_class=None)
    assert "processing_class" in problems_of(trainer, CONFIG)["dwl.classes"]
    dwl_plugin.apply(trainer, {"loss": "dft"})


# versions


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Sets the version of a package, as far as this is asked for."""

    def install(package: str, number: str) -> None:
        real = versions.version
        monkeypatch.setattr(versions, "version", lambda name: number if name == package else real(name))

    return install


@pytest.mark.parametrize(
    ("package", "number", "supported"),
    [("trl", "1.8.0", "1.9 to 1.16"), ("trl", "0.29.1", "1.9 to 1.16"), ("transformers", "4.57.6", "5.16 to 5.24")],
)
def test_a_host_that_is_too_old_is_refused_in_one_sentence(
    sft_of: Build, installed: Callable[[str, str], None], package: str, number: str, supported: str
) -> None:
    trainer = sft_of()
    installed(package, number)
    (problem,) = problems_of(trainer).values()
    assert f"{package} {number} is older than dwl_plugin supports, {supported}" in problem


@pytest.mark.parametrize(("package", "number"), [("trl", "1.17.0.dev0"), ("trl", "2.0.0"), ("transformers", "6.0.0")])
def test_a_host_that_is_newer_than_the_tests_gets_one_sentence_and_trains(
    sft_of: Build, installed: Callable[[str, str], None], capsys: pytest.CaptureFixture[str], package: str, number: str
) -> None:
    trainer = sft_of({"max_steps": 1})
    installed(package, number)
    capsys.readouterr()
    dwl_plugin.apply(trainer, {"loss": "dft"})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"[dwl] {package} {number} is newer than what this dwl_plugin was tested with")
    trainer.train()


def test_trls_version_is_nothing_to_a_plain_trainer(trainer_of: Build, installed: Callable[[str, str], None]) -> None:
    installed("trl", "0.1")
    dwl_plugin.apply(trainer_of(), {"loss": "dft"})


# the config


def test_a_whole_axolotl_config_will_do(trainer_of: Build, tmp_path: Path) -> None:
    path = tmp_path / "train.yml"
    path.write_text(yaml.safe_dump({"base_model": "x", "sequence_len": 8, "use_dft": False, **CONFIG}))
    assert dwl_plugin.apply(trainer_of(), path).block == dwl_plugin.apply(trainer_of(), CONFIG).block


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read"), ("loss: [", "is not YAML"), ("- loss", "is a mapping"), ("", "is a mapping")]
)
def test_a_file_that_is_no_config_is_named(trainer_of: Build, tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "bad.yml"
    if text is not None:
        path.write_text(text)
    found = problems_of(trainer_of(), str(path))
    assert message in found[str(path)]


def test_a_config_without_a_loss_is_an_error(trainer_of: Build) -> None:
    assert "is missing" in problems_of(trainer_of(), {"base_model": "x"})["loss"]
