"""Per-class sums over target tokens. Sums travel over micro-batches, steps and ranks; division happens once, in `ratios`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dwl_plugin.loss.membership import Membership

__all__ = ["ClassSums", "ForwardMetrics", "widest"]

_ROWS = ("count", "nll", "p", "kl", "weight", "loss")


def widest(device: torch.device) -> torch.dtype:
    """fp64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class ForwardMetrics:
    """The tokens of one forward: the classes they are in and those they pay in, nll in nats, and the factors in front of it.

    Token t pays weight_C[c] · (factors_KN[term_C[c], t] · nll_N[t] + anchor_C[c] · kl_N[t]) in class c. Shapes: N positions,
    C classes, K terms.
    """

    members: Membership
    paying: Membership
    nll_N: torch.Tensor
    factors_KN: torch.Tensor
    term_C: torch.Tensor
    weight_C: torch.Tensor
    kl_N: torch.Tensor | None = None
    anchor_C: torch.Tensor | None = None


class ClassSums:
    """Running sums (6, C + 1): tokens, Σ nll, Σ p, Σ KL to the base model, Σ token weight, Σ weighted loss, of each class and of
    all targets.

    Stays on the device of the tokens, so adding costs no synchronisation.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums_RC: torch.Tensor | None = None
        self._anchored = False

    def add(self, tokens: ForwardMetrics) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the tokens of one forward. Where classes overlap, a token counts in each of its classes, and once in all.

        Returns the number of tokens and Σ nll of each class, (C,) both, of this forward alone.
        """
        dtype = widest(tokens.nll_N.device)
        nll_N, factors_KN = tokens.nll_N.to(dtype), tokens.factors_KN.to(dtype)
        kl_N = torch.zeros_like(nll_N) if tokens.kl_N is None else tokens.kl_N.to(dtype)
        self._anchored = self._anchored or tokens.kl_N is not None
        seen_4N = torch.stack((torch.ones_like(nll_N), nll_N, torch.exp(-nll_N), kl_N))
        factors_RN = torch.cat([factors_KN, factors_KN * nll_N, kl_N[None]])

        def weighed(members: Membership) -> torch.Tensor:
            """(2, C): Σ weight and Σ weighted loss of each class."""
            *by_term_RC, kl_C = members.sums(factors_RN)[:, :-1]
            factor_KC, loss_KC = torch.stack(by_term_RC).tensor_split(2)
            factor_1C, loss_1C = (sums_KC.gather(0, tokens.term_C[None]) for sums_KC in (factor_KC, loss_KC))
            if tokens.anchor_C is not None:
                loss_1C = loss_1C + tokens.anchor_C.to(dtype) * kl_C
            return tokens.weight_C.to(dtype) * torch.cat([factor_1C, loss_1C])

        in_class_2C = weighed(tokens.members)
        paid_2C = in_class_2C if tokens.paying is tokens.members else weighed(tokens.paying)
        weighed_2C = torch.cat([in_class_2C, paid_2C.sum(1, keepdim=True)], 1)
        sums_RC = torch.cat([tokens.members.sums(seen_4N), weighed_2C])
        self._sums_RC = sums_RC if self._sums_RC is None else self._sums_RC + sums_RC.to(self._sums_RC.device)
        return sums_RC[0, :-1], sums_RC[1, :-1]

    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str, float]:
        """The sums since the last call, added up over ranks by `reduce`, as ratios; then starts again from zero.

        Every rank has to call it, also one that saw no token.
        """
        sums_RC, self._sums_RC = self._sums_RC, None
        if sums_RC is None:
            sums_RC = torch.zeros(len(_ROWS), len(self.names) + 1, dtype=widest(device), device=device)
        return self._ratios(reduce(sums_RC.to(device)).tolist())

    def _ratios(self, rows: list[list[float]]) -> dict[str, float]:
        count, nll, p, kl, weight, loss = rows
        total, total_loss = count[-1], loss[-1]
        if total == 0:
            return {}
        out = {"nll": nll[-1] / total, "dwl/p": p[-1] / total, "dwl/weight": weight[-1] / total}
        if self._anchored:
            out["dwl/kl"] = kl[-1] / total
        for c, name in enumerate(self.names):
            if count[c] > 0:
                out[f"dwl/nll/{name}"] = nll[c] / count[c]
                out[f"dwl/p/{name}"] = p[c] / count[c]
                if self._anchored:
                    out[f"dwl/kl/{name}"] = kl[c] / count[c]
            out[f"dwl/token_share/{name}"] = count[c] / total
            if total_loss > 0:
                out[f"dwl/loss_share/{name}"] = loss[c] / total_loss
        return out
