"""From counts, and perhaps measured p, to a proposal. The rules and their numbers stand at the top, each with what it rests on.

By our own experiments (docs/evidence.md, whose sections stand in brackets) a weight rarely beats plain SFT, and no count tells
which tokens matter to somebody. So weights are proposed only where they are asked for (`--weigh`), and DFT only where the model was
measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dwl_plugin.cli.preflight import MIDDLE_FROM, STRONG
from dwl_plugin.cli.suggest.counting import Found, Key, Matches
from dwl_plugin.config import Block
from dwl_plugin.errors import DWLError
from dwl_plugin.loss.reduction import ClassWeight, class_weight_table
from dwl_plugin.values import REST

__all__ = ["Chosen", "Line", "Proposal", "against", "choose", "own_classes", "propose", "weights_of"]


class PackRule(NamedTuple):
    """When a pack is in the block, and what is known of a weight on it.

    Args:
        least_share: of the targets, below which it is left out. 0 where already a few rows mean something.
        known: what was measured of a weight on it.
        lighter: classes of the pack that keep α 1 under `--weigh`, while all else gets more: for a pack that is most of the text.
    """

    least_share: float
    known: str
    lighter: tuple[str, ...] = ()


PACKS = {
    "end_of_turn": PackRule(
        0, "NLL learned ends without one: their p went from 0.08 to 0.91 in 15 steps (ends of turns under DFT)"
    ),
    "tool_call": PackRule(0, "nine ways of weighting calls were no better than plain SFT (a minority that is the score)"),
    "reasoning": PackRule(0, "not in our experiments; SCALe-SFT does it (arXiv 2603.18656)", lighter=("thinking",)),
    "math_answer": PackRule(0, "19 : 1 moved the nll of answers by −0.07 ± 0.09 and that of the rest by +0.02 ± 0.01 (α steers)"),
    "code": PackRule(0, "not in our experiments"),
    "json": PackRule(0, "not in our experiments; on a part of a call it did not help (a minority that is the score)"),
    "numbers": PackRule(0.1, "as one of six classes under `class_mean` they changed by −0.03 ± 0.06 (controllers on real classes)"),
    "markdown": PackRule(0.05, "not in our experiments"),
}
"""Every shipped pack, the narrower ones first: that is the order of the classes. Any prose has some numbers and some markup."""

LEAST_ROWS = 0.02
"""Of the rows, in which a class has to be found: fewer are as likely a chance hit of its patterns, and no step to measure by."""

SAME_TEXT = 0.9
"""Of the tokens of `code`, from which the fenced code is JSON and `json` says more of it."""

WEIGHED = 2.0
"""α of what is asked for, the rest having 1. At 1.9 : 1 a class gained (nll −0.011 ± 0.006) and what the rest lost cannot be told
from chance (+0.002 ± 0.004); from 4 : 1 on the rest paid as much or more (α steers: `class_mean` 0.2, `weighted_mean` 0.8)."""

RARE, RARE_ALPHA = 0.05, 8.0
"""Below this share of the targets twice nothing is nothing; then what the pack `math_answer` suggests. Of a class of 2 %, 2.5 : 1
moved the nll by −0.007 ± 0.027, and 19 : 1 by −0.066 ± 0.093 (α steers: `answer`)."""

END = 2.0
"""α of the end of a turn beside another class's weight: with that it counts no less than under SFT. At 5 : 1 on calls without their
end, the end lost 0.22 ± 0.20 of its p (a minority that is the score)."""

MOSTLY = 0.8
"""Share of the targets from which a class is nearly all there is: twice the α is then 1.1 times the weight at most."""

MIN_WEIGHT = 0.1
"""Of DFT. Without it DFT wrote no call word for word and left ends of turns unlearned; with it neither can be told from NLL's, p is
higher by 0.04, and nll is, too (ends of turns under DFT)."""

NEW = MIDDLE_FROM
"""Mean p below which a class is new to the model, and DFT is not proposed whatever the mean of all is: it raises what was likely
and leaves what was not. Calls, whose form was new, it did not learn (DFT against its own step size)."""

KNOWN = 0.95
"""Mean p of a class from which a weight moves nothing: its tokens cost next to nothing already, −log 0.95 = 0.05 nats."""

_END = Key("end_of_turn", "end_of_turn")
_LIGHT, _HEAVY = 0.95, 1.05
_CALLS = "a minority that is the score"
_P = "(arXiv 2510.00526)"
_FLOOR = "a floor: without one DFT lost calls and ends of turns (docs/evidence.md)"


class Chosen(NamedTuple):
    """A class of the block: its name there, what it is, what it found, and how it is written."""

    name: str
    key: Key
    found: Found
    spec: Any


class Line(NamedTuple):
    """What is said of a key of the block, and where that stands."""

    key: str
    why: str


@dataclass(frozen=True)
class Proposal:
    """What to write, and why.

    Args:
        keys: `loss`, and perhaps `dft` and `dwl`, as in a config.
        classes: the classes of `dwl`.
        counts: tokens of each, and last of `rest`.
        why: a reason of each key that is not a class.
        advice: what else follows from the counts.
    """

    keys: dict[str, Any]
    classes: tuple[Chosen, ...]
    counts: tuple[int, ...]
    why: tuple[Line, ...]
    advice: tuple[str, ...] = ()


def choose(matches: Matches, own: Mapping[str, Any]) -> tuple[list[Chosen], list[str]]:
    """The classes to measure, narrow ones first, and why each other pack is not among them; `own`: those that the config has."""
    names = {_known(spec, matches) or Key("", name): name for name, spec in own.items()}
    keys, left_out = list(names), list[str]()
    for pack in _order(matches):
        if pack in matches.unseen:
            left_out.append(f"{pack}: cannot be looked for with this tokenizer: {matches.unseen[pack]}")
            continue
        members = [key for key in matches.of_pack(pack) if key not in names]
        alone_N = matches.any_of(members)
        new = matches.found(alone_N & ~matches.any_of(keys))
        if why := _too_little(pack, matches, matches.found(alone_N), new):
            if len(members) == len(matches.of_pack(pack)):
                left_out.append(f"{pack}: {why}")
            continue
        claimed = matches.claimed([*keys, *members])
        keys += [key for key in members if claimed[key].rows >= LEAST_ROWS * matches.rows]
    chosen = []
    for key, found in matches.claimed(keys).items():
        if key not in names:
            names[key] = key.name if key.name not in names.values() else f"{key.pack}_{key.name}"
        name = names[key]
        chosen.append(Chosen(name, key, found, own.get(name) or {"pack": str(key)}))
    return chosen, left_out


def _known(spec: Any, matches: Matches) -> Key | None:
    """The class of a shipped pack that a class of the config is."""
    pack, _, member = str(spec["pack"]).partition(".") if isinstance(spec, Mapping) and set(spec) == {"pack"} else ("", "", "")
    return key if (key := Key(pack, member)) in matches.matched else None


def _order(matches: Matches) -> list[str]:
    order = list(PACKS)
    code = matches.matched.get(Key("code", "code"))
    if code is not None and code.any() and (code & matches.any_of(matches.of_pack("json"))).sum() >= SAME_TEXT * code.sum():
        order.remove("json")
        order.insert(order.index("code"), "json")
    return order


def _too_little(pack: str, matches: Matches, alone: Found, new: Found) -> str:
    """Why a pack is left out, or nothing. `new`: what the classes before it leave."""
    least = PACKS[pack].least_share
    if not alone.tokens:
        return "matches nothing"
    which = _of(alone, matches)
    if new.tokens < alone.tokens / 10 or (new.rows < LEAST_ROWS * matches.rows <= alone.rows):
        return f"{which}, of which the classes above take all but {new.tokens:,}"
    if new.rows < LEAST_ROWS * matches.rows:
        return f"{which}; in less than {LEAST_ROWS:.0%} of the rows, so perhaps by chance"
    if new.tokens < least * matches.targets:
        left = f"{new.tokens / matches.targets:.1%} of the targets are left to it"
        return f"{which}; {left}, and any text has some: not below {least:.0%}"
    return ""


def _of(found: Found, matches: Matches) -> str:
    return f"{found.tokens:,} tokens ({found.tokens / max(matches.targets, 1):.1%}) in {found.rows:,} of {matches.rows:,} rows"


def weights_of(chosen: Sequence[Chosen], counts: Sequence[int], pack: str) -> tuple[dict[str, float], list[ClassWeight]]:
    """α with weight on the classes of `pack`, and what it does; raises `DWLError` where there is nothing to weigh, or against."""
    rule, targets = PACKS[pack], sum(counts)
    of_pack = [entry for entry in chosen if entry.key.pack == pack]
    if not of_pack:
        have = ", ".join(dict.fromkeys(entry.key.pack for entry in chosen if entry.key.pack)) or "none"
        raise DWLError(f"--weigh {pack}: this pack is not in what the rows speak for. Packs that are: {have}.")
    light = {entry.name for entry in of_pack if entry.key.name in rule.lighter}
    if rule.lighter:
        alpha = {entry.name: 1.0 if entry.name in light else WEIGHED for entry in chosen} | {REST: WEIGHED}
    else:
        share = sum(entry.found.tokens for entry in of_pack) / targets
        up = RARE_ALPHA if share < RARE and pack != _END.pack else WEIGHED
        alpha = {entry.name: up if entry.key.pack == pack else END if entry.key == _END else 1.0 for entry in chosen} | {REST: 1.0}
    heavy = sum(count for count, weight in zip(counts, alpha.values(), strict=True) if weight > 1) / targets
    if heavy >= MOSTLY or not any(weight == 1 for weight in alpha.values()):
        what = f"all but `{', '.join(light)}`" if light else f"`{pack}`"
        raise DWLError(
            f"--weigh {pack}: {heavy:.0%} of the targets are {what} and the ends of turns, so there is next to nothing to weigh "
            "them against: a weight would change little but the rest."
        )
    return alpha, class_weight_table("weighted_mean", list(alpha), list(alpha.values()), (*counts, targets, 1))


def propose(
    matches: Matches, chosen: Sequence[Chosen], raw: Mapping[str, Any], mean_p: Mapping[str, float] | None = None, weigh: str = ""
) -> Proposal:
    """The block, without a weight unless `weigh` names a pack.

    Args:
        matches: what was counted.
        chosen: by `choose`.
        raw: the config; of its `dwl` the classes are in `chosen`.
        mean_p: of each class and of "all", under the model as training begins; None where it was not measured.
        weigh: the pack whose tokens are to count more.
    """
    tokens = [entry.found.tokens for entry in chosen]
    counts = (*tokens, matches.targets - sum(tokens))
    classes = {entry.name: entry.spec for entry in chosen}
    kept = {key: value for key, value in (raw.get("dwl") or {}).items() if key in ("overlap", "data_weights") and value is not None}
    dwl = kept | ({"classes": classes} if classes else {})
    keys: dict[str, Any] = {}
    if weigh:
        alpha, table = weights_of(chosen, counts, weigh)
        keys = {"loss": "dwl", "dwl": dwl | {"reduction": "weighted_mean", "alpha": {n: _plain(a) for n, a in alpha.items()}}}
        why = list(_why_weights(weigh, alpha, table))
    else:
        loss, dft, because = _loss(raw, mean_p)
        why = [Line("loss", because), *([Line("dft", _FLOOR)] if dft.get("min_weight") else [])]
        keys = {"loss": loss, **({"dft": dft} if dft else {}), **({"dwl": dwl} if dwl else {})}
    return Proposal(keys, tuple(chosen), counts, tuple(why), tuple(_advice(chosen, matches.targets, keys["loss"], mean_p, weigh)))


def _loss(raw: Mapping[str, Any], mean_p: Mapping[str, float] | None) -> tuple[str, dict[str, Any], str]:
    """NLL or DFT with its options, and why, by mean p; a `loss: dft` stays where nothing speaks against it."""
    everything = None if mean_p is None else mean_p["all"]
    if raw.get("loss") == "dft":
        if everything is not None and not everything >= MIDDLE_FROM:
            return "nll", {}, f"mean p {everything:.2f} is below {MIDDLE_FROM:g}: NLL does as well as DFT, or better {_P}"
        dft = dict(raw.get("dft") or {})
        if dft.get("schedule") is None and dft.get("exponent") != 0 and not dft.get("min_weight"):
            dft["min_weight"] = MIN_WEIGHT
        return "dft", dft, "as the config has it; compare with `loss: nll`"
    if mean_p is None or everything is None:
        return "nll", {}, "plain SFT, measured by class: nothing here speaks for weights"
    if not everything >= STRONG:
        return "nll", {}, f"plain SFT, measured by class: mean p {everything:.2f}, and DFT won from {STRONG:g} on {_P}"
    if new := _new(mean_p):
        return "nll", {}, f"plain SFT, measured by class: DFT gives up what is new to the model ({', '.join(new)})"
    why = f"mean p {everything:.2f}, at least {STRONG:g}, and no class below {NEW:g}: DFT may do better {_P}"
    return "dft", {"min_weight": MIN_WEIGHT}, why


def _new(mean_p: Mapping[str, float]) -> list[str]:
    """Classes that the model does not believe in yet."""
    return [f"`{name}`" for name, p in mean_p.items() if name != "all" and p < NEW]


def _why_weights(pack: str, alpha: Mapping[str, float], table: Sequence[ClassWeight]) -> Iterator[Line]:
    heavy = [row for row in table if alpha[row.name] > 1]
    light = next(row for row in table if alpha[row.name] == 1)
    before, now = sum(row.token_share for row in heavy), sum(row.weight_share for row in heavy)
    yield Line("loss", f"weights because of --weigh {pack}; compare with `loss: nll`")
    yield Line("reduction", "only ratios of α count: the loss keeps the size that it has under SFT")
    least = min(row.weight for row in heavy)
    yield Line("alpha", f"above 1: {before:.0%} of tokens, {now:.0%} of weight; a token {least:.2f}×, with 1 {light.weight:.2f}×")


def _advice(chosen: Sequence[Chosen], targets: int, loss: str, mean_p: Mapping[str, float] | None, weigh: str) -> Iterator[str]:
    """What the counts, p and our experiments say beside the block."""
    packs = dict.fromkeys(entry.key.pack for entry in chosen if entry.key.pack and entry.key != _END)
    if loss == "nll" and all(entry.key == _END for entry in chosen):
        yield "there is nothing here but plain text and its ends: without this plugin it trains the same, and is not measured"
    for pack in [weigh] if weigh else packs:
        yield f"a weight on {pack}: {PACKS[pack].known}"
    if weigh:
        heavy = sum(entry.found.tokens for entry in chosen if entry.key.pack == weigh) / targets
        if not PACKS[weigh].lighter and heavy > 0.5:
            yield f"{heavy:.0%} of the tokens cannot count much more; what changes is that the others count less"
        if weigh != _END.pack:
            yield f"the end of a turn has α {END:g}: at 5 : 1 on calls, without it, it lost 0.22 ± 0.20 of its p ({_CALLS})"
    if loss == "dft":
        yield "DFT costs nll, and that of other text: keep it if what you score beats `loss: nll` (DFT against its own step size)"
    if mean_p is None:
        if not weigh:
            yield "p was not measured: with --model the model is loaded, and this tells whether the data is for DFT"
        return
    for entry in chosen:
        p = mean_p[entry.name]
        if p >= KNOWN:
            yield f"`{entry.name}` has a mean p of {p:.3f}: the model knows it, and a weight on it would move next to nothing"
        elif loss == "dft" and p < NEW:
            yield f"`{entry.name}` has a mean p of {p:.3f}, which plain DFT would hardly train: the floor is for such tokens"
        elif loss == "nll" and p < NEW and mean_p["all"] >= STRONG:
            yield f"`{entry.name}` has a mean p of {p:.3f}: it is what is to be learned here, and DFT would weigh it by that p"


def against(raw: Mapping[str, Any], block: Block, one_token: Mapping[str, float], matches: Matches) -> Proposal:
    """A proposal for a config whose `loss: dwl` has α: that stays, and the end of a turn counts no less than under SFT.

    `one_token`: what one token of each class counts at the start, where SFT's count 1.
    """
    own = [key for key in matches.matched if not key.pack]
    tokens = {key.name: found for key, found in matches.claimed(own).items()}
    rest = matches.targets - sum(found.tokens for found in tokens.values())
    counts = (*(found.tokens for found in tokens.values()), rest)
    specs = own_classes(raw, block)
    chosen = [Chosen(key.name, key, tokens[key.name], specs[key.name]) for key in own]
    keys = {key: raw[key] for key in Block.model_fields if raw.get(key) is not None}
    compare = "your `loss: dwl` stays; the run to compare with is `loss: nll` with the same classes"
    stays = Proposal(keys, tuple(chosen), counts, (), (compare,))
    ends_N = matches.matched.get(_END)
    if ends_N is None or not ends_N.any():
        return stays
    at = {key.name: int((ends_N & matches.matched[key]).sum()) for key in own}
    at[REST] = int(ends_N.sum()) - sum(at.values())
    home = max(at, key=lambda name: at[name])
    heaviest = max(one_token, key=lambda name: one_token[name])
    if one_token[home] >= _LIGHT or one_token[heaviest] <= _HEAVY:
        return stays
    told = (
        f"ends of turns are in `{home}`, where a token counts {one_token[home]:.2f}×, and in `{heaviest}` it counts "
        f"{one_token[heaviest]:.2f}×: at 5 : 1 on calls the end lost 0.22 ± 0.20 of its p ({_CALLS})"
    )
    alone = home != REST and at[home] >= SAME_TEXT * tokens[home].tokens
    if alone or block.reduction != "weighted_mean" or block.schedule or block.controller or block.overlap != "first":
        how = (
            f"give `{home}` more"
            if alone
            else "add `end_of_turn: {pack: end_of_turn.end_of_turn}` to the classes, and to α so that it counts 1×"
        )
        return Proposal(keys, tuple(chosen), counts, (), (compare, f"{told}; {how}"))
    alpha = dict(zip(block.class_names, _written(block), strict=True))
    needed = alpha[home] / one_token[home]
    digits = 1 - math.floor(math.log10(needed))
    name = _END.name if _END.name not in alpha else "turn_end"
    found = matches.found(ends_N)
    written = {name: {"pack": str(_END)}, **specs}
    new_alpha = {name: math.ceil(needed * 10**digits) / 10**digits, **alpha}
    dwl = {key: value for key, value in raw["dwl"].items() if key not in ("pack", "classes", "alpha", "reduction")}
    dwl |= {"classes": written, "reduction": block.reduction, "alpha": {key: _plain(value) for key, value in new_alpha.items()}}
    left = matches.claimed([_END, *own])
    all_chosen = (Chosen(name, _END, found, written[name]), *(entry._replace(found=left[entry.key]) for entry in chosen))
    shares = tuple(entry.found.tokens for entry in all_chosen)
    why = (
        Line("loss", "as the config has it; compare with `loss: nll`"),
        Line("alpha", f"`{name}` is new: it counted {one_token[home]:.2f}× in `{home}`, and now no less than under SFT"),
    )
    return Proposal({**keys, "dwl": dwl}, all_chosen, (*shares, matches.targets - sum(shares)), why, (compare, told))


def own_classes(raw: Mapping[str, Any], block: Block) -> dict[str, Any]:
    """The classes of a config as it writes them; those of its `pack` as members of that."""
    dwl = raw.get("dwl") or {}
    written = dwl.get("classes") or {}
    return {name: written.get(name) or {"pack": f"{dwl.get('pack')}.{name}"} for name in block.class_configs}


def _written(block: Block) -> list[float]:
    """α as the config has it, not normalised."""
    alpha = None if block.dwl is None else block.dwl.alpha
    return [1.0 if alpha is None else alpha[name] for name in block.class_names]


def _plain(value: float) -> float | int:
    """A number as a person writes it."""
    return int(value) if value == int(value) else value
