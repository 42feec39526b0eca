"""Nothing here may reach for a network, and the host's telemetry stays off."""

from __future__ import annotations

import os

os.environ.update(
    AXOLOTL_DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    WANDB_DISABLED="true",
)
