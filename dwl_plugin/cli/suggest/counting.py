"""What every shipped pack matches in the rows, and what the tokenizer puts there.

Suffixes: K classes, N targets of all rows, T tokens of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dwl_plugin.classes import build_labeller, trained_on
from dwl_plugin.classes.selectors import BetweenSelector, walk
from dwl_plugin.classes.token_bytes import added_ids, special_ids
from dwl_plugin.cli.analysis import LookedAt
from dwl_plugin.config.pack_files import PackReference, shipped_packs
from dwl_plugin.config.packs import PackLibrary
from dwl_plugin.errors import DWLError, first_line
from dwl_plugin.values import REST

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Found", "Key", "Matches", "Structure", "matches_in", "structure_of"]


class Key(NamedTuple):
    """A class of a pack, or of the config itself, where there is no pack."""

    pack: str
    name: str

    def __str__(self) -> str:
        return f"{self.pack}.{self.name}" if self.pack else self.name


class Found(NamedTuple):
    """Targets of a class, and rows with one."""

    tokens: int
    rows: int


@dataclass(frozen=True)
class Matches:
    """Which targets each class matches.

    Args:
        matched: (N,) for each class: those it matches; the classes of one pack, and those of the config, share none.
        row_N: the row of each target.
        rows: how many rows there are.
        unseen: packs that cannot be looked for with this tokenizer, and why.
    """

    matched: Mapping[Key, NDArray[np.bool_]]
    row_N: NDArray[np.int64]
    rows: int
    unseen: Mapping[str, str]

    @property
    def targets(self) -> int:
        return len(self.row_N)

    def of_pack(self, pack: str) -> list[Key]:
        """The classes of a pack in their order; of the config itself for ""."""
        return [key for key in self.matched if key.pack == pack]

    def any_of(self, keys: Iterable[Key]) -> NDArray[np.bool_]:
        """(N,) the targets that one of them matches."""
        found_N = np.zeros(self.targets, np.bool_)
        for key in keys:
            found_N |= self.matched[key]
        return found_N

    def claimed(self, keys: Sequence[Key]) -> dict[Key, Found]:
        """What each has where the first that matches a token keeps it."""
        left_N, found = np.ones(self.targets, np.bool_), dict[Key, Found]()
        for key in keys:
            found[key] = self.found(self.matched[key] & left_N)
            left_N &= ~self.matched[key]
        return found

    def found(self, tokens_N: NDArray[np.bool_]) -> Found:
        return Found(int(tokens_N.sum()), len(np.unique(self.row_N[tokens_N])))


class Structure(NamedTuple):
    """What is trained of the tokenizer's own tokens.

    `turns` are runs of targets; `control` has the special and added tokens among the targets and how often each stands there;
    `tags` the marks of packs that stand in trained text without being one token: how many tokens each is, and in how many rows.
    """

    turns: int
    control: dict[str, int]
    tags: dict[str, Found]


def matches_in(seen: LookedAt) -> Matches:
    """The classes of the config and of every shipped pack, looked for in the rows."""
    samples = seen.rows.samples
    trained = [trained_on(sample) for sample in samples]
    row_N = np.repeat(np.arange(len(samples)), [int(trained_T.sum()) for trained_T in trained])
    matched, unseen = dict[Key, "NDArray[np.bool_]"](), dict[str, str]()
    if seen.labeller is not None:
        members_KN = np.concatenate([seen.members(sample)[:, own_T] for sample, own_T in zip(samples, trained, strict=True)], 1)
        matched |= {Key("", name): row for name, row in zip(seen.class_names, members_KN, strict=True) if name != REST}
    rows = [(sample["input_ids"], sample["labels"], sample.get("position_ids")) for sample in samples]
    for name in shipped_packs():
        classes = PackLibrary(None).pack(PackReference(name), "").classes
        try:
            labeller = build_labeller(classes, seen.tokenizer, may_be_empty=frozenset(classes))
            ids_N = np.concatenate([ids_T[own_T] for ids_T, own_T in zip(labeller.label_samples(rows), trained, strict=True)])
        except DWLError as error:  # a tokenizer whose tokens have no known text, a pattern that backtracks on a row
            unseen[name] = first_line(error)
            continue
        matched |= {Key(name, member): ids_N == index for index, member in enumerate(classes)}
    return Matches(matched, row_N, len(samples), unseen)


def structure_of(tokenizer: Any, samples: Iterable[Mapping[str, Any]]) -> Structure:
    """Turns, the tokenizer's own tokens among the targets, the most frequent first, and marks that are several tokens."""
    own = {*special_ids(tokenizer), *added_ids(tokenizer)}
    turns, control, rows = 0, Counter[int](), Counter[str]()
    sizes = {tag: len(tokenizer.encode(tag, add_special_tokens=False)) for tag in _tags()}
    for sample in samples:
        trained_T = trained_on(sample)
        turns += int(np.diff(trained_T.astype(np.int8), prepend=0).clip(0).sum())
        ids = np.asarray(sample["input_ids"])[trained_T].tolist()
        control.update(token_id for token_id in ids if token_id in own)
        text = tokenizer.decode(ids)
        rows.update(tag for tag, size in sizes.items() if size > 1 and tag in text)
    names = {str(tokenizer.convert_ids_to_tokens(token_id)): count for token_id, count in control.most_common()}
    return Structure(turns, names, {tag: Found(sizes[tag], count) for tag, count in rows.most_common()})


def _tags() -> list[str]:
    """What stands around thoughts and calls, in any model family."""
    packs = [PackLibrary(None).pack(PackReference(name), "") for name in ("reasoning", "tool_call")]
    selectors = (selector for pack in packs for config in pack.classes.values() for _, selector in walk(config, ""))
    marks = (tag for selector in selectors if isinstance(selector, BetweenSelector) for tag in selector.between if len(tag) > 3)
    return list(dict.fromkeys(marks))
