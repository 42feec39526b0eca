"""What a run was made of, as `dwl_config.yaml` keeps it beside the settings of the loss, for people and `dwl report`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["MOST_KEPT_BYTES", "RESOLVED_CONFIG", "BatchSize", "Record", "Source"]

RESOLVED_CONFIG = "dwl_config.yaml"
MOST_KEPT_BYTES = 256 << 10
"""Of that file: PyYAML takes seconds for it."""

Count = Annotated[int, Field(ge=1, le=10**15)]


@dataclass(frozen=True)
class Source:
    """What only the config of the host tells: paths of the data, its packs and the files that it reads with their sha256 (None of
    what was not hashed), and all of its keys but ours."""

    data: list[str]
    packs: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str | None] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


class BatchSize(BaseModel):
    """Rows of an optimizer step: those of a micro-batch × accumulated micro-batches × ranks with data of their own."""

    micro: Count
    accumulation: Count
    ranks: Count


class Record(BaseModel):
    """Under `run` in the file. What is not known is None; a later version may write more."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    began: str | None = None
    resumed_at_step: Count | None = None
    model: str | None = None
    model_commit: str | None = None
    data: list[str] | None = None
    rows: Count | None = None
    learning_rate: float | None = None
    batch: BatchSize | None = None
    versions: dict[str, str] | None = None
    packs: dict[str, str] | None = None
    files: dict[str, str | None] | None = None

    def dump(self) -> dict[str, Any]:
        """Plain YAML types."""
        return {key: value for key, value in self.model_dump(mode="json").items() if value is not None and value != {}}

    def facts(self) -> dict[str, str]:
        """The same in words, by name."""
        batch, told = self.batch, None
        if batch is not None:
            rows = batch.micro * batch.accumulation * batch.ranks
            ranks = "1 rank" if batch.ranks == 1 else f"{batch.ranks} ranks"
            told = f"{rows:,} rows ({batch.micro} × {batch.accumulation} accumulated × {ranks})"
        resumed = f", resumed at step {self.resumed_at_step:,}" if self.resumed_at_step else ""
        facts = {
            "model": self.model,
            "data": None if self.data is None else ", ".join(self.data),
            "rows": None if self.rows is None else f"{self.rows:,}",
            "learning rate": None if self.learning_rate is None else f"{self.learning_rate}",
            "batch": told,
            "began": None if self.began is None else f"{self.began.replace('T', ' ')}{resumed}",
            "with": ", ".join(f"{name} {number}" for name, number in (self.versions or {}).items()) or None,
        }
        return {name: fact for name, fact in facts.items() if fact is not None}
