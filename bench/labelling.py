"""Labelling one packed batch beside tokenising the same text and beside decoding it token by token.

    uv run python bench/labelling.py                 # SmolLM2's tokenizer, 8,192 tokens
    uv run python bench/labelling.py --step 128      # and a training step of SmolLM2 on so many of them: minutes on a CPU

The text is word problems with worked answers, in SmolLM2's chat template; only the answers are targets. The methods take turns,
`--rounds` times, in one thread; a turn is the best of three calls, and every figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from dwl_plugin.classes import Labeller, build_labeller
from dwl_plugin.cli.quickstart.model import prepared_model
from dwl_plugin.cli.quickstart.problems import generate
from dwl_plugin.config.classes import Classes

REGEXES = {
    "number": r"\d[\d,]*(?:\.\d+)?",
    "answer": r"####\s*(.+)$",
    "equation": r"\d[\d.,]* [-+*/×÷] \d[\d.,]* = \d[\d.,]*",
    "connective": r"\b(?:so|then|therefore|thus|because)\b",
    "name": r"\b[A-Z][a-z]+\b",
    "operator": r"[-+*/=×÷]",
    "money": r"\$\d+(?:\.\d\d)?",
    "unit": r"(?i)\b(?:apples?|boxes|hours?|minutes?|pages?|dollars?)\b",
}
KEYWORDS = 2_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--step", type=int, default=0, metavar="TOKENS", help="also time a training step of SmolLM2")
    parser.add_argument("--all", action="store_true", help="prompts are targets too")
    options = parser.parse_args()

    from transformers import AutoTokenizer

    console = Console()
    folder = prepared_model(console)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts, ids, labels, positions = packed(tokenizer, options.tokens, options.all)
    samples = [(part, labels[at : at + len(part)].tolist(), None) for at, part in samples_of(ids, positions)]

    def batch(labeller: Labeller) -> Callable[[], Any]:
        return lambda: labeller.label_batch(ids[None], labels[None], positions[None], packed=True)

    def made(**classes: dict[str, Any]) -> Labeller:
        configs = TypeAdapter(Classes).validate_python(classes)
        return build_labeller(configs, tokenizer, may_be_empty=configs)

    regexes = {name: {"regex": pattern} for name, pattern in REGEXES.items()}
    eight = made(**regexes)
    control = {"tokens": [tokenizer.eos_token]}
    methods: dict[str, Callable[[], Any]] = {
        "tokenising the text": lambda: [tokenizer.encode(text, add_special_tokens=False) for text in texts],
        "decoding token by token": lambda: [tokenizer.decode([token_id]) for token_id in ids.tolist()],
        "8 regexes": batch(eight),
        "8 regexes, sample by sample from lists": lambda: eight.label_samples(samples),
        "3 classes by token": batch(made(digits={"token_regex": r"\s?\d+"}, end=control, few={"token_ids": ["20-90"]})),
        f"{KEYWORDS:,} keywords": batch(made(keywords={"words": keywords(texts)})),
    }
    methods |= {f"1 regex: {name}": batch(made(**{name: spec})) for name, spec in regexes.items()}
    milliseconds = in_turns(methods, options.rounds)
    if options.step:
        milliseconds[f"a training step on {options.step:,} tokens"] = training_step(folder, ids, labels, options.step)

    targets = int((labels != -100).sum())
    tokenising, decoding = (milliseconds[name] for name in ("tokenising the text", "decoding token by token"))
    table = Table(title=f"{len(ids):,} tokens in {len(samples)} samples, {targets:,} of them targets; medians of {options.rounds}")
    for column in ("", "ms", "M tokens/s", "of tokenising", "decoding takes"):
        table.add_column(column, justify="left" if not column else "right")
    for name, ms in milliseconds.items():
        count = options.step if name.startswith("a training") else len(ids)
        table.add_row(name, f"{ms:,.2f}", f"{count / ms / 1e3:,.2f}", f"{ms / tokenising:.1%}", f"{decoding / ms:,.1f}×")
    console.print(table)
    one = statistics.mean(ms for name, ms in milliseconds.items() if name.startswith("1 regex"))
    console.print(
        f"classes by token: {milliseconds['8 regexes'] / milliseconds['3 classes by token']:.0f}× faster than by 8 regexes"
    )
    console.print(f"{KEYWORDS:,} keywords: {milliseconds[f'{KEYWORDS:,} keywords'] / one:.2f}× the mean of one regex")
    if options.step:
        share = milliseconds["8 regexes"] / len(ids) * options.step / milliseconds[f"a training step on {options.step:,} tokens"]
        console.print(f"8 regexes: {share:.3%} of a training step")


def packed(tokenizer: Any, tokens: int, everything: bool) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Texts, and their ids, labels and positions in one row."""
    texts, ids, labels, positions = [], [], [], []
    for problem in generate(tokens // 40, seed=0):
        messages = problem.row()["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        part = tokenizer.encode(text, add_special_tokens=False)
        masked = 0 if everything else len(tokenizer.encode(prompt, add_special_tokens=False))
        texts.append(text)
        ids += part
        labels += [-100] * masked + part[masked:]
        positions += range(len(part))
        if len(ids) >= tokens:
            break
    return texts, *(np.array(row[:tokens]) for row in (ids, labels, positions))


def samples_of(ids: np.ndarray, positions: np.ndarray) -> list[tuple[int, list[int]]]:
    """Where each sample begins, and its ids."""
    starts = np.flatnonzero(positions == 0).tolist()
    return [(at, ids[at:end].tolist()) for at, end in zip(starts, [*starts[1:], len(ids)], strict=True)]


def keywords(texts: list[str]) -> list[str]:
    """Every fourth word of the text, the frequent ones first, and words that it has not."""
    found = [word for word, _ in Counter(re.findall(r"\w+", " ".join(texts))).most_common()][::4]
    letters = random.Random(0)
    more = ("".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(KEYWORDS))
    return [*found, *more][:KEYWORDS]


def in_turns(methods: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            calls = []
            for _ in range(3):
                began = time.perf_counter()
                method()
                calls.append(1e3 * (time.perf_counter() - began))
            times[name].append(min(calls))
    return {name: statistics.median(seen) for name, seen in times.items()}


def training_step(folder: Any, ids: np.ndarray, labels: np.ndarray, tokens: int) -> float:
    """Milliseconds of a forward, a backward and an optimizer step; the second of two."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    row, target = (torch.from_numpy(array[:tokens])[None].to(device) for array in (ids, labels))
    for _ in range(2):
        began = time.perf_counter()
        loss = model(input_ids=row, labels=target).loss
        loss.backward()
        optimizer.step()
        loss.item()
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
