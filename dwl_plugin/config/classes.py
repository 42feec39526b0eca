"""Classes: a name, one selector, and what its tokens pay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, create_model

from dwl_plugin.classes.selectors import SELECTORS, SelectorConfig, one_of
from dwl_plugin.errors import Problem
from dwl_plugin.loss.token_losses import TOKEN_LOSSES, DFTConfig, TokenLossName
from dwl_plugin.values import REST

__all__ = ["CLASSES", "ClassConfig", "Classes", "may_be_empty", "name_problems", "with_token_losses"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_Model = TypeVar("_Model", bound=BaseModel)


def with_token_losses(model: type[_Model], description: str) -> type[_Model]:
    """`model` with the options of each token loss, but those of dft, whose place is another."""
    fields: dict[str, Any] = {
        name: (loss.Options | None, Field(None, description=description.format(name)))
        for name, loss in TOKEN_LOSSES.items()
        if name != "dft"
    }
    return create_model(model.__name__, __base__=model, **fields)


class _TokenLoss(SelectorConfig):
    token_loss: TokenLossName | None = Field(
        None, description=f"What a token of this class pays: {', '.join(('nll', *TOKEN_LOSSES))}. Default: dwl.token_loss."
    )
    dft: DFTConfig | None = Field(None, description="Options of this class's dft token loss. Default: the top-level `dft`.")


if not TYPE_CHECKING:
    _TokenLoss = with_token_losses(_TokenLoss, "Options of this class's {0} token loss. Default: `dwl.{0}`.")


class ClassConfig(_TokenLoss):
    """What every class may say beside its selector."""

    allow_empty: bool = Field(False, description="Do not stop when the class matches nothing in a sample of the data.")


def _with_options(selector: type[Any]) -> type[ClassConfig]:
    name = selector.__name__.replace("Selector", "Class")
    return create_model(name, __base__=(ClassConfig, selector), __doc__=selector.__doc__, __module__=__name__)


CLASSES: dict[str, type[ClassConfig]] = {key: _with_options(selector) for key, selector in SELECTORS.items()}
"""By the key of the selector."""

globals().update({model.__name__: model for model in CLASSES.values()})  # where pickle looks for them


def _by_name(classes: Any) -> Any:
    """With names for keys, also where YAML read a number or a boolean, which is reported with all such keys."""
    return {str(name): spec for name, spec in classes.items()} if isinstance(classes, Mapping) else classes


if TYPE_CHECKING:
    Classes = dict[str, ClassConfig]
else:
    Classes = Annotated[dict[str, one_of(CLASSES, "a class")], BeforeValidator(_by_name)]


def may_be_empty(classes: Mapping[str, ClassConfig]) -> frozenset[str]:
    """Names of the classes that say `allow_empty: true`."""
    return frozenset(name for name, config in classes.items() if config.allow_empty)


def name_problems(classes: Iterable[object], path: str = "dwl.classes") -> Iterator[Problem]:
    """Names that are taken or that no log could hold."""
    for name in classes:
        if name == REST:
            why = f"`{REST}` is always the class of unclaimed tokens"
            yield Problem(f"{path}.{name}", why, hint=f"choose another name; what `{REST}` counts stands under `alpha`")
        elif isinstance(name, str) and not _NAME.fullmatch(name):
            fit = re.sub(r"\W", "_", name, flags=re.ASCII)
            hint = f"write `{fit}:`" if _NAME.fullmatch(fit) else ""
            yield Problem(path, "a class name is made of letters, digits and _, and begins with no digit", name, hint=hint)
