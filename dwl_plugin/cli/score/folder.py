"""What `dwl score` leaves in its folder, and how a run that was cut off finds its way back.

rows/00000.parquet …   the rows, in the order of the data; each file is written whole, and has the digest of the rows it is of
rows.csv               one line for each row, the hardest first
score.json             digests of all that the scores depend on; the folder belongs to these settings alone
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from dwl_plugin.errors import DWLError
from dwl_plugin.files import read_regular, write_whole

__all__ = ["Folder", "digest_of", "weights_of"]

_FORMAT = 1
_SETTINGS, _CSV, _ROWS = "score.json", "rows.csv", "rows"
_DIGEST = b"dwl_rows"
_WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
_MAX_BYTES = 1 << 20


class Folder:
    """The folder of one scoring. Raises `DWLError` where it is not to be written to: it has files of others, or other settings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows, self.csv = path / _ROWS, path / _CSV
        begun = (path / _SETTINGS).is_file()
        if path.is_dir() and not begun and any(not file.name.startswith(".") for file in path.iterdir()):
            raise DWLError(f"{path} has files in it that `dwl score` did not write. Name another folder with --out.")

    def belongs_to(self, settings: Mapping[str, Any]) -> None:
        """Take the folder for `settings`, texts and mappings of texts; raise where it was begun with others."""
        settings = {"format": _FORMAT, **settings}
        file = self.path / _SETTINGS
        if file.is_file():
            try:
                before = json.loads(read_regular(file, _MAX_BYTES))
            except ValueError as error:
                raise DWLError(f"{file} is not what `dwl score` wrote: {error}. Name another folder with --out.") from error
            if others := _differing(before if isinstance(before, dict) else {}, settings):
                what = f"what differs is {', '.join(others)}"
                raise DWLError(f"{self.path} was begun with other settings: {what}. Name another folder with --out.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not file.is_file():
                write_whole(file, (json.dumps(settings, indent=1) + "\n").encode())
            self.rows.mkdir(exist_ok=True)
        except OSError as error:
            raise DWLError(f"{self.path} cannot be made: {error.strerror}. Name another folder with --out.") from error

    def has(self, part: int, digest: str) -> bool:
        """Whether a part is there. Raises `DWLError` if it is of other rows."""
        file = self._file(part)
        try:
            found = (pq.read_schema(file).metadata or {}).get(_DIGEST, b"").decode()
        except (OSError, pa.ArrowInvalid):
            return False
        if found != digest:
            raise DWLError(f"The data is no longer that of {file}. Name another folder with --out, or delete this one.")
        return True

    def write(self, part: int, digest: str, table: pa.Table) -> None:
        """The same table gives the same bytes."""
        out = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({_DIGEST: digest}), out, compression="zstd")
        write_whole(self._file(part), out.getvalue().to_pybytes())

    def finish(self, parts: int) -> pa.Table:
        """Figures of each row, the hardest first, which are written down as well. Raises `DWLError` for a file too many."""
        for left in self.rows.glob(".*"):  # of a run that was killed while it wrote
            left.unlink()
        if more := sorted(set(self.rows.iterdir()) - {self._file(part) for part in range(parts)}):
            raise DWLError(f"{more[0]} is of rows that the data no longer has. Name another folder with --out, or delete this one.")
        found = pa.concat_tables(self._summary(part) for part in range(parts))
        order = [("mean_nll", "descending"), ("data_set", "ascending"), ("row", "ascending")]
        found = found.sort_by(order)
        out = pa.BufferOutputStream()
        csv.write_csv(found.drop_columns(["part", "at"]), out)
        write_whole(self.csv, out.getvalue().to_pybytes())
        return found

    def tokens(self, part: int, at: int) -> dict[str, list[int]]:
        """Ids and labels of a row."""
        (row,) = pq.read_table(self._file(part), columns=["input_ids", "labels"]).slice(at, 1).to_pylist()
        return dict(row)

    def _summary(self, part: int) -> pa.Table:
        """What is not of single tokens, with the place of each row."""
        schema = pq.read_schema(self._file(part))
        columns = [field.name for field in schema if not pa.types.is_list(field.type)]
        table = pq.read_table(self._file(part), columns=columns).replace_schema_metadata(None)
        at = np.arange(len(table))
        return table.append_column("part", pa.array(np.full_like(at, part))).append_column("at", pa.array(at))

    def _file(self, part: int) -> Path:
        return self.rows / f"{part:05d}.parquet"


def digest_of(value: Any) -> str:
    """Of a value of YAML."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def weights_of(names: Sequence[str]) -> str | None:
    """Digest of what is in the files of models and adapters, folders of this disk or repositories in the hub's cache; None where
    one is not there yet."""
    from huggingface_hub import snapshot_download

    total = hashlib.sha256()
    for name in names:
        folder = Path(name)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(name, local_files_only=True))
            except (OSError, ValueError):
                return None
        for file in sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern) if file.is_file()):
            with file.open("rb") as content:
                total.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that are not the same, by name: the keys of those that are mappings."""
    names = []
    for key in sorted({*before, *now}):
        was, becomes = before.get(key), now.get(key)
        if isinstance(was, Mapping) and isinstance(becomes, Mapping):
            names += [f"`{name}`" for name in _differing(was, becomes)]
        elif was != becomes:
            names.append(key)
    return names
