"""Where a pack's text comes from, and how it is read: as data of a limited size, by nothing that could run.

A pack is named by its name, by a file (`./my_pack.yml`), or by a file on the Hugging Face Hub at one commit
(`hf://user/repo@<commit>/my_pack.yml`). A member is a dot and its name after any of these.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import regex
import yaml

from dwl_plugin.errors import PREFIX, ConfigError, Problem, did_you_mean

__all__ = ["MAX_BYTES", "PackReference", "PackText", "read_pack", "read_yaml", "shipped_packs"]

MAX_BYTES = 128 * 1024
"""Size of a pack file; the largest of ours has a fifth of it."""

MAX_NESTING = 32
"""How deep the YAML of a pack may be nested."""

_SHIPPED = Path(__file__).parents[1] / "classes" / "packs"
_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_FILE = regex.compile(rf"(?P<pack>.+?\.ya?ml)(?:\.(?P<member>{_NAME}))?")
_IDENTIFIER = regex.compile(_NAME)
_SHIPPED_NAME = regex.compile(rf"(?P<pack>{_NAME})(?:\.(?P<member>{_NAME}))?")
_HUB = regex.compile(r"hf://(?P<kind>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<commit>[^/]*))?/(?P<file>.+)")
_COMMIT = regex.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class PackReference:
    """What stands behind `pack:`, taken apart.

    Args:
        pack: a shipped pack's name, a path, or an `hf://` address.
        member: one class of it; None is all of them.
    """

    pack: str
    member: str | None = None

    @classmethod
    def of(cls, text: str) -> PackReference | None:
        """None where `text` has none of the three forms."""
        match = _FILE.fullmatch(text) or _SHIPPED_NAME.fullmatch(text)
        return None if match is None else cls(match["pack"], match["member"])

    @property
    def is_shipped(self) -> bool:
        """True for a pack of this package."""
        return _IDENTIFIER.fullmatch(self.pack) is not None

    @property
    def on_hub(self) -> bool:
        """True for a pack that has to be fetched."""
        return self.pack.startswith("hf://")


@dataclass(frozen=True)
class PackText:
    """The text of a pack, and its name in messages."""

    name: str
    text: str


def shipped_packs() -> list[str]:
    """The names of the packs of this package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yml"))


def read_pack(reference: PackReference, folders: Sequence[Path], path: str) -> PackText:
    """The text of a pack; raises `ConfigError` with the problem at `path` of the config.

    Args:
        reference: which pack.
        folders: where a relative path may lie; the first that has the file is taken.
        path: where the config names the pack.
    """
    if reference.is_shipped:
        file = _SHIPPED / f"{reference.pack}.yml"
        if not file.is_file():
            known = shipped_packs()
            hint = did_you_mean(reference.pack, known) or "a pack of your own is `./its_file.yml`"
            raise ConfigError([Problem(path, "no such pack", reference.pack, ", ".join(known), hint)])
        return PackText(reference.pack, file.read_text(encoding="utf-8"))
    if reference.on_hub:
        return _from_hub(reference.pack, path)
    tried = [folder / reference.pack for folder in folders]
    file = next((candidate for candidate in tried if os.path.isfile(candidate)), tried[0])
    if not os.path.isfile(file):  # of a name that no file can have, too
        hint = f"looked for {' and '.join(dict.fromkeys(str(candidate) for candidate in tried))}"
        raise ConfigError([Problem(path, "there is no such file", reference.pack, hint=hint)])
    return PackText(reference.pack, _limited(file, reference.pack, path).decode("utf-8", "replace"))


def _limited(file: Path, name: str, path: str) -> bytes:
    with file.open("rb") as handle:
        data = handle.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError([Problem(path, f"a pack has at most {MAX_BYTES // 1024} KiB; this file is larger", name)])
    return data


def _from_hub(address: str, path: str) -> PackText:
    match = _HUB.fullmatch(address)
    if match is None:
        raise ConfigError(
            [
                Problem(
                    path,
                    "not an address on the Hub",
                    address,
                    "hf://user/repo@<commit>/file.yml",
                    "the packs of a data set are at hf://datasets/user/repo@<commit>/file.yml",
                )
            ]
        )
    if _COMMIT.fullmatch(match["commit"] or "") is None:
        why = "a branch or a tag can be moved to other content" if match["commit"] else "without one the content can change"
        raise ConfigError(
            [
                Problem(
                    path,
                    f"needs the full commit, 40 hexadecimal digits: {why}",
                    address,
                    hint="the Hub shows it under `Files`, `History`",
                )
            ]
        )
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    except ImportError:
        raise ConfigError([Problem(path, "needs the package huggingface_hub, which is not installed", address)]) from None
    kind = "dataset" if match["kind"] else "model"
    where: dict[str, Any] = {"repo_id": match["repo"], "filename": match["file"], "repo_type": kind, "revision": match["commit"]}
    try:
        if not isinstance(try_to_load_from_cache(**where), str):
            size = get_hf_file_metadata(hf_hub_url(**where)).size
            if size is not None and size > MAX_BYTES:
                raise ConfigError(
                    [Problem(path, f"a pack has at most {MAX_BYTES // 1024} KiB; this one has {size:,} bytes", address)]
                )
        file = Path(hf_hub_download(**where))
    except ConfigError:
        raise
    except Exception as error:  # the client's errors have no common base: offline, no such repository, no such file, ...
        first = str(error).strip().partition("\n")[0]
        hint = "without a network, download the file once and name it as `./file.yml`"
        raise ConfigError(
            [Problem(path, f"could not be fetched from the Hub: {type(error).__name__}: {first}", address, hint=hint)]
        ) from error
    data = _limited(file, address, path)
    _say_hash(address, hashlib.sha256(data).hexdigest())
    return PackText(address, data.decode("utf-8", "replace"))


@lru_cache(maxsize=64)
def _say_hash(address: str, digest: str) -> None:
    """Once in a process; a config is parsed several times."""
    print(f"{PREFIX} pack {address}: sha256 {digest}", file=sys.stderr, flush=True)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(pack: PackText) -> Any:
    """The YAML of a pack as plain types. Aliases, which can multiply without end, and tags that name types are refused."""
    problem = None
    try:
        depth = 0
        for event in yaml.parse(pack.text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            at = pack.name if event.start_mark is None else f"{pack.name}:{event.start_mark.line + 1}"
            tag = getattr(event, "tag", None)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                problem = Problem(at, "a pack has no anchors and aliases (`&` and `*`); write it out, or put it in quotes")
            elif tag:
                problem = Problem(at, "a pack has no tags", tag)
            elif depth > MAX_NESTING:
                problem = Problem(at, f"nested more than {MAX_NESTING} deep")
            if problem is not None:
                raise ConfigError([problem])
        return yaml.load(pack.text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        at = pack.name if mark is None else f"{pack.name}:{mark.line + 1}"
        why = getattr(error, "problem", None) or str(error)
        raise ConfigError([Problem(at, f"is not YAML: {why}")]) from None
    except ValueError as error:  # a number or a date that is none
        raise ConfigError([Problem(pack.name, f"is not YAML: {error}")]) from None
