"""A task whose right answer is known: one class takes ten times as much learning as each of the others.

    uv run --group bench python bench/worst_class.py                     # three seeds, a few minutes on a CPU
    uv run --group bench python bench/worst_class.py --seeds 0 --steps 100 --curves /tmp/curves.csv --figure /tmp/figure.png
    uv run --group bench python bench/worst_class.py --redraw            # the figure from the curves of the last time

Four classes of facts, two key tokens -> one value, in equal numbers of tokens: three of 40 facts and `hard` of 400, so that a fact
of `hard` is met ten times less often. All of them can be learned, so whoever wants the worst class to be as good as possible has to
lean towards `hard`, and the losses say so. The model is a Llama of one layer; trainer, loss and controllers are those of every run.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CLASSES = {"easy_1": 40, "easy_2": 40, "easy_3": 40, "hard": 400}
"""Facts to learn."""
FIRST_KEY, KEYS, FIRST_VALUE, VALUES = 10, 40, 180, 16
FACTS, ROWS = 16, 4096

BASELINE = "constant α"
RULES: dict[str, dict[str, Any] | None] = {
    BASELINE: None,
    "rlw": {"type": "rlw"},
    "dwa": {"type": "dwa"},
    "softmax_loss": {"type": "softmax_loss", "temperature": 1.0},
    "group_dro": {"type": "group_dro"},
    "group_dro, eta 0.1": {"type": "group_dro", "eta": 0.1},
}
"""Whatever is not written here is the default."""


def block(rule: dict[str, Any] | None) -> dict[str, Any]:
    first = {name: FIRST_VALUE + VALUES * c for c, name in enumerate(CLASSES)}
    dwl: dict[str, Any] = {
        "classes": {name: {"token_ids": [f"{at}-{at + VALUES - 1}"]} for name, at in first.items() if name != "hard"},
        "reduction": "class_mean",
    }
    dwl["classes"]["hard"] = {"token_ids": [f"{first['hard']}-{first['hard'] + VALUES - 1}"]}
    # Keys are no targets, so `rest` is empty and has to stay so.
    return {"loss": "dwl", "dwl": dwl if rule is None else {**dwl, "controller": rule}}


def rows(seed: int) -> list[dict[str, list[int]]]:
    """The same facts for every seed, met in another order."""
    import numpy as np

    facts, generator = np.random.default_rng(0), np.random.default_rng([1, seed])
    keys = facts.permutation(KEYS * KEYS)[: sum(CLASSES.values())]
    keys_of = np.split(keys, np.cumsum(list(CLASSES.values()))[:-1])
    values_of = [facts.integers(0, VALUES, count) for count in CLASSES.values()]
    out = []
    for _ in range(ROWS):
        ids, labels = [1], [-100]
        for c in generator.integers(0, len(CLASSES), FACTS):
            fact = generator.integers(0, len(keys_of[c]))
            first, second = divmod(int(keys_of[c][fact]), KEYS)
            value = int(FIRST_VALUE + VALUES * c + values_of[c][fact])
            ids += [FIRST_KEY + first, FIRST_KEY + KEYS + second, value]
            labels += [-100, -100, value]
        out.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return out


def tokenizer() -> Any:
    """One token a byte, three special ones before."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def run(rule: str, seed: int, steps: int, folder: Path) -> list[dict[str, float]]:
    """Train in this process; the trainer's log."""
    import torch
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    import dwl_plugin

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260, hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
        )
    )
    samples = rows(seed)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=0.002,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            weight_decay=0.0,
            seed=seed,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=20,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer()),
        train_dataset=Dataset.from_list(samples[256:]),
        eval_dataset=Dataset.from_list(samples[:256]),
        processing_class=tokenizer(),
    )
    options = RULES[rule]
    if rule == "rlw":  # its noise is part of what is repeated
        options = {"type": "rlw", "seed": seed}
    dwl_plugin.apply(trainer, block(options))
    trainer.train()
    history: list[dict[str, float]] = trainer.state.log_history
    return history


def child(rules: list[str], seed: int, steps: int) -> None:
    for rule in rules:
        with tempfile.TemporaryDirectory() as name:
            history = run(rule, seed, steps, Path(name))
        print("\nBENCH " + json.dumps({"rule": rule, "seed": seed, "history": history}), flush=True)


Curves = dict[str, dict[int, dict[int, float]]]
"""Rule -> seed -> step -> held-out nll of the worst class."""


def curves_of(found: dict[str, dict[int, list[dict[str, float]]]]) -> Curves:
    def worst(history: list[dict[str, float]]) -> dict[int, float]:
        entries = [entry for entry in history if "eval_dwl/nll/hard" in entry]
        return {int(entry["step"]): max(entry[f"eval_dwl/nll/{name}"] for name in CLASSES) for entry in entries}

    return {rule: {seed: worst(history) for seed, history in runs.items()} for rule, runs in found.items()}


def write(curves: Curves, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("rule", "seed", "step", "worst"))
        for rule, runs in curves.items():
            rows.writerows((rule, seed, step, f"{value:.6g}") for seed, run in runs.items() for step, value in run.items())


def read(path: Path) -> Curves:
    curves: Curves = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            curves.setdefault(row["rule"], {}).setdefault(int(row["seed"]), {})[int(row["step"])] = float(row["worst"])
    return curves


def draw(curves: Curves, path: Path) -> None:
    """The worst class's held-out nll minus that of constant α with the same seed: the mean, and what lies between the seeds."""
    from dwl_plugin.cli import plots

    lines, bands = [], []
    for index, (rule, runs) in enumerate(curves.items()):
        steps = list(next(iter(runs.values())))
        values = [[run[step] - curves[BASELINE][seed][step] for seed, run in runs.items()] for step in steps]
        look = plots.look_of(index, plain=rule == BASELINE)
        lines.append(plots.Line(rule, steps, [statistics.mean(at) for at in values], look))
        bands.append((steps, [min(at) for at in values], [max(at) for at in values], look["color"]))
    figure = plots.draw_lines(lines, "worst class against constant α, nats")
    (axes,) = figure.axes
    for steps, low, high, colour in bands:
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.autoscale(axis="y")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plots.to_image(figure, path.suffix))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--curves", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--figure", type=Path, default=Path("docs/images/worst_class.png"))
    parser.add_argument("--redraw", action="store_true", help="measure nothing")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return child(options.rules, options.child, options.steps)

    if options.redraw:
        return draw(read(options.curves), options.figure)
    rules = [BASELINE, *(rule for rule in options.rules if rule != BASELINE)]
    found: dict[str, dict[int, list[dict[str, float]]]] = {rule: {} for rule in rules}
    for seed in options.seeds:
        command = [sys.executable, __file__, "--child", str(seed), "--steps", str(options.steps), "--rules", *rules]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"seed {seed} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
        for line in done.stdout.splitlines():
            if line.startswith("BENCH "):
                one = json.loads(line.removeprefix("BENCH "))
                found[one["rule"]][seed] = one["history"]
    write(curves_of(found), options.curves)
    draw(read(options.curves), options.figure)
    print("| | worst class, by seed | mean | worst easy class, mean | α of `hard` at the end, mean |\n|---|---|---:|---:|---:|")
    for rule, runs in found.items():
        last = [[entry for entry in history if "eval_nll" in entry][-1] for history in runs.values()]
        worst = [max(entry[f"eval_dwl/nll/{name}"] for name in CLASSES) for entry in last]
        easy = statistics.mean(max(entry[f"eval_dwl/nll/{name}"] for name in CLASSES if name != "hard") for entry in last)
        alpha = statistics.mean([e for e in history if "loss" in e][-1]["dwl/alpha/hard"] for history in runs.values())
        by_seed = " ".join(f"{value:.3f}" for value in worst)
        print(f"| {rule} | {by_seed} | {statistics.mean(worst):.3f} | {easy:.3f} | {alpha:.2f} |")


if __name__ == "__main__":
    main()
