"""The one error family: what a message must tell is where, what was received, what is allowed, how to fix it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import regex

__all__ = [
    "PREFIX",
    "ConfigError",
    "DWLError",
    "LossNotTakenError",
    "NotFiniteError",
    "Problem",
    "RunError",
    "closest",
    "did_you_mean",
    "first_line",
    "printable",
    "shortened",
]

PREFIX = "[dwl]"
"""In front of what is printed, or raised, in the middle of a host's own output."""

_ABSENT: Any = object()

_UNSEEN = regex.compile(r"[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]")


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a config: `path` is the YAML path, e.g. ``dwl.alpha.nubmer``; `line` stands in a file that is no YAML."""

    path: str
    message: str
    value: Any = _ABSENT
    allowed: str = ""
    hint: str = ""
    line: str = ""

    @property
    def has_value(self) -> bool:
        """Whether `value` is something that was received; None may be."""
        return self.value is not _ABSENT

    def __str__(self) -> str:
        received = f" (got {shortened(self.value)})" if self.has_value else ""
        line = [f"    {self.line}"] if self.line else []
        allowed = [f"    allowed: {self.allowed}"] if self.allowed else []
        hint = [f"    hint: {self.hint}"] if self.hint else []
        return "\n".join(map(printable, (f"{self.path}: {self.message}{received}", *line, *allowed, *hint)))


class DWLError(Exception):
    """Base of every error this package raises on purpose.

    Not a ValueError: pydantic would wrap one raised inside the host's schema and bury the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, keep="\n\t"))  # hosts print it as it is


class ConfigError(DWLError):
    """The config cannot be run; holds every `Problem` that was found, not only the first."""

    problems: tuple[Problem, ...]

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        if isinstance(problems, str):  # a data loader rebuilds its worker's error from the text alone
            self.problems = ()
            super().__init__(problems)
            return
        self.problems = tuple(problems)
        super().__init__(f"{PREFIX} {self.told(' in the config; nothing was trained.')}")

    def told(self, where: str = "") -> str:
        """Every problem, below how many there are; a command that trains nothing anyway says no more of it."""
        count = len(self.problems)
        return "\n".join([f"{count} problem{'s' if count != 1 else ''}{where}", *map(str, self.problems)]).replace("\n", "\n  ")

    @classmethod
    def at(cls, path: str, message: str, value: Any = _ABSENT, allowed: str = "", hint: str = "") -> ConfigError:
        """An error of one `Problem`."""
        return cls([Problem(path, message, value, allowed, hint)])

    @classmethod
    def raise_any(cls, problems: Iterable[Problem]) -> None:
        """Raise all of `problems` at once, if there is one."""
        if found := list(problems):
            raise cls(found)

    def __reduce__(self) -> tuple[Any, ...]:  # raised in loader workers, so it has to survive pickling
        return (type(self), (self.problems,))


class RunError(DWLError):
    """What stops a run that has begun; the message gets the prefix."""

    def __init__(self, message: str) -> None:
        # Unpickled, or raised again by a data loader around the text of its worker's error, it has the prefix already.
        super().__init__(message if PREFIX in message else f"{PREFIX} {message}")


class LossNotTakenError(RunError):
    """A step ended and the configured loss was not the one that was computed."""


class NotFiniteError(RunError):
    """The loss became infinite or NaN; nothing was saved since."""


def did_you_mean(word: object, known: Sequence[str]) -> str:
    """A hint naming the known word that is a slip of the fingers away, or an empty string.

    A word with other digits is another word: `load_in_16bit` is no slip of `load_in_8bit`.
    """
    name = closest(word, known)
    return f"did you mean `{name}`?" if name else ""


def closest(word: object, known: Sequence[str]) -> str:
    """The known word that `did_you_mean` names."""
    given = _plain(word)
    allowed = (len(given) > 1) + (len(given) > 9)
    near = [(plain, name) for name in known if abs(len(plain := _plain(name)) - len(given)) <= allowed]
    close = [(_slips(given, plain), name) for plain, name in near if _digits(plain) == _digits(given)]
    slips, nearest = min(close, default=(allowed + 1, ""))
    return nearest if slips <= allowed else ""


def _plain(word: object) -> str:
    """Without what people write differently: capitals, and what joins words."""
    return re.sub("[-_ ]", "", str(word).lower())


def _digits(word: str) -> list[str]:
    return re.findall(r"\d", word)


def _slips(a: str, b: str) -> int:
    """The least number of letters to put in, to leave out, to replace, or to swap with their neighbours."""
    rows = [list(range(len(b) + 1))]
    for i in range(1, len(a) + 1):
        rows.append([i])
        for j in range(1, len(b) + 1):
            least = min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 2 : i] == b[j - 1] + b[j - 2]:
                least = min(least, rows[i - 2][j - 2] + 1)
            rows[i].append(least)
    return rows[-1][-1]


def printable(text: str, keep: str = "") -> str:
    """`text` with what drives a terminal, turns text around or ends a line shown by its number, as ‹1b›; not what is in `keep`."""
    return _UNSEEN.sub(lambda match: match[0] if match[0] in keep else f"‹{ord(match[0]):02x}›", text)


def shortened(value: Any, limit: int = 120) -> str:
    """`value` as Python writes it, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def first_line(error: BaseException) -> str:
    """What an error of others says, in one line of bounded length."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) < 300 else lines[0][:299] + "…"
