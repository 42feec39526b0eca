"""Nothing here may reach for a network, the host's telemetry stays off, and each process of several keeps to one thread."""

from __future__ import annotations

import os

os.environ.update(
    AXOLOTL_DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    WANDB_DISABLED="true",
)
