"""The YAML: `loss`, `dft` and `dwl` as frozen models. Every default lives here, once.

`parse` is the only way in. It takes the raw mapping, finds every problem before it raises, and returns a `Block` that
the rest of the package reads; `Block.dump` gives back a mapping that parses to the same block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

import regex
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from dwl_plugin.errors import ConfigError, Problem, did_you_mean

__all__ = [
    "IGNORE_INDEX",
    "REST",
    "BetweenClass",
    "Block",
    "ClassConfig",
    "CosineSchedule",
    "DFTConfig",
    "DWLConfig",
    "LinearSchedule",
    "LossName",
    "Position",
    "Reduction",
    "RegexClass",
    "Schedule",
    "TokenIdsClass",
    "TokenLossName",
    "TokenRegexClass",
    "TokensClass",
    "parse",
]

IGNORE_INDEX = -100
"""The label of a position that is no target."""

REST = "rest"
"""The class of every target token that no other class claims."""

LossName = Literal["nll", "dft", "dwl"]
TokenLossName = Literal["nll", "dft"]
Reduction = Literal["token_mean", "weighted_mean", "class_mean"]

_CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_POSITION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|ep)")
_TOKEN_ID = re.compile(r"(?P<first>\d+)(?:\s*-\s*(?P<last>\d+))?")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def _position(value: object) -> object:
    """A step (`200`), a share of the run (`10%`) or an epoch (`2ep`)."""
    if isinstance(value, bool):
        raise PydanticCustomError("dwl", "YAML read this as a boolean, not as a position")
    if isinstance(value, int):
        if value < 0:
            raise PydanticCustomError("dwl", "a step cannot be negative")
        return value
    if isinstance(value, float):
        raise PydanticCustomError(
            "dwl", f"is {value} a share of the run or a step? Write `{value * 100:g}%` or a whole number of steps"
        )
    match = _POSITION.fullmatch(str(value).strip())
    if match is None:
        raise PydanticCustomError(
            "dwl", "not a position: write steps (`200`), a share of the run (`10%`), epochs (`2ep`)"
        )
    if match["unit"] == "%" and float(match["number"]) > 100:
        raise PydanticCustomError("dwl", "past the end of the run: a share is at most `100%`")
    return f"{float(match['number']):g}{match['unit']}"


Position = Annotated[int | str, BeforeValidator(_position)]


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("dwl", "YAML read this as a boolean; a number is needed")
    return value


Weight = Annotated[float, BeforeValidator(_number)]


def _pattern(value: object) -> object:
    if value is None:
        raise PydanticCustomError(
            "dwl", "the pattern is empty: an unquoted `#` starts a YAML comment, so put the pattern in single quotes"
        )
    if isinstance(value, bool):
        raise PydanticCustomError("dwl", "YAML read this as a boolean; put the pattern in single quotes")
    if not isinstance(value, str):
        raise PydanticCustomError("dwl", "a pattern is a string; put it in single quotes")
    if value == "":
        raise PydanticCustomError("dwl", "an empty pattern matches nothing")
    try:
        regex.compile(value)
    except regex.error as error:
        position = getattr(error, "pos", None)
        at = "" if position is None else f" at position {position}, before {value[position : position + 12]!r}"
        why = f"{getattr(error, 'msg', error)}{at}"
        raise PydanticCustomError("dwl", "this does not compile: {why}", {"why": why}) from None
    return value


Pattern = Annotated[str, BeforeValidator(_pattern)]


def _text(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("dwl", "YAML reads yes, no, on, off, true and false as booleans: put it in quotes")
    if value is None or value == "":
        raise PydanticCustomError("dwl", "empty: an unquoted `#` starts a YAML comment, so put the text in quotes")
    return value


Text = Annotated[str, BeforeValidator(_text)]


def _token_id(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise PydanticCustomError("dwl", "a token id cannot be negative")
        return value
    match = _TOKEN_ID.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise PydanticCustomError(
            "dwl", 'a token id is a whole number (`11`) or a range with both ends in it (`"100-199"`)'
        )
    if match["last"] is not None and int(match["last"]) < int(match["first"]):
        raise PydanticCustomError("dwl", "the range ends before it begins")
    return f"{match['first']}-{match['last']}" if match["last"] is not None else int(match["first"])


TokenId = Annotated[int | str, BeforeValidator(_token_id)]


class DFTConfig(_Strict):
    """Token loss −sg(max(p^exponent, min_weight))·log p (arXiv 2508.05629 with the exponent of 2510.00526)."""

    exponent: Weight = Field(1.0, ge=0.0, description="a in the token weight p^a: 0 is plain NLL, 1 is DFT.")
    min_weight: Weight = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Floor of the token weight, so that tokens of tiny p (EOS, format) still learn.",
    )


class ClassConfig(_Strict):
    """What every class may say beside its selector."""

    token_loss: TokenLossName | None = Field(
        None,
        description="What a token of this class pays: nll (−log p) or dft (−sg(p)^a·log p). Default: dwl.token_loss.",
    )
    dft: DFTConfig | None = Field(
        None, description="Options of this class's dft token loss. Default: the top-level `dft`."
    )
    allow_empty: bool = Field(False, description="Do not stop when the class matches nothing in a sample of the data.")


class TokenIdsClass(ClassConfig):
    """Tokens by id."""

    token_ids: tuple[TokenId, ...] = Field(
        min_length=1, description='Ids and ranges with both ends in, e.g. [11, "100-199"].'
    )

    def ids(self) -> Iterator[int]:
        """Every id, ranges unrolled."""
        for item in self.token_ids:
            if isinstance(item, int):
                yield item
            else:
                first, last = item.split("-")
                yield from range(int(first), int(last) + 1)


class TokensClass(ClassConfig):
    """Tokens by their string; each must be exactly one token of the tokenizer."""

    tokens: tuple[Text, ...] = Field(min_length=1, description='Token strings, e.g. ["<|im_end|>"].')


class TokenRegexClass(ClassConfig):
    """Tokens whose own text matches a pattern in full."""

    token_regex: Pattern = Field(description="Python `regex` pattern; must match the whole of one token's text.")


class RegexClass(ClassConfig):
    """Tokens that overlap a match in the decoded text of a turn."""

    regex: Pattern = Field(description="Python `regex` pattern over the decoded text, searched per turn.")
    group: int | str = Field(0, description="The group of the match that counts; 0 is the whole match.")


class BetweenClass(ClassConfig):
    """Tokens in the span from an opening to a closing delimiter; an unclosed span ends with the sample."""

    between: tuple[Text, Text] = Field(description='Opening and closing delimiter, e.g. ["<think>", "</think>"].')
    include_delimiters: bool = Field(True, description="Count the delimiters themselves as members.")


_SELECTORS: dict[str, type[ClassConfig]] = {
    "token_ids": TokenIdsClass,
    "tokens": TokensClass,
    "token_regex": TokenRegexClass,
    "regex": RegexClass,
    "between": BetweenClass,
}


AnyClass = TokenIdsClass | TokensClass | TokenRegexClass | RegexClass | BetweenClass


class _Ramp(_Strict):
    """α moves on a straight line in the simplex, α(τ) = (1−s)·`alpha` + s·`to`, s rising from `start` to `end`."""

    to: dict[str, Weight] = Field(description="class -> proportion at the end; every class, `rest` too.")
    start: Position = Field(0, description="Where α begins to move: a step, `10%` of the run, or `2ep`.")
    end: Position = Field("100%", description="Where α arrives at `to`: a step, `90%` of the run, or `2ep`.")


class LinearSchedule(_Ramp):
    """s is the elapsed share of the way from `start` to `end`."""

    type: Literal["linear"]


class CosineSchedule(_Ramp):
    """s is (1 − cos(π·x))/2 of the elapsed share x."""

    type: Literal["cosine"]


_SCHEDULES: dict[str, type[_Ramp]] = {"linear": LinearSchedule, "cosine": CosineSchedule}


Schedule = LinearSchedule | CosineSchedule


class DWLConfig(_Strict):
    """Token classes, their weights α, and how the weights move."""

    token_loss: TokenLossName = Field("nll", description="What a token pays in every class that names none of its own.")
    classes: dict[str, AnyClass] = Field(
        default_factory=dict,
        description="name -> selector; the order is the priority, the first class that matches wins.",
    )
    overlap: Literal["first"] = Field("first", description="first: a token belongs to the first class that matches.")
    reduction: Reduction = Field(
        "token_mean", description="How token losses become one number; see the README's table."
    )
    alpha: dict[str, Weight] | None = Field(
        None, description="class -> proportion, `rest` included; normalised to sum to 1. Absent: uniform."
    )
    schedule: Schedule | None = Field(None, description="α as a function of the optimizer step.")


class Block(_Strict):
    """The three keys of a config that are ours, validated together."""

    loss: LossName
    dft: DFTConfig | None = None
    dwl: DWLConfig | None = None

    @property
    def class_configs(self) -> dict[str, ClassConfig]:
        """name -> selector in priority order, without `rest`."""
        return {} if self.dwl is None else dict(self.dwl.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Every class in the order of the class ids; `rest` is last."""
        return (*self.class_configs, REST)

    @property
    def reduction(self) -> Reduction:
        """token_mean unless `loss: dwl` says otherwise."""
        return self.dwl.reduction if self.loss == "dwl" and self.dwl is not None else "token_mean"

    @property
    def schedule(self) -> LinearSchedule | CosineSchedule | None:
        """The schedule of α, if there is one."""
        return None if self.dwl is None else self.dwl.schedule

    @property
    def alpha(self) -> tuple[float, ...]:
        """α at τ = 0 over `class_names`, normalised. All ones where the loss is not `dwl`: every token counts once."""
        if self.loss != "dwl":
            return (1.0,) * len(self.class_names)
        return self.on_simplex(self.dwl.alpha if self.dwl is not None else None)

    def on_simplex(self, proportions: Mapping[str, float] | None) -> tuple[float, ...]:
        """`proportions` over `class_names`, divided by their sum; uniform for None."""
        names = self.class_names
        values = [1.0 if proportions is None else proportions[name] for name in names]
        total = math.fsum(values)
        return tuple(value / total for value in values)

    @property
    def token_losses(self) -> tuple[DFTConfig, ...]:
        """exponent and floor of each class over `class_names`; NLL is exponent 0."""
        nll, dft = DFTConfig(exponent=0.0, min_weight=0.0), self.dft or DFTConfig.model_validate({})
        if self.loss != "dwl":
            return (nll if self.loss == "nll" else dft,) * len(self.class_names)
        default = self.dwl.token_loss if self.dwl is not None else "nll"
        per_class = []
        for spec in (*self.class_configs.values(), None):
            kind = default if spec is None or spec.token_loss is None else spec.token_loss
            own = None if spec is None else spec.dft
            per_class.append(nll if kind == "nll" else own if own is not None else dft)
        return tuple(per_class)

    def dump(self) -> dict[str, Any]:
        """Plain YAML types; `parse(block.dump()) == block`."""
        return self.model_dump(mode="json", exclude_none=True)


_KEYS = tuple(Block.model_fields)


def parse(raw: Mapping[str, Any]) -> Block | None:
    """Validate `loss`, `dft` and `dwl` of a config; other keys are not looked at.

    Returns None when the config has none of the three. Raises `ConfigError` with every problem found.
    """
    ours = {key: raw[key] for key in _KEYS if key in raw and raw[key] is not None}
    if not ours:
        return None
    if "loss" not in ours:
        which = " and ".join(f"`{key}`" for key in ours)
        raise ConfigError([
            Problem(next(iter(ours)), f"{which} without `loss` would change nothing", allowed=_or(LossName),
                    hint=f"add the line `loss: {'dwl' if 'dwl' in ours else 'dft'}`")
        ])  # fmt: skip
    problems = list(_yaml_traps(ours))
    dwl = ours.get("dwl")
    if isinstance(dwl, Mapping):
        # The model of a class or schedule is chosen by its key, here: a typo gives one error, not one per kind.
        chosen = dict(dwl)
        if isinstance(dwl.get("classes"), Mapping):
            built = {name: _class(spec, f"dwl.classes.{name}", problems) for name, spec in dwl["classes"].items()}
            chosen["classes"] = {str(name): model for name, model in built.items() if model is not None}
        if dwl.get("schedule") is not None:
            chosen["schedule"] = _schedule(dwl["schedule"], problems)
        block = _validate(Block, {**ours, "dwl": chosen}, "", problems)
    else:
        block = _validate(Block, ours, "", problems)
    problems += _cross_checks(ours, block if not problems else None)
    if problems or block is None:
        raise ConfigError(_unique(problems))
    return block


_Model = TypeVar("_Model", bound=BaseModel)


def _validate(model: type[_Model], raw: object, path: str, problems: list[Problem]) -> _Model | None:
    """`model` of `raw`; what is wrong with it goes to `problems`."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems += [_problem(item, model, path) for item in error.errors()]
        return None


def _class(spec: object, path: str, problems: list[Problem]) -> ClassConfig | None:
    if isinstance(spec, ClassConfig):
        return spec
    selectors = ", ".join(_SELECTORS)
    if not isinstance(spec, Mapping):
        problems.append(Problem(path, "a class is a mapping with one selector", spec, allowed=selectors))
        return None
    found = [key for key in _SELECTORS if key in spec]
    if len(found) == 1:
        return _validate(_SELECTORS[found[0]], spec, path, problems)
    if found:
        hint = "make them two classes"
        problems.append(Problem(path, f"a class has one selector, this one has {' and '.join(found)}", hint=hint))
        return None
    options = {*ClassConfig.model_fields, "group", "include_delimiters"}
    hints = [hint for key in spec if key not in options and (hint := did_you_mean(key, list(_SELECTORS)))]
    problems.append(Problem(path, "this class has no selector", dict(spec), allowed=selectors, hint=" ".join(hints)))
    return None


def _schedule(spec: object, problems: list[Problem]) -> Schedule | None:
    if isinstance(spec, _Ramp):
        return spec  # type: ignore[return-value]
    kinds = ", ".join(_SCHEDULES)
    kind = spec.get("type") if isinstance(spec, Mapping) else None
    if kind not in _SCHEDULES:
        hint = did_you_mean(kind, list(_SCHEDULES)) if kind is not None else "a schedule is a mapping with a `type`"
        problems.append(Problem("dwl.schedule.type", "not a known schedule", kind, allowed=kinds, hint=hint))
        return None
    return _validate(_SCHEDULES[kind], spec, "dwl.schedule", problems)  # type: ignore[return-value]


def _yaml_traps(ours: Mapping[str, Any]) -> Iterator[Problem]:
    """Keys that YAML turned into something that is not a string."""

    def walk(node: Any, path: str) -> Iterator[Problem]:
        if isinstance(node, Mapping):
            for key, value in node.items():
                if not isinstance(key, str):
                    hint = (
                        "YAML reads yes, no, on, off as booleans: put the name in quotes"
                        if isinstance(key, bool)
                        else f"put it in quotes: `'{key}'`"
                    )
                    yield Problem(path, "a key has to be a string", key, hint=hint)
                yield from walk(value, f"{path}.{key}")

    for key, value in ours.items():
        yield from walk(value, key)


def _cross_checks(ours: Mapping[str, Any], block: Block | None) -> list[Problem]:
    """What no single field can see. Runs on the raw mapping too, so that one typo does not hide the other problems."""
    problems: list[Problem] = []
    dwl = ours.get("dwl")
    if ours["loss"] == "dwl" and dwl is None:
        problems.append(
            Problem("dwl", "`loss: dwl` needs a `dwl` block", hint="name at least one class under `dwl.classes`")
        )
    if not isinstance(dwl, Mapping):
        dwl = {}
    classes = dwl.get("classes") if isinstance(dwl.get("classes"), Mapping) else {}
    assert isinstance(classes, Mapping)
    for name in classes:
        if name == REST:
            problems.append(
                Problem(f"dwl.classes.{name}", f"`{REST}` is always the class of unclaimed tokens; choose another name")
            )
        elif isinstance(name, str) and not _CLASS_NAME.fullmatch(name):
            problems.append(Problem("dwl.classes", "a class name is made of letters, digits and _", name))
    names = [*(str(name) for name in classes if name != REST), REST]
    schedule = dwl.get("schedule")
    problems += _alpha_problems("dwl.alpha", dwl.get("alpha"), names)
    if isinstance(schedule, Mapping):
        problems += _alpha_problems("dwl.schedule.to", schedule.get("to"), names)
        start, end = schedule.get("start", 0), schedule.get("end", "100%")
        if _ends_before_it_starts(start, end):
            problems.append(Problem("dwl.schedule.end", f"must come after `start`, which is {start}", end))
    if ours["loss"] in ("nll", "dft"):
        for key in ("alpha", "schedule", "reduction", "token_loss"):
            if dwl.get(key) is not None and not _is_default(key, dwl[key]):
                problems.append(Problem(
                    f"dwl.{key}", f"has no effect under `loss: {ours['loss']}`, where classes are only measured", dwl[key],
                    hint="write `loss: dwl`, or delete this line"))  # fmt: skip
        for name, spec in classes.items():
            for key in ("token_loss", "dft"):
                if isinstance(spec, Mapping) and spec.get(key) is not None:
                    problems.append(Problem(f"dwl.classes.{name}.{key}", f"has no effect under `loss: {ours['loss']}`",
                                            spec[key], hint="write `loss: dwl`, or delete this line"))  # fmt: skip
    if block is not None:
        problems += _useless_dft(block)
        problems += _groups(block)
    return problems


def _is_default(key: str, value: object) -> bool:
    return bool(value == DWLConfig.model_fields[key].default)


def _useless_dft(block: Block) -> Iterator[Problem]:
    """`dft` options where nothing pays dft: the user believes in a loss that is not there."""
    default = block.dwl.token_loss if block.dwl is not None and block.loss == "dwl" else block.loss
    used = default == "dft"
    for name, spec in block.class_configs.items():
        kind = spec.token_loss if spec.token_loss is not None else default
        used = used or kind == "dft"
        if spec.dft is not None and kind != "dft" and block.loss == "dwl":
            yield Problem(f"dwl.classes.{name}.dft", "this class pays nll, so the options do nothing",
                          hint="add `token_loss: dft` to the class, or delete `dft`")  # fmt: skip
    if block.dft is not None and not used:
        yield Problem("dft", "no token pays dft, so the options do nothing",
                      hint="write `loss: dft`, or `dwl.token_loss: dft`, or delete `dft`")  # fmt: skip


def _groups(block: Block) -> Iterator[Problem]:
    for name, spec in block.class_configs.items():
        if not isinstance(spec, RegexClass):
            continue
        compiled = regex.compile(spec.regex)
        known = set(range(compiled.groups + 1)) | set(compiled.groupindex)
        if spec.group not in known:
            yield Problem(f"dwl.classes.{name}.group", f"the pattern has {compiled.groups} group(s)", spec.group,
                          allowed=", ".join(str(group) for group in sorted(known, key=str)))  # fmt: skip


def _alpha_problems(path: str, alpha: object, names: list[str]) -> Iterator[Problem]:
    if alpha is None:
        return
    if not isinstance(alpha, Mapping):
        return  # the schema says so already
    for name in alpha:
        if name not in names:
            yield Problem(f"{path}.{name}", "no such class", allowed=", ".join(names), hint=did_you_mean(name, names))
    missing = [name for name in names if name not in alpha]
    if missing:
        yield Problem(path, f"every class needs a number; missing: {', '.join(missing)}",
                      hint="0 leaves a class out of the loss")  # fmt: skip
    numbers = {
        name: value for name, value in alpha.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    for name, value in numbers.items():
        if value < 0:
            yield Problem(f"{path}.{name}", "a weight cannot be negative", value, allowed="numbers from 0 up")
    if numbers and len(numbers) == len(alpha) and all(value == 0 for value in numbers.values()):
        yield Problem(
            path, "all weights are 0, so nothing would be trained", dict(alpha), hint="at least one must be above 0"
        )


def _ends_before_it_starts(start: object, end: object) -> bool:
    """Only positions of one unit can be compared before the length of the run is known."""
    try:
        units = [
            (str(_position(value)).lstrip("0123456789."), float(str(_position(value)).rstrip("%ep")))
            for value in (start, end)
        ]
    except PydanticCustomError:
        return False
    return units[0][0] == units[1][0] and units[0][1] >= units[1][1]


def _or(literal: Any) -> str:
    return ", ".join(map(str, get_args(literal)))


def _problem(item: Any, model: type[BaseModel], prefix: str) -> Problem:
    """One pydantic error as a `Problem`, with the location as the user wrote it."""
    path = prefix
    for part in item["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    hint, allowed = "", ""
    if item["type"] == "missing":
        return Problem(path, "is required")
    if item["type"] == "extra_forbidden":
        nested: dict[str, type[BaseModel]] = {"dft": DFTConfig, "dwl": DWLConfig}
        owner = nested.get(str(item["loc"][-2]), model) if len(item["loc"]) > 1 else model
        known = list(owner.model_fields)
        return Problem(path, "unknown key", item["input"], ", ".join(known), did_you_mean(item["loc"][-1], known))
    if item["type"] == "literal_error":
        allowed = str(item["ctx"]["expected"]).replace("'", "").replace(" or ", ", ")
        return Problem(
            path, "not a known value", item["input"], allowed, did_you_mean(item["input"], allowed.split(", "))
        )
    return Problem(path, item["msg"], item["input"], allowed, hint)


def _unique(problems: list[Problem]) -> list[Problem]:
    """One problem per place: the schema and a cross-check may have seen the same thing."""
    first: dict[str, Problem] = {}
    for problem in problems:
        if not any(path.startswith(f"{problem.path}[") for path in first):  # a bad item empties its list: say one thing
            first.setdefault(problem.path, problem)
    return list(first.values())
