"""What a model writes to questions, before its training and after: `python -m dwl_plugin.cli.quickstart.replies MODEL FILE RUN...`.

FILE has a JSON object a line with a `question`; each gets a reply under "before training" and under the name of every RUN's folder.
Prints one line before each of its stages, for the process that started it to show.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dwl_plugin.files import write_whole

__all__ = ["BEFORE", "MOST_TOKENS", "write_replies"]

BEFORE = "before training"
MOST_TOKENS = 100


def write_replies(folder: Path, file: Path, runs: Sequence[Path]) -> None:
    """Replies by greedy decoding, so that they are the same each time. The weights are in fp32, as on a CPU in training."""
    print("starting transformers", flush=True)
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    asked = [[{"role": "user", "content": row["question"]}] for row in rows]
    batch = tokenizer.apply_chat_template(asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True)
    for name, run in ((BEFORE, None), *((run.name, run) for run in runs)):
        print(f"{len(rows)} questions, {name}", flush=True)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if run is not None:
            model = PeftModel.from_pretrained(model, str(run))
        with torch.inference_mode():
            written = model.generate(**batch, do_sample=False, max_new_tokens=MOST_TOKENS)
        replies = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, reply in zip(rows, replies, strict=True):
            row[name] = reply
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


if __name__ == "__main__":
    write_replies(Path(sys.argv[1]), Path(sys.argv[2]), [Path(run) for run in sys.argv[3:]])
