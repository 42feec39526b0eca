"""Per-class sums over target tokens. Sums travel over micro-batches, steps and ranks; division happens once, in `_ratios`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dwl_plugin.loss.membership import Membership, widest
from dwl_plugin.loss.stable_nll import unlikelihood

__all__ = ["ClassSums", "ForwardMetrics"]

_ROWS = ("count", "nll", "p", "kl")
_OF_FACTORS = ("pays nll", "factor", "p below")
_PAID = ("weight", "loss")


@dataclass(frozen=True)
class ForwardMetrics:
    """The tokens of one forward: the classes they are in and those they pay in, with factors of the data; nll in nats, and the
    factors of token losses in front of it.

    Token t pays weight_C[c]·v·(factors_KN[term_C[c], t]·nll_N[t] + anchor_C[c]·kl_N[t]) in class c, v its factor of the data (1 if
    it has none), and weight_C[c]·|v|·(−log(1 − p)) if that is below 0. Shapes: N positions, C classes, K terms.
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
    """Running sums: tokens, Σ nll, Σ p, Σ KL to the base model, Σ token weight, Σ weighted loss, of each class, of all targets, and
    of each data set where there are two or more. With `factors` of the data also theirs, as class ids hold them: over n or √n where
    the reduction counts samples.

    A token with a factor below 0 is to become unlikely: among the others it would make a run look the worse the better it gets. So
    nll, p, KL and weight are those of the tokens that pay nll, and the p of the others is a number of its own. What they pay
    is no less than 0, and counts in the loss.

    Stays on the device of the tokens, so adding costs no synchronisation.
    """

    def __init__(self, names: Sequence[str], data_sets: Sequence[str] = (), *, factors: bool = False) -> None:
        self.names = tuple(names)
        self.data_sets = tuple(data_sets) if len(data_sets) > 1 else ()
        self._factors, self._rows = factors, (*_ROWS, *(_OF_FACTORS if factors else ()), *_PAID)
        self._sums_RC: torch.Tensor | None = None
        self._anchored = False

    def add(self, tokens: ForwardMetrics) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the tokens of one forward. Where classes overlap, a token counts in each of its classes, and once in all.

        Returns how many tokens pay nll and their Σ nll, in each class, (C,) both, of this forward alone.
        """
        members, paying, dtype = tokens.members, tokens.paying, widest(tokens.nll_N.device)
        nll_N, factors_KN = tokens.nll_N.to(dtype), tokens.factors_KN.to(dtype)
        kl_N = torch.zeros_like(nll_N) if tokens.kl_N is None else tokens.kl_N.to(dtype)
        self._anchored = self._anchored or tokens.kl_N is not None
        p_N = torch.exp(-nll_N)
        seen_RN = torch.stack((torch.ones_like(nll_N), nll_N, p_N, kl_N))
        paid_RN = torch.cat([factors_KN, factors_KN * nll_N, kl_N[None], torch.zeros_like(nll_N)[None]])
        if members.factors_N is not None:
            own_N = members.factors_N.to(dtype)
            paid_RN = paid_RN * own_N
            if self._factors:
                is_below_N = own_N < 0
                seen_RN[1:].masked_fill_(is_below_N, 0.0)
                seen_RN = torch.cat([seen_RN, torch.stack((~is_below_N, own_N, p_N.where(is_below_N, 0.0)))])
                paid_RN.masked_fill_(is_below_N, 0.0)
                paid_RN[-1] = torch.where(is_below_N, -own_N * unlikelihood(nll_N), 0.0)

        def weighed(members: Membership) -> torch.Tensor:
            """(2, C): Σ weight and Σ weighted loss of each class."""
            *by_term_RC, kl_C, below_C = members.sums(paid_RN)[:, :-1]
            factor_KC, loss_KC = torch.stack(by_term_RC).tensor_split(2)
            factor_C, loss_C = (sums_KC.gather(0, tokens.term_C[None])[0] for sums_KC in (factor_KC, loss_KC))
            if tokens.anchor_C is not None:
                loss_C = loss_C + tokens.anchor_C.to(dtype) * kl_C
            return tokens.weight_C.to(dtype) * torch.stack([factor_C, loss_C + below_C])

        in_class_2C = weighed(members)
        paid_2C = in_class_2C if paying is members else weighed(paying)
        seen_RC, weighed_2C = members.sums(seen_RN), torch.cat([in_class_2C, paid_2C.sum(1, keepdim=True)], 1)
        if self.data_sets:
            of_set_2N = _weighed_each(tokens, paid_RN)
            seen_RC = torch.cat([seen_RC, members.sums_of_data_sets(seen_RN, len(self.data_sets))], 1)
            weighed_2C = torch.cat([weighed_2C, members.sums_of_data_sets(of_set_2N, len(self.data_sets))], 1)
        sums_RC = torch.cat([seen_RC, weighed_2C])
        self._sums_RC = sums_RC if self._sums_RC is None else self._sums_RC + sums_RC.to(self._sums_RC.device)
        classes = slice(len(self.names))
        return sums_RC[self._rows.index("pays nll") if self._factors else 0, classes], sums_RC[1, classes]

    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str, float]:
        """The sums since the last call, added up over ranks by `reduce`, as ratios; then starts again from zero.

        Every rank has to call it, also one that saw no token.
        """
        sums_RC, self._sums_RC = self._sums_RC, None
        if sums_RC is None:
            columns = len(self.names) + 1 + len(self.data_sets)
            sums_RC = torch.zeros(len(self._rows), columns, dtype=widest(device), device=device)
        return self._ratios(reduce(sums_RC.to(device)).tolist())

    def _ratios(self, rows: list[list[float]]) -> dict[str, float]:
        of, every = dict(zip(self._rows, rows, strict=True)), len(self.names)
        count, loss, pays_nll = of["count"], of["loss"], of["pays nll" if self._factors else "count"]
        if count[every] == 0:
            return {}
        out: dict[str, float] = {}

        def put(before: str, after: str, column: int) -> None:
            for row in ("nll", "p", "kl") if self._anchored else ("nll", "p"):
                if pays_nll[column] > 0:
                    out[f"{before}{row}{after}"] = of[row][column] / pays_nll[column]
            if self._factors and count[column] > 0:
                out[f"{before}factor{after}"] = of["factor"][column] / count[column]
                if count[column] > pays_nll[column]:
                    out[f"{before}p_negative{after}"] = of["p below"][column] / (count[column] - pays_nll[column])
            if column != every:
                out[f"{before}token_share{after}"] = count[column] / count[every]
                if loss[every] > 0:
                    out[f"{before}loss_share{after}"] = loss[column] / loss[every]

        put("dwl/", "", every)
        if pays_nll[every] > 0:
            out["nll"], out["dwl/weight"] = out.pop("dwl/nll"), of["weight"][every] / pays_nll[every]
        for c, name in enumerate(self.names):
            put("dwl/", f"/{name}", c)
        for d, name in enumerate(self.data_sets, start=every + 1):
            if count[d] > 0:
                put("dwl/dataset/", f"/{name}", d)
        return out


def _weighed_each(tokens: ForwardMetrics, paid_RN: torch.Tensor) -> torch.Tensor:
    """(2, N): weight and weighted loss of each token, over the classes that it pays in."""
    factor_KN, loss_KN = paid_RN[:-2].tensor_split(2)
    weight_N, loss_N = torch.zeros_like(paid_RN[:2])
    for k, (factor_N, own_loss_N) in enumerate(zip(factor_KN, loss_KN, strict=True)):
        in_term_N = tokens.paying.add_up(torch.where(tokens.term_C == k, tokens.weight_C, 0.0))
        weight_N, loss_N = weight_N + in_term_N * factor_N, loss_N + in_term_N * own_loss_N
    if tokens.anchor_C is not None:
        loss_N = loss_N + tokens.paying.add_up(tokens.weight_C * tokens.anchor_C) * paid_RN[-2]
    return torch.stack([weight_N, loss_N + tokens.paying.add_up(tokens.weight_C) * paid_RN[-1]])
