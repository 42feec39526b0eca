"""The pairs of `docs/migrating.md`: what a peer trains with its own code, and what the block beside it trains, step by step.

The configs are the page's, only model, data and sizes are set here. A peer that is not installed has its pairs skipped by name;
`.ci/run peers` brings ms-swift and LLaMA-Factory.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

import dwl_plugin
from tests.hosts import harness

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
PAIRS = {
    title: dict(re.findall(r"^```\w+\n# (before|once|after)\n(.*?)^```", text, re.M | re.S))
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}
"""By heading: the blocks that begin with `# before`, `# once` or `# after`."""

TOLERANCE = 1e-6
STEPS = {"max_steps": 5, "logging_steps": 1, "max_grad_norm": 1.0, "weight_decay": 0.0, "lr_scheduler_type": "constant"}
STEPS |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "no", "report_to": "none"}
STEPS |= {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False, "disable_tqdm": True}


def block(title: str, which: str = "after") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(PAIRS[title][which])
    return loaded


def optimizer(title: str) -> dict[str, Any]:
    """Adam where the page has a line for it. All others by SGD: where there is hardly a gradient, Adam makes a step of its rounding
    errors."""
    if "adam_epsilon" in block(title):
        return {"optim": "adamw_torch", "learning_rate": 5e-5}
    return {"optim": "sgd", "learning_rate": 0.1}


class Trained(NamedTuple):
    """What five steps left behind; each weight with what it was; norms of gradients before they are clipped."""

    losses: list[float]
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]
    norms: list[float]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().double().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def trained(trainer: Any) -> Trained:
    start = weights(trainer.model)
    trainer.train()
    return trained_from(start, trainer)


def trained_from(start: dict[str, torch.Tensor], trainer: Any) -> Trained:
    """What `trainer` has made of `start`."""
    end = weights(trainer.model)
    assert end.keys() == start.keys()
    both = {name: (start[name], end[name]) for name in end}
    return Trained(harness.logged(trainer, "loss"), both, harness.logged(trainer, "grad_norm"))


def assert_equal(title: str, before: Trained, after: Trained, factor: float = 1.0) -> None:
    """The same weights to begin with and five steps later, and in between `factor` times the loss."""
    assert len(before.losses) == len(after.losses) == 5
    assert len(set(before.losses)) == 5
    assert before.weights.keys() == after.weights.keys()
    pairs = [(*before.weights[name], *after.weights[name]) for name in before.weights]
    assert all(torch.equal(start, other) for start, _, other, _ in pairs)
    if factor != 1 and title in PAIRS:
        assert block(title)["max_grad_norm"] * factor == pytest.approx(1.0, rel=1e-7)  # that of all peers
    loss = max(abs(theirs - factor * ours) / abs(theirs) for theirs, ours in zip(before.losses, after.losses, strict=True))
    weight = max(float((theirs - ours).abs().max()) for _, theirs, _, ours in pairs)
    moved = max(float((end - start).abs().max()) for start, end, _, _ in pairs)
    print(f"| {title} | {loss:.0e} | {weight:.0e} | {moved:.0e} |")
    assert moved > 1e-4
    assert loss <= TOLERANCE
    assert weight <= TOLERANCE


def test_the_page_has_a_pair_for_each_line_of_its_first_table() -> None:
    listed = re.findall(r"\]\(#([\w-]+)\)", PAGE.partition("## ")[0])
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"): title for title in PAIRS}
    without_blocks = {"axolotls-masks", "unsloth-train_on_responses_only", "how-equal"}
    assert {slugs[name] for name in set(listed) - without_blocks} == {title for title, found in PAIRS.items() if "before" in found}
    assert all({"before", "after"} <= found.keys() for title, found in PAIRS.items() if found)


@pytest.mark.parametrize("title", [title for title, found in PAIRS.items() if "loss:" in found.get("after", "")])
def test_our_side_parses(title: str) -> None:
    assert dwl_plugin.config.parse(block(title)) is not None


# Rows


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned a little, so that p and entropy differ from token to token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    harness.make_tokenizer(folder)
    harness.make_model(folder, initializer_range=0.05)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in harness.rows(20)]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lengths(tokenizer: Any) -> list[dict[str, Any]]:
    """Twenty rows, whose targets are from one token to all of a long text."""
    words = "the answer is in the words alone "
    texts = [f"{n} and {n + 3} make {2 * n + 3}, as I see it" if n % 3 else words * (1 + n // 2) for n in range(20)]
    return [harness.tokenized(tokenizer, text, 1 + n // 4 if n % 4 == 1 else None) for n, text in enumerate(texts)]


@pytest.fixture
def on_lengths(
    configure: Callable[..., dict[str, Any]], lengths: list[dict[str, Any]], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """An Axolotl config of five steps on these rows."""
    data = harness.write_rows(tmp_path / "rows.jsonl", lengths)
    sizes = {"max_steps": 5, "gradient_accumulation_steps": 2, "num_epochs": 2, "plugins": None}
    return functools.partial(configure, datasets=[{"path": str(data), "ds_type": "json", "type": None}], **sizes)


def axolotl(settings: dict[str, Any]) -> Trained:
    from axolotl.integrations.base import PluginManager

    start: dict[str, torch.Tensor] = {}

    def keep(trainer: Any) -> None:
        start.update(weights(trainer.model))

    plugins = PluginManager.get_instance().plugins
    before = dict(plugins)
    run = harness.train(settings, before=keep)
    for name in set(plugins) - set(before):  # Axolotl would ask it in the next run, too
        del plugins[name]
    return trained_from(start, run.trainer)


def pair(title: str, configure: Callable[..., dict[str, Any]], **changes: Any) -> list[Trained]:
    """Both blocks through `axolotl train`."""
    of = optimizer(title)
    sizes = {"max_steps": 5, "optimizer": of["optim"], "learning_rate": of["learning_rate"], "max_grad_norm": 1.0}
    return [axolotl(configure(**{**sizes, **block(title, which), **changes})) for which in ("before", "after")]


# Axolotl


def needs(module: str, where: str) -> pytest.MarkDecorator:
    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return pytest.mark.skipif(not found, reason=f"no `{module}` here: {where}")


@pytest.mark.slow
@needs("axolotl.monkeypatch.loss.dft", "Axolotl has `use_dft` from 0.21 on")
def test_axolotl_dft(on_lengths: Callable[..., dict[str, Any]]) -> None:
    title = "Axolotl: `use_dft`"
    assert_equal(title, *pair(title, on_lengths))


@pytest.mark.slow
@needs("axolotl.monkeypatch.loss.eaft", "this Axolotl has no `use_eaft`")
def test_axolotl_eaft(on_lengths: Callable[..., dict[str, Any]]) -> None:
    title = "Axolotl: `use_eaft`"
    assert_equal(title, *pair(title, on_lengths), factor=math.log(20))


@pytest.mark.slow
@needs("axolotl.monkeypatch.loss.eaft", "this Axolotl has no `use_eaft`")
def test_axolotl_eaft_of_other_options_under_sgd(on_lengths: Callable[..., dict[str, Any]]) -> None:
    """The page's rule for SGD, and its factor."""
    factor = math.log(8) ** 0.5
    before = {"use_eaft": True, "eaft_alpha": 0.5, "eaft_k": 8, "max_grad_norm": 15.0, "learning_rate": 0.01}
    after = {
        "plugins": ["dwl_plugin.DWLPlugin"],
        "loss": "dwl",
        "dwl": {"token_loss": "eaft", "eaft": {"exponent": 0.5, "top_k": 8}},
    }
    after |= {"max_grad_norm": 15.0 / factor, "learning_rate": 0.01 * factor}
    runs = [axolotl(on_lengths(optimizer="sgd", **settings)) for settings in (before, after)]
    assert_equal("Axolotl: `use_eaft`, SGD, α 0.5, k 8", *runs, factor=factor)
    assert min(runs[0].norms) < 15 < max(runs[0].norms)  # some steps were clipped


@pytest.mark.slow
@needs("axolotl_plugins.thinking_weight", "clone nidhishs/axolotl-thinking-weight-plugin, and put it on PYTHONPATH")
def test_the_thinking_weight_plugin(configure: Callable[..., dict[str, Any]]) -> None:
    title = "The thinking-weight plugin"
    assert_equal(title, *pair(title, configure, micro_batch_size=4))
    before, after = pair(title, configure, max_steps=1, gradient_accumulation_steps=2)
    assert before.losses[0] == pytest.approx(2 * after.losses[0], rel=0.1)  # the sum of two means, as the page says


# TRL


@harness.stock
@pytest.mark.parametrize("loss_type", ["dft", "nll", "chunked_nll"])
def test_trl(
    model: Any, tokenizer: Any, lengths: list[dict[str, Any]], loss_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's code: that of `dft` as it is, that of the others with their names."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    monkeypatch.chdir(tmp_path)  # where `output_dir` is
    start, runs = weights(model), []
    for which, name in (("before", loss_type), ("after", loss_type.removeprefix("chunked_"))):
        names = {
            "SFTConfig": functools.partial(SFTConfig, max_length=None, optim="sgd", learning_rate=0.1, **STEPS),
            "SFTTrainer": functools.partial(SFTTrainer, processing_class=tokenizer),
            "dwl_plugin": dwl_plugin,
            "model": copy.deepcopy(model),
            "rows": Dataset.from_list(lengths),
        }
        code = PAIRS["TRL: `loss_type`"][which]
        assert '"dft"' in code
        exec(code.replace('"dft"', f'"{name}"'), names)
        runs.append(trained_from(start, names["trainer"]))
    assert_equal(f"TRL: `{loss_type}`", *runs)


# Ours in a plain trainer, beside peers whose trainers are such


def ours(model: Any, tokenizer: Any, rows: list[dict[str, Any]], title: str, folder: Path, **changes: Any) -> Trained:
    """Five steps of a pair's second block, in the order of the rows."""
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    config = block(title)
    own = {key: config[key] for key in ("max_grad_norm", "adam_epsilon", "gradient_accumulation_steps") if key in config}
    settings = {**STEPS, **optimizer(title), "train_sampling_strategy": "sequential", **changes, **own}
    trainer = Trainer(
        model=copy.deepcopy(model),
        args=TrainingArguments(output_dir=str(folder / "ours"), **settings),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    dwl_plugin.apply(trainer, config)
    return trained(trainer)


# LLaMA-Factory


@pytest.fixture(scope="module")
def llamafactory() -> None:
    if find_spec("llamafactory") is None:
        pytest.skip("no `llamafactory` here: `.ci/run peers` brings it")
    import trl

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_VERSION_CHECK", "1")
        # 0.9.5 wants a TRL from before 1.0, for a head that no loss here has
        patch.setattr(trl, "AutoModelForCausalLMWithValueHead", torch.nn.Module, raising=False)
        import llamafactory.train.sft.trainer  # noqa: F401


def by_llamafactory(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], title: str, folder: Path, ref_model: Any = None, **changes: Any
) -> Any:
    """Its trainer, with the keys of a pair's first block."""
    from datasets import Dataset
    from llamafactory.hparams import FinetuningArguments, TrainingArguments
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
    from transformers import DataCollatorForSeq2Seq

    config = block(title, "before")
    of_training = {key: config.pop(key) for key in ("max_grad_norm", "gradient_accumulation_steps") if key in config}
    settings = {**STEPS, **optimizer(title), "train_sampling_strategy": "sequential", **of_training, **changes}
    return CustomSeq2SeqTrainer(
        finetuning_args=FinetuningArguments(**config),
        processor=None,
        model=copy.deepcopy(model),
        args=TrainingArguments(output_dir=str(folder / "llamafactory"), **settings),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=Dataset.from_list(rows),
        tokenizer=tokenizer,
        ref_model=ref_model,
    )


@pytest.mark.parametrize(("key", "factor"), [("use_dft_loss", 1.0), ("use_eaft_loss", math.log(20) / 3)])
@pytest.mark.usefixtures("llamafactory")
def test_llama_factory(model: Any, tokenizer: Any, lengths: list[dict[str, Any]], key: str, factor: float, tmp_path: Path) -> None:
    title = f"LLaMA-Factory: `{key}`"
    before = trained(by_llamafactory(model, tokenizer, lengths, title, tmp_path))
    assert_equal(title, before, ours(model, tokenizer, lengths, title, tmp_path), factor)


@pytest.mark.usefixtures("llamafactory")
def test_llama_factory_asft(model: Any, tokenizer: Any, lengths: list[dict[str, Any]], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    title, base = "LLaMA-Factory: `use_asft_loss`", copy.deepcopy(model).eval()
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    four = {"per_device_train_batch_size": 4}
    theirs = by_llamafactory(adapted, tokenizer, lengths, title, tmp_path, base, **four)
    assert_equal(title, trained(theirs), ours(adapted, tokenizer, lengths, title, tmp_path, **four))

    def first_loss(rows: list[dict[str, Any]], micro_batches: int) -> float:
        one_step = {"max_steps": 1, "gradient_accumulation_steps": micro_batches}
        return trained(by_llamafactory(adapted, tokenizer, rows, title, tmp_path, base, **one_step)).losses[0]

    # What else the page says of it.
    with pytest.raises(TypeError, match="0-d tensor"):
        theirs.evaluate(theirs.train_dataset)
    with pytest.raises(TypeError, match="NoneType"):
        by_llamafactory(adapted, tokenizer, lengths, title, tmp_path, None, **four).train()
    assert first_loss(lengths[:4], 2) == pytest.approx(first_loss(lengths[:2], 1) + first_loss(lengths[2:4], 1), rel=1e-5)


# ms-swift


def swift_rows(kind: str) -> list[dict[str, Any]]:
    """Twenty rows in swift's format, of different lengths."""
    rows = []
    for n, row in enumerate(harness.rows(20)):
        user, assistant = row["messages"]
        call = json.dumps({"name": "add", "arguments": {"a": n, "b": n * n}})
        if kind == "calls":
            told = "".join(f"\n<tool_call>\n{call}\n</tool_call>" for _ in range(n % 3))
            rows.append({"messages": [user, {**assistant, "content": assistant["content"] + told}]})
        elif kind == "agent":
            steps = [{"role": "tool_call", "content": call}, {"role": "tool_response", "content": f"{n * n + n}"}] * (n % 3)
            said = f"Thought: I see it.\nFinal Answer: {n * n + n}\nNext: wait {'and see ' * (n % 4)}"
            if n % 5 == 4:  # every family's delimiters, and a call that ends the turn
                said = f"Action: add\nAction Input: {n}\nNext: all\n✿FUNCTION✿: add\n✿RETURN✿: {n}\nName: it\nAction: ✿ARGS✿: {n}"
            rows.append({"messages": [user, *steps, {"role": "assistant", "content": said}]})
        elif kind == "empty":
            thought = "<think>\n\n</think>\n\n" if n % 2 else "<think>I see it</think>\n"
            rows.append({"messages": [user, {"role": "assistant", "content": f"{thought}The answer is {n}{' indeed' * (n % 5)}."}]})
        elif kind == "rounds":
            again = {"role": "assistant", "content": f"It is {n}{', as I see it' * (n % 4)}."}
            rows.append({"messages": [user, assistant] + [user, again] * (n % 3)})
        else:
            thought = "<think>\n\n</think>\n\n" if n % 2 else ""
            content = f"{thought}{assistant['content']}\n<tool_call>\n{call}\n</tool_call>"
            rows.append({"messages": [user, {**assistant, "content": content, **({"loss_scale": 0.25} if n % 5 == 0 else {})}]})
    return rows


def swift_arguments(title: str, model_folder: Path, folder: Path) -> list[str]:
    """The command of a pair's first block, on a small model and rows in `folder`."""
    words = shlex.split(PAIRS[title]["before"].replace("\\\n", ""))
    assert words[:2] == ["swift", "sft"]
    asked = dict(zip(words[2::2], words[3::2], strict=True))
    asked |= {"--model": str(model_folder), "--dataset": str(folder / "rows.jsonl"), "--output_dir": str(folder / "out")}
    asked |= {
        "--model_type": "llama",
        "--template": "chatml",
        "--torch_dtype": "float32",
        "--tuner_type": "full",
        "--attn_impl": "sdpa",
    }
    asked |= {
        "--adam_beta2": "0.999",
        "--dataset_shuffle": "false",
        "--train_dataloader_shuffle": "false",
        "--split_dataset_ratio": "0",
    }
    asked |= {"--dataset_num_proc": "1", "--dataloader_num_workers": "0", "--load_from_cache_file": "false", "--use_hf": "true"}
    asked |= {"--check_model": "false", "--disable_ignore_empty_think": "true"}
    asked |= {f"--{key}": str(value).lower() for key, value in {**STEPS, **optimizer(title)}.items()}
    return [word for one in asked.items() for word in one]


@pytest.fixture(scope="module")
def swift_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if any(find_spec(name) is None for name in ("swift", "modelscope")):
        pytest.skip("no `swift` here: `.ci/run peers` brings ms-swift")
    return tmp_path_factory.mktemp("swift")


@pytest.fixture(scope="module")
def by_swift(model_folder: Path, swift_folder: Path) -> dict[str, dict[str, Any]]:
    """What swift trained, by the pair's heading."""
    jobs, out = {}, swift_folder / "out.pt"
    for name, (kind, *_) in {**SWIFT, "any loss_scale": ("mixed",)}.items():
        title = next(title for title in PAIRS if title.replace("`", "") == f"ms-swift: {name}")
        (folder := swift_folder / name.replace(" ", "_")).mkdir()
        harness.write_rows(folder / "rows.jsonl", swift_rows(kind))
        jobs[title] = swift_arguments(title, model_folder, folder)
    (swift_folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-m", "tests.hosts.by_swift", str(swift_folder / "jobs.json"), str(out)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    loaded: dict[str, dict[str, Any]] = torch.load(out)
    return loaded


def swifts(done: dict[str, Any]) -> Trained:
    return Trained(done["losses"], {name: (done["start"][name], end) for name, end in done["end"].items()}, done["norms"])


def replies(tokenizer: Any, ids: list[int]) -> list[int]:
    """Labels of ChatML: what follows a header of the assistant, to the end of its turn and the line."""
    header, end = (tokenizer(text)["input_ids"] for text in ("<|im_start|>assistant\n", "<|im_end|>\n"))
    labels, t = [-100] * len(ids), 0
    while t < len(ids):
        if ids[t : t + len(header)] == header:
            t += len(header)
            stop = next(s for s in range(t, len(ids)) if ids[s : s + len(end)] == end) + len(end)
            labels[t:stop] = ids[t:stop]
            t = stop
        else:
            t += 1
    return labels


SWIFT = {  # name: the kind of rows, the factor, whether the labels are a host's, who knows nothing of swift's zeros
    "enable_dft_loss": ("calls", 1, False),
    "hermes": ("calls", 3, False),
    "react": ("agent", 3, False),
    "alpha_umi": ("agent", 3, False),
    "qwen": ("agent", 3, False),
    "agentflan": ("agent", 6, False),
    "ignore_empty_think": ("empty", 1, True),
    "last_round": ("rounds", 1, True),
}


@pytest.mark.parametrize("name", SWIFT)
def test_ms_swift(by_swift: dict[str, dict[str, Any]], model: Any, tokenizer: Any, name: str, tmp_path: Path) -> None:
    title, (_, factor, host_labels) = f"ms-swift: `{name}`", SWIFT[name]
    given = by_swift[title]["rows"]
    rows = [
        {
            "input_ids": row["input_ids"],
            "labels": replies(tokenizer, row["input_ids"]) if host_labels else row["labels"],
            "attention_mask": [1] * len(row["input_ids"]),
        }
        for row in given
    ]
    assert any(row["labels"] != theirs["labels"] for row, theirs in zip(rows, given, strict=True)) == host_labels
    assert_equal(title, swifts(by_swift[title]), ours(model, tokenizer, rows, title, tmp_path), factor)


ENCODE = """
import functools, sys, swift
processor_of, template_of = swift.get_processor, swift.get_template
swift.get_processor = lambda _: processor_of(sys.argv[1], model_type="llama")
swift.get_template = functools.partial(template_of, template_type="chatml")
"""
"""That a small model is a Llama with ChatML, which swift knows of the models that it knows."""


def test_ms_swift_any_loss_scale(
    by_swift: dict[str, dict[str, Any]],
    configure: Callable[..., dict[str, Any]],
    model_folder: Path,
    swift_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The page's script, and what it wrote through `axolotl train`, in the order of the rows."""
    title, folder = "ms-swift: any `loss_scale`", swift_folder / "any_loss_scale"
    command = [sys.executable, "-c", ENCODE + PAIRS[title]["once"], str(model_folder)]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    rows = [json.loads(line) for line in (folder / "encoded.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {weight for row in rows for weight in row["token_weight"]} == {0.0, 0.25, 1.0, 2.0}
    monkeypatch.chdir(folder)
    of = {"max_steps": 5, "gradient_accumulation_steps": 2, "optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 1.0}
    in_order = {"curriculum_sampling": True, "shuffle_merged_datasets": False}
    assert_equal(title, swifts(by_swift[title]), axolotl(configure(**of, **in_order, **block(title))))
