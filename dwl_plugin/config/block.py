"""The whole block: every default of ours lives in a field of these models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from dwl_plugin.alpha.controllers import ControllerConfig, ControllerOptions
from dwl_plugin.alpha.schedules import Schedule, ScheduleOptions
from dwl_plugin.classes.selectors import DatasetSelector, MarkedSelector, marks_in, walk
from dwl_plugin.config.classes import ClassConfig, Classes, with_token_losses
from dwl_plugin.loss.token_losses import TOKEN_LOSSES, DFTConfig, TokenLossConfig, TokenLossName, TokenLossOptions
from dwl_plugin.values import REST, SAMPLE_POWERS, Overlap, Reduction, Strict, Text, Weight, invalid

__all__ = ["USUAL_NAMES", "Block", "DWLConfig", "DataWeights", "LossName"]

LossName = Literal["nll", "dft", "dwl"]


class DataWeights(Strict):
    """Where the data says what its tokens count: the names of its fields. A token's factor is the product of those it has."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    row: Text | None = Field(None, description="Column with the factor of all tokens of a row.")
    message: Text | None = Field(None, description="Key of a message with the factor of its tokens.")
    part: Text | None = Field(None, description="Key of a content part with the factor of its tokens.")
    token: Text | None = Field(None, description="Column of tokenised rows with a factor for each token.")
    allow_negative: bool = Field(
        False,
        description="Factors below 0: such a token pays |factor| · −log(1 − p), which pushes its p down and lets go of it as "
        "p -> 0 (unlikelihood). Without this they are refused: −log p times a negative number has no lower bound.",
    )

    @property
    def names(self) -> dict[str, str]:
        """row, message, part and token -> the name of its field, of those that are asked for."""
        return {place: name for place in USUAL_NAMES if (name := getattr(self, place)) is not None}


USUAL_NAMES = {"row": "weight", "message": "weight", "part": "weight", "token": "token_weight"}
"""What `data_weights: true` stands for."""


def _data_weights(value: object) -> object:
    if isinstance(value, bool):
        return USUAL_NAMES if value else None
    allowed = f"true, or {', '.join(DataWeights.model_fields)}"
    if value is not None and not isinstance(value, (Mapping, DataWeights)):
        wants_all = isinstance(value, str) and value.lower() in ("true", "yes", "on")
        example = "write it without quotes: `data_weights: true`" if wants_all else "for example `data_weights: {row: weight}`"
        raise invalid("is `true`, or a mapping to the names of fields in the data", allowed, example)
    if isinstance(value, Mapping):
        if set(value) == {"allow_negative"}:
            return {**USUAL_NAMES, **value}
        if set(value) <= DataWeights.model_fields.keys() and all(value.get(place) is None for place in USUAL_NAMES):
            raise invalid("names no field of the data", allowed, "`data_weights: true` names `weight` and `token_weight`")
    return value


def _or_boolean(schema: dict[str, Any]) -> None:
    schema["anyOf"].append({"type": "boolean"})


_PACKS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}


class _TokenLoss(Strict):
    pack: Annotated[Any, WithJsonSchema(_PACKS)] = Field(  # what is wrong with it is told while it is replaced
        None,
        description="A pack, or a list of packs in order of priority, whose classes, suggested α and reduction are taken; what "
        "stands beside it wins, of α class by class. Replaced by them when the config is parsed.",
    )
    token_loss: TokenLossName = Field("nll", description="What a token pays in every class that names none of its own.")


if not TYPE_CHECKING:
    _TokenLoss = with_token_losses(_TokenLoss, "Options of the {} token loss.")


class DWLConfig(_TokenLoss):
    """Token classes, their weights α, and how the weights move."""

    classes: Classes = Field(
        default_factory=dict, description="name -> selector; the order is the priority, the first class that matches wins."
    )
    overlap: Overlap = Field(
        "first",
        description="first: a token belongs to the first class that matches. sum: to every class that matches, and pays in each.",
    )
    data_weights: Annotated[DataWeights | None, BeforeValidator(_data_weights)] = Field(
        None,
        description="Factors that come with the data and multiply what a token pays. true: `weight` of a row, a message and a "
        "content part, and the column `token_weight`.",
        json_schema_extra=_or_boolean,
    )
    reduction: Reduction = Field("token_mean", description="What token losses are divided by, so that they become one number.")
    alpha: dict[str, Weight] | None = Field(
        None, description="class -> proportion, `rest` included; normalised to sum to 1. Absent: uniform."
    )
    schedule: Schedule | None = Field(None, description="α as a function of the optimizer step.")
    controller: ControllerConfig | None = Field(None, description="α from what the classes cost.")


class Block(Strict):
    """The three keys of a config that are ours, validated together."""

    loss: LossName = Field(
        description="nll: the host's own loss, measured. dft: Dynamic Fine-Tuning. dwl: classes of tokens with weights α."
    )
    dft: DFTConfig | None = Field(None, description="Options of the dft token loss.")
    dwl: DWLConfig | None = Field(None, description="Token classes, their weights α, and how they move.")

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
    def writes_reduction(self) -> bool:
        """Whether `reduction` was written, by the config or its pack, and is not only the default."""
        return self.dwl is not None and "reduction" in self.dwl.model_fields_set

    @property
    def labels_tokens(self) -> bool:
        """Whether batches carry class ids: there are classes or factors, or samples have to be counted."""
        return bool(self.class_configs) or self.weighs_tokens or self.reduction == "sequence_mean_token_sum"

    @property
    def data_weights(self) -> DataWeights | None:
        """Where the data has factors, if it has any."""
        return None if self.dwl is None else self.dwl.data_weights

    @property
    def marks(self) -> tuple[str, ...]:
        """Names of the marks that classes ask for, in the order of their bits."""
        return marks_in(self.class_configs)

    @property
    def reads_data(self) -> bool:
        """Whether rows have to say more of their tokens than ids and labels: factors, marks or their data set."""
        selectors = (selector for config in self.class_configs.values() for _, selector in walk(config, ""))
        return self.data_weights is not None or any(
            isinstance(selector, (MarkedSelector, DatasetSelector)) for selector in selectors
        )

    @property
    def sample_power(self) -> float:
        """The power of the number of its sample's targets by which each token is divided; 0 unless the reduction is by sample."""
        return SAMPLE_POWERS.get(self.reduction, 0.0)

    @property
    def weighs_tokens(self) -> bool:
        """Whether class ids carry factors."""
        return self.reads_data or self.sample_power > 0

    @property
    def dft_paths(self) -> tuple[str, ...]:
        """Where the `dft` of each of `class_names` stands in the YAML."""
        own = {name: spec.dft for name, spec in self.class_configs.items()}
        return tuple("dft" if own.get(name) is None else f"dwl.classes.{name}.dft" for name in self.class_names)

    @property
    def schedules(self) -> dict[str, ScheduleOptions]:
        """Every schedule by its path: α's, and those of dft's numbers."""
        found = {"dwl.schedule": self.schedule}
        for path, loss in zip(self.dft_paths, self.token_losses, strict=True):
            found[f"{path}.schedule"] = loss.schedule if isinstance(loss, DFTConfig) else None
        return {path: options for path, options in found.items() if options is not None}

    @property
    def moves(self) -> bool:
        """Whether anything changes over the run, so that its length matters."""
        return bool(self.schedules) or self.controller is not None

    @property
    def overlap(self) -> Overlap:
        """Whether a token is in one class or in every class that matches."""
        return "first" if self.dwl is None else self.dwl.overlap

    @property
    def schedule(self) -> ScheduleOptions | None:
        """The schedule of α, if there is one."""
        return None if self.dwl is None else self.dwl.schedule

    @property
    def controller(self) -> ControllerOptions | None:
        """What moves α by the losses, if anything does."""
        return None if self.dwl is None else self.dwl.controller

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
    def token_losses(self) -> tuple[TokenLossConfig, ...]:
        """What each class pays, over `class_names`; nll is dft with exponent 0."""
        if self.loss != "dwl":
            return (self._token_loss(self.loss, None),) * len(self.class_names)
        default = self.dwl.token_loss if self.dwl is not None else "nll"
        return tuple(
            self._token_loss(default if spec is None or spec.token_loss is None else spec.token_loss, spec)
            for spec in (*self.class_configs.values(), None)
        )

    @property
    def anchors(self) -> tuple[float, ...]:
        """λ of each class's KL to the base model, over `class_names`."""
        return tuple(getattr(token_loss, "anchor", 0.0) for token_loss in self.token_losses)

    def _token_loss(self, name: str | TokenLossOptions, spec: ClassConfig | None) -> TokenLossConfig:
        """The options of a class's own block, of the whole block, or the defaults."""
        if isinstance(name, TokenLossOptions):
            return name
        if name == "nll":
            return DFTConfig.model_validate({"exponent": 0.0})
        whole = self.dft if name == "dft" else getattr(self.dwl, name)
        found: TokenLossConfig | None = getattr(spec, name, None) or whole
        return found or TOKEN_LOSSES[name].Options.model_validate({})

    def dump(self) -> dict[str, Any]:
        """Plain YAML types; `parse(block.dump()) == block`."""
        return self.model_dump(mode="json", exclude_none=True)
