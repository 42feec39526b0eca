"""The one place where labels move: position t predicts token t + 1."""

from __future__ import annotations

import torch

from dwl_plugin.values import IGNORE_INDEX

__all__ = ["IGNORE_INDEX", "shift_left"]


def shift_left(labels_BT: torch.Tensor, ignore_index: int = IGNORE_INDEX) -> torch.Tensor:
    """(…, T) -> (…, T): element t holds what was at t + 1, the last one `ignore_index`. The input is left as it is."""
    shifted_BT = torch.full_like(labels_BT, ignore_index)
    shifted_BT[..., :-1] = labels_BT[..., 1:]
    return shifted_BT
