"""Every pair of Axolotl's options that touch batches, labels or the model: two steps, each compared with eager arithmetic.

The comparison is made in the run, before the optimizer takes the step: on the very batches, with the parameters and the random
numbers of that step, from the model's plain logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from dwl_plugin.run.collate import CLASS_IDS
from tests.hosts import harness
from tests.hosts.harness import rows, write_rows
from tests.hosts.pairwise import Case, pairs_of, pairwise

Configure = Callable[..., dict[str, Any]]
NAMES = ("control", "number", "rest")
CLASSES = {"control": {"tokens": ["<|im_end|>"], "allow_empty": True}, "number": {"regex": r"\d+"}}
ALPHA = {"control": 0.1, "number": 0.6, "rest": 0.3}
ROWS = 48
"""Enough for two steps of two micro-batches of two packed rows."""


# the factors: what each value adds to the config


def sums() -> list[tuple[str, str]]:
    return [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows(ROWS)]


def write(folder: Path, name: str, samples: list[dict[str, Any]]) -> str:
    return str(write_rows(folder / f"{name}.jsonl", samples))


def chat(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"datasets": [{"path": write(folder, "chat", rows(ROWS)), "type": "chat_template", **changes}]}


def all_roles(folder: Path) -> dict[str, Any]:
    return chat(folder, roles_to_train=["user", "assistant"])


def span_masks(folder: Path) -> dict[str, Any]:
    samples = rows(ROWS)
    for sample in samples:
        question, answer = sample["messages"]
        question["train"], answer["train"] = False, True
        cut = len(answer["content"]) // 3
        answer["train_detail"] = [
            {"begin_offset": 0, "end_offset": cut, "train": False},
            {"begin_offset": cut + 1, "end_offset": len(answer["content"]) - 1, "train": True},
        ]
    source = {"path": write(folder, "spans", samples), "type": "chat_template", "roles_to_train": []}
    return {"datasets": [{**source, "message_field_training": "train", "message_field_training_detail": "train_detail"}]}


def alpaca(folder: Path) -> dict[str, Any]:
    samples = [{"instruction": question, "input": "", "output": answer} for question, answer in sums()]
    return {"datasets": [{"path": write(folder, "alpaca", samples), "type": "alpaca"}]}


def completion(folder: Path) -> dict[str, Any]:
    return {"datasets": [{"path": write(folder, "text", [{"text": f"{q} {a}"} for q, a in sums()]), "type": "completion"}]}


def input_output(folder: Path) -> dict[str, Any]:
    samples = [{"segments": [{"label": False, "text": q}, {"label": True, "text": a}]} for q, a in sums()]
    return {"datasets": [{"path": write(folder, "io", samples), "type": "input_output"}]}


def tokenized(folder: Path) -> dict[str, Any]:
    samples = []
    for index, (question, answer) in enumerate(sums()):
        ids = [3 + (7 * index + ord(character)) % 250 for character in question + answer] + [2]
        labels = [-100] * len(question) + ids[len(question) :]
        samples.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return {"datasets": [{"path": write(folder, "ids", samples), "ds_type": "json", "type": None}]}


def two_datasets(folder: Path) -> dict[str, Any]:
    return {"datasets": chat(folder)["datasets"] + alpaca(folder)["datasets"]}


def stream(folder: Path) -> dict[str, Any]:
    (source,) = chat(folder)["datasets"]
    return {"streaming": True, "datasets": [{**source, "ds_type": "json"}]}


def pretraining(folder: Path) -> dict[str, Any]:
    path = write(folder, "text", [{"text": f"{q} {a}"} for q, a in sums()])
    source = {"path": "json", "data_files": [path], "type": "pretrain", "text_column": "text"}
    return {"datasets": None, "pretraining_dataset": [source], "streaming": True}


DATA: dict[str, Callable[[Path], dict[str, Any]]] = {
    "chat_template": chat,
    "all roles": all_roles,
    "span masks": span_masks,
    "alpaca": alpaca,
    "completion": completion,
    "input_output": input_output,
    "tokenized": tokenized,
    "two datasets": two_datasets,
    "stream": stream,
    "pretraining": pretraining,
}
LAYOUT: dict[str, dict[str, Any]] = {
    "padded": {},
    "padded to length": {"pad_to_sequence_len": True, "sequence_len": 256},
    "packed": {"sample_packing": True, "sequence_len": 256, "micro_batch_size": 1},
    "packed, two rows": {"sample_packing": True, "sequence_len": 256, "pad_to_sequence_len": True},
}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_linear": True}
ADAPTER: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": LORA,
    "dora": {**LORA, "peft_use_dora": True},
    "modules_to_save": {**LORA, "lora_modules_to_save": ["embed_tokens", "lm_head"]},
    "qlora": {**LORA, "adapter": "qlora", "load_in_4bit": True},
}
EVALUATE = {"val_set_size": 12, "eval_strategy": "steps", "eval_steps": 1, "eval_batch_size": 1, "load_best_model_at_end": False}
EXTRA: dict[str, dict[str, Any]] = {
    "nothing": {},
    "added tokens": {"tokens": ["<extra>"]},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "neftune": {"neftune_noise_alpha": 5.0},
    "include_tkps": {"include_tkps": True},
    "loss_watchdog": {"loss_watchdog_threshold": 100.0, "loss_watchdog_patience": 2},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "workers": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2},
    "evaluation": EVALUATE,
    "packed evaluation": {**EVALUATE, "eval_sample_packing": True},
    "unpacked evaluation": {**EVALUATE, "eval_sample_packing": False},
    "evaluation, samples": {**EVALUATE, "generate_samples": True, "num_generation_samples": 1, "generation_max_new_tokens": 2},
}
REDUCTIONS = ("token_mean", "weighted_mean", "class_mean")
OBJECTIVE: dict[str, dict[str, Any]] = {
    "nll": {"loss": "nll", "dwl": {"classes": CLASSES}},
    "dft": {"loss": "dft", "dwl": {"classes": CLASSES}},
    **{
        reduction: {
            "loss": "dwl",
            "dft": {"exponent": 0.5},
            "dwl": {"classes": CLASSES, "alpha": ALPHA, "reduction": reduction, "token_loss": "dft"},
        }
        for reduction in REDUCTIONS
    },
}
FACTORS = {
    "data": tuple(DATA),
    "layout": tuple(LAYOUT),
    "adapter": tuple(ADAPTER),
    "extra": tuple(EXTRA),
    "objective": tuple(OBJECTIVE),
    "attention": ("sdpa", "eager"),
    "accumulation": ("1", "2"),
    "checkpointing": ("off", "on", "reentrant"),
    "train_on_inputs": ("no", "yes"),
}


def allowed(case: Case) -> bool:
    """What the host itself lets through."""
    packed, streams = case["layout"].startswith("packed"), case["data"] in ("stream", "pretraining")
    return not (
        (packed and case["attention"] == "eager")  # the mask between packed samples needs sdpa, flex or flash
        or (case["extra"] in ("packed evaluation", "unpacked evaluation") and not packed)
        or (streams and "evaluation" in case["extra"])  # nothing to hold out
        or (streams and case["extra"] == "workers")  # one file cannot be read by several
        or (streams and case["layout"] == "packed, two rows")  # a stream is packed into single rows
        or (case["data"] == "stream" and packed)  # the host's packed streams do not read a local file by its path
        or (case["extra"] == "added tokens" and case["adapter"] not in ("full", "modules_to_save"))  # the host refuses it
        or (case["extra"] == "torch_compile" and case["adapter"] == "qlora")
    )


CASES = pairwise(FACTORS, allowed)
IN_EVERY_RUN, IN_EVERY_CHANGE = 2, 50
"""The first cases cover the most pairs, fifty of them five of six; all of them take minutes."""


def config_of(case: Case, configure: Configure, folder: Path) -> dict[str, Any]:
    settings = {
        **DATA[case["data"]](folder),
        **LAYOUT[case["layout"]],
        **ADAPTER[case["adapter"]],
        **EXTRA[case["extra"]],
        **OBJECTIVE[case["objective"]],
        "attn_implementation": case["attention"],
        "gradient_accumulation_steps": int(case["accumulation"]),
        "gradient_checkpointing": case["checkpointing"] != "off",
        "train_on_inputs": case["train_on_inputs"] == "yes",
        "learning_rate": 1e-3,
        "num_epochs": 4,
        "dataset_prepared_path": str(folder / "prepared"),
    }
    if settings["gradient_checkpointing"]:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": case["checkpointing"] == "reentrant"}
    return configure(**settings)


# the oracle


Terms = dict[str, list[torch.Tensor]]
"""class -> nll of each of its tokens."""


def joined(terms: list[Terms]) -> dict[str, torch.Tensor]:
    found = {name: [value for part in terms for value in part[name]] for name in NAMES}
    return {name: torch.stack(values) for name, values in found.items() if values}


@dataclass
class Step:
    """Ours and the oracle's of one optimizer step."""

    loss: float
    nll: dict[str, float]
    worst: float
    """The largest difference of two gradients, in units of the largest gradient."""


@dataclass
class Watch(harness.TrainerCallback):
    objective: str
    trainer: Any = None
    batches: list[dict[str, Any]] = field(default_factory=list)
    random: list[torch.Tensor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    evaluated: list[dict[str, float]] = field(default_factory=list)
    """nll per class of each evaluation."""
    held_out: list[Terms] = field(default_factory=list)

    def join(self, trainer: Any) -> None:
        self.trainer = trainer
        samples, loss, predict = trainer.get_batch_samples, trainer.compute_loss, trainer.prediction_step

        def get_batch_samples(*args: Any) -> Any:
            out = samples(*args)
            self.batches, self.random = [dict(batch) for batch in out[0]], []
            return out

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if model.training:
                self.random.append(torch.get_rng_state())
            return loss(model, inputs, *args, **kwargs)

        def prediction_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            out = predict(model, inputs, *args, **kwargs)
            with torch.no_grad():
                self.held_out.append(self.terms(model, inputs))
            return out

        trainer.get_batch_samples, trainer.compute_loss = get_batch_samples, compute_loss
        trainer.prediction_step = prediction_step
        trainer.add_callback(self)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated.append({name: float(values.mean()) for name, values in joined(self.held_out).items()})
        self.held_out = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, after = kwargs["model"], torch.get_rng_state()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ours = [None if parameter.grad is None else parameter.grad.clone() for parameter in trained]
        model.zero_grad()
        loss, nll = self.expected(model)
        loss.backward()
        scale = max(float(p.grad.abs().max()) for p in trained if p.grad is not None)
        worst = 0.0
        for parameter, gradient in zip(trained, ours, strict=True):
            zero = torch.zeros_like(parameter)
            difference = (zero if gradient is None else gradient) - (zero if parameter.grad is None else parameter.grad)
            worst = max(worst, float(difference.abs().max()) / scale)
            parameter.grad = gradient
        torch.set_rng_state(after)
        self.steps.append(Step(float(loss.detach()), nll, worst))

    def terms(self, model: Any, batch: dict[str, Any]) -> Terms:
        text_of = self.trainer.processing_class.decode
        out: Terms = {name: [] for name in NAMES}
        inputs = {key: value for key, value in batch.items() if key not in ("labels", CLASS_IDS)}
        log_p = model(**inputs).logits[:, :-1].double().log_softmax(-1)
        labels = batch["labels"][:, 1:]
        for row, t in (labels != -100).nonzero().tolist():
            text = text_of([int(batch["input_ids"][row, t + 1])])
            name = "control" if text == "<|im_end|>" else "number" if any(c.isdigit() for c in text) else "rest"
            out[name].append(-log_p[row, t, labels[row, t]])
        return out

    def expected(self, model: Any) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss and nll per class, from log-probabilities of the plain logits and one decoded token at a time."""
        exponent = {"nll": 0.0, "dft": 1.0}.get(self.objective, 0.5)
        found = []
        for batch, state in zip(self.batches, self.random, strict=True):
            torch.set_rng_state(state)
            found.append(self.terms(model, batch))
        nll = joined(found)
        paid = {name: (torch.exp(-values.detach()) ** exponent * values).sum() for name, values in nll.items()}
        count = {name: len(values) for name, values in nll.items()}
        total, mass = sum(count.values()), sum(ALPHA[name] * count[name] for name in nll)
        share = sum(ALPHA[name] for name in nll)
        weight = {
            "nll": dict.fromkeys(nll, 1 / total),
            "dft": dict.fromkeys(nll, 1 / total),
            "token_mean": {name: ALPHA[name] / total for name in nll},
            "weighted_mean": {name: ALPHA[name] / mass for name in nll},
            "class_mean": {name: ALPHA[name] / share / count[name] for name in nll},
        }[self.objective]
        loss = sum((weight[name] * paid[name] for name in nll), torch.zeros((), dtype=torch.float64))
        return loss, {name: float(values.detach().mean()) for name, values in nll.items()}


def agrees(settings: dict[str, Any], objective: str) -> harness.Run:
    watch = Watch(objective)
    run = harness.train(settings, before=watch.join)
    assert len(watch.steps) == 2
    for at, step in enumerate(watch.steps):
        assert run.logged("loss")[at] == pytest.approx(step.loss, rel=2e-5)
        assert step.worst <= 2e-5
        entry = [entry for entry in run.history if "loss" in entry][at]
        for name, nll in step.nll.items():
            assert entry[f"dwl/nll/{name}"] == pytest.approx(nll, rel=2e-5)
    entries = [entry for entry in run.history if "eval_nll" in entry]
    assert len(entries) == len(watch.evaluated)
    assert bool(entries) == (settings.get("eval_strategy") == "steps")
    for entry, nll in zip(entries, watch.evaluated, strict=True):
        assert {name: entry[f"eval_dwl/nll/{name}"] for name in nll} == pytest.approx(nll, rel=2e-5)
    return run


def mark_of(at: int) -> Any:
    return () if at < IN_EVERY_RUN else pytest.mark.slow if at < IN_EVERY_CHANGE else pytest.mark.weekly


def every_case() -> list[Any]:
    return [pytest.param(case, marks=mark_of(at), id=", ".join(case.values())) for at, case in enumerate(CASES)]


@pytest.mark.parametrize("case", every_case())
def test_two_steps_agree_with_eager_arithmetic(configure: Configure, tmp_path: Path, case: Case) -> None:
    agrees(config_of(case, configure, tmp_path), case["objective"])


@pytest.mark.slow
def test_every_allowed_pair_is_in_a_case() -> None:
    covered = set().union(*map(pairs_of, CASES))
    alone = {(name, value) for name, values in FACTORS.items() for value in values}
    assert alone == {side for pair in covered for side in pair}
    others = pairwise(FACTORS, allowed, seed=1)
    assert covered == set().union(*map(pairs_of, others))  # what one search leaves out, another does not find either


@pytest.mark.slow
def test_flex_attention(configure: Configure, tmp_path: Path) -> None:
    """On a CPU the host's own run with it may not be possible; then there is nothing to compare."""
    settings = {**chat(tmp_path), **LAYOUT["packed"], "attn_implementation": "flex_attention"}
    try:
        harness.train(configure(**settings))
    except Exception as error:
        pytest.skip(f"the host cannot train with flex attention here: {type(error).__name__}")
    agrees(configure(**settings, **OBJECTIVE["class_mean"]), "class_mean")


@pytest.mark.slow
def test_loader_workers_under_spawn(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing

    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        agrees(configure(**chat(tmp_path), **EXTRA["workers"], **OBJECTIVE["class_mean"]), "class_mean")
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
def test_early_stopping_on_an_eval_metric_of_ours(configure: Configure, tmp_path: Path) -> None:
    """The learning rate makes `eval_nll` worse from the first step on."""
    settings = {
        **chat(tmp_path),
        **OBJECTIVE["class_mean"],
        **EVALUATE,
        "load_best_model_at_end": None,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 5.0,
        "max_steps": 6,
        "early_stopping_patience": 1,
        "metric_for_best_model": "eval_dwl/nll/number",
    }
    run = harness.train(configure(**settings))
    assert run.trainer.state.global_step < 6
    measured = run.logged("eval_dwl/nll/number")
    assert run.trainer.state.best_metric == min(measured[1:])


def test_preprocessed_once_and_classes_changed_after(configure: Configure, tmp_path: Path) -> None:
    """Classes are found when batches are made, so prepared rows hold none of them."""
    settings = {**chat(tmp_path), "dataset_prepared_path": str(tmp_path / "prepared")}
    first = harness.train(configure(**settings, **OBJECTIVE["class_mean"], max_steps=1))
    prepared = sorted((tmp_path / "prepared").iterdir())
    vowels = {"loss": "nll", "dwl": {"classes": {"vowel": {"regex": "[aeiou]"}}}}
    second = harness.train(configure(**settings, **vowels, max_steps=1))
    assert sorted((tmp_path / "prepared").iterdir()) == prepared
    assert first.logged("dwl/nll/number")
    assert not second.logged("dwl/nll/number")
    assert 0 < second.logged("dwl/token_share/vowel")[0] < 1


def vision_model(folder: Path) -> None:
    """LLaVA, tiny: four patches of a 28-pixel image in front of the tiny Llama."""
    from transformers import (
        AutoTokenizer,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    harness.make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    tokenizer.chat_template = template
    size = {"height": 28, "width": 28}
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(**sizes, vocab_size=416, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    LlavaForConditionalGeneration(config).save_pretrained(folder)


@pytest.mark.slow
def test_a_vision_language_model_through_the_multimodal_collator(configure: Configure, tmp_path: Path) -> None:
    from PIL import Image

    model = tmp_path / "vision"
    vision_model(model)
    samples = []
    for index, (question, answer) in enumerate(sums()[:8]):
        picture = tmp_path / f"{index}.png"
        Image.new("RGB", (28, 28), (20 * index, 100, 200 - 20 * index)).save(picture)
        asked = [{"type": "image", "path": str(picture), "text": None}, {"type": "text", "path": None, "text": question}]
        said = [{"type": "text", "path": None, "text": answer}]
        samples.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]})
    settings = {
        "model": model,
        "data": Path(write(tmp_path, "pictures", samples)),
        "processor_type": "AutoProcessor",
        "skip_prepare_dataset": True,
        "remove_unused_columns": False,
        "sample_packing": False,
        "chat_template": "tokenizer_default",
        "train_on_inputs": True,
        **OBJECTIVE["class_mean"],
    }
    run = agrees(configure(**settings), "class_mean")
    assert type(run.trainer.data_collator).__name__ == "MultiModalChatDataCollator"
