"""What factors of the data cost: a batch labelled and collated with and without them, and the loss of it.

    uv run python bench/factors.py

A pair takes turns in one thread, `--rounds` times, and every figure is the least processor time of the rounds: what else the
machine does only adds. Rows are as a data set hands them out, lists of integers; their codes were made when they were tokenised.
The loss is a step of one micro-batch in a session: counts, forward, backward, sums for the log, around a model without layers.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM

from bench.labelling import REGEXES, packed, samples_of
from dwl_plugin.classes import build_labeller
from dwl_plugin.classes.data_codes import DATA_CODES, encode
from dwl_plugin.cli.quickstart.model import prepared_model
from dwl_plugin.config import parse
from dwl_plugin.config.classes import Classes
from dwl_plugin.run.collate import CLASS_IDS, LabellingCollator
from dwl_plugin.run.session import Session

Call = Callable[[], Any]
FACTORS = (0.25, 0.5, 1.0, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8_192, help="of a batch that is labelled and collated")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--losses", type=int, default=10, help="rounds of the loss")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    print_pairs(console, f"{options.tokens:,} tokens, labelled and collated", batches(console, options.tokens), options.rounds)
    for trained in (False, True):
        head = "trained" if trained else "frozen"
        pairs = losses(trained)
        print_pairs(console, f"the loss of 2,048 × 576 × 49,152, 60% ignored, fp32, {head} head", pairs, options.losses)


def print_pairs(console: Console, title: str, pairs: dict[str, tuple[Call, Call]], rounds: int) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("", "without, ms", "with, ms", "×"):
        table.add_column(column, justify="left" if not column else "right")
    for name, pair in pairs.items():
        without, with_factors = in_turns(pair, rounds)
        table.add_row(name, f"{without:,.2f}", f"{with_factors:,.2f}", f"{with_factors / without:.2f}")
    console.print(table)


def in_turns(pair: tuple[Call, Call], rounds: int) -> tuple[float, float]:
    """The least milliseconds of processor time of each."""
    least = [float("inf")] * 2
    for at in range(rounds + 1):
        for which in (0, 1) if at % 2 else (1, 0):
            began = time.process_time()
            pair[which]()
            if at:  # the first round is a warm-up
                least[which] = min(least[which], 1e3 * (time.process_time() - began))
    return least[0], least[1]


def batches(console: Console, tokens: int) -> dict[str, tuple[Call, Call]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared_model(console))
    _, ids, labels, positions = packed(tokenizer, tokens, False)
    draw = random.Random(0)
    rows, coded = [], []
    for at, part in samples_of(ids, positions):
        row = {"input_ids": part, "labels": labels[at : at + len(part)].tolist(), "attention_mask": [1] * len(part)}
        rows.append(row)
        coded.append({**row, DATA_CODES: encode([draw.choice(FACTORS) for _ in part], 0, draw.choice((1, 2))).tolist()})
    host = DataCollatorForSeq2Seq(tokenizer)

    stored = [Dataset.from_list(some) for some in (rows, coded)]

    def pair(classes: dict[str, Any], power: float = 0.0, read: bool = False) -> tuple[Call, Call]:
        configs = TypeAdapter(Classes).validate_python(classes)
        plain, reading = (
            LabellingCollator(host, build_labeller(configs, tokenizer, may_be_empty=configs, **how), packed=False)
            for how in ({}, {"reads_data": True, "power": power})
        )
        if read:
            every = range(len(rows))
            return lambda: plain(stored[0].__getitems__(every)), lambda: reading(stored[1].__getitems__(every))
        return lambda: plain([dict(row) for row in rows]), lambda: reading([dict(row) for row in coded])

    regexes = {name: {"regex": pattern} for name, pattern in REGEXES.items()}
    by_token = {"digits": {"token_regex": r"\s?\d+"}, "few": {"token_ids": ["20-90"]}}
    return {
        "no class": pair({}),
        "2 classes by token": pair(by_token),
        "2 classes by token, sample_mean": pair(by_token, power=1.0),
        "1 regex": pair({"number": regexes["number"]}),
        "8 regexes": pair(regexes),
        "2 classes by token, rows read from disk": pair(by_token, read=True),
    }


def losses(trained: bool) -> dict[str, tuple[Call, Call]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "vocab_size": 49_152, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=0, use_cache=False, initializer_range=0.05, **sizes))
    model.lm_head.requires_grad_(trained)
    model.model.embed_tokens.requires_grad_(False)
    ids = torch.randint(0, 49_152, (8, 256))
    labels = torch.where(torch.rand(ids.shape) < 0.6, -100, ids)
    class_ids = torch.where(labels == -100, -100, torch.randint(0, 3, ids.shape))
    factors = np.random.default_rng(0).choice(FACTORS, ids.shape)
    classes = {"a": {"token_ids": [5]}, "b": {"token_ids": [6], "token_loss": "dft"}}

    def step(factors: Any, **dwl: Any) -> Call:
        block = parse({"loss": "dwl", "dwl": {"classes": classes, "reduction": "weighted_mean", **dwl}})
        assert block is not None
        session = Session(model, block, None, None, ())
        session.seam.detach()
        own_ids = class_ids if factors is None else torch.where(labels == -100, -100, torch.from_numpy(encode(factors, class_ids)))

        def call() -> None:
            batch = {"input_ids": ids, "labels": labels, CLASS_IDS: own_ids}
            counts = session.counts([batch], torch.device("cpu"))
            pending = session.pending_loss(batch, counts, counts[0, -2].clamp(min=1), session.trained_on)
            seam = type(session.seam)(model, print)
            with seam.armed(pending):
                loss = model(**batch).loss
            loss.backward()
            seam.detach()
            session.measured(lambda sums: sums, torch.device("cpu"))

        return call

    without = step(None)
    signed = np.where(np.random.default_rng(1).random(ids.shape) < 0.2, -1, 1)
    return {
        "factors": (without, step(factors, data_weights=True)),
        "factors, 20 % of them below 0": (without, step(factors * signed, data_weights={"allow_negative": True})),
    }


if __name__ == "__main__":
    main()
