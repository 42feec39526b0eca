"""What a call of the loss allocates on a GPU with a frozen head in bf16, by a formula. The vocabulary is in it nowhere.

    T·H·2       ∂hidden of T positions, which the model wants of any loss
    R·H·(4 + 2) a block of R targets: its ∂hidden in fp32, its hidden states where other positions are ignored
    R·W·(4 + 2) a block and a tile of W tokens: products in fp32, exponentials in bf16
    T·88        numbers of each token: its position, target, loss, nll, coefficients

R and W are those of `gpu_walk`, at most as large as they are here.
"""

from __future__ import annotations

__all__ = ["MOST_ROWS", "MOST_TILE_BYTES", "loss_bytes"]

MOST_ROWS = 2048
MOST_TILE_BYTES = 48 * 2**20
"""R·W·6."""

_NUMBERS = 88


def loss_bytes(T: int, N: int, H: int, *, rows: int = MOST_ROWS, tile_bytes: int = MOST_TILE_BYTES) -> int:
    """Bytes of a call with N targets among T positions, ∂hidden among them."""
    return T * H * 2 + min(rows, N) * H * (6 if N < T else 4) + tile_bytes + T * _NUMBERS
