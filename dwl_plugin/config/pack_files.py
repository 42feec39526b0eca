"""Where a pack's text comes from, and how it is read: as data of a limited size, by nothing that could run.

A pack is named by its name, if it is of this package or of another that is installed (an entry point of `dwl_plugin.packs`, which
loads to its YAML or to the `Path` of the file), by a file (`./my_pack.yml`), or by a file on the Hugging Face Hub at one commit
(`hf://user/repo@<commit>/my_pack.yml`). A member is a dot and its name after any of these.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import regex

from dwl_plugin.errors import PREFIX, ConfigError, did_you_mean, printable
from dwl_plugin.extensions import load, other_names
from dwl_plugin.files import UnreadableError, read_regular
from dwl_plugin.yaml_io import decoded

__all__ = ["MAX_BYTES", "PackReference", "PackText", "is_fetched", "known_packs", "read_pack", "shipped_packs"]

MAX_BYTES = 128 * 1024
"""Size of a pack file; the largest of ours has a fifth of it."""

_SHIPPED = Path(__file__).parents[1] / "classes" / "packs"
_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_FILE = regex.compile(rf"(?P<pack>.+?\.ya?ml)(?:\.(?P<member>{_NAME}))?")
_MEMBER = regex.compile(rf"(?P<pack>{_NAME})(?:\.(?P<member>{_NAME}))?")
_HUB = regex.compile(r"hf://(?P<kind>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<commit>[^/]*))?/(?P<file>.+)")
_COMMIT = regex.compile(r"[0-9a-f]{40}")
_NOT_THERE = {
    "RepositoryNotFoundError": "the Hub has no such repository, or it is private and you are not logged in as one who may see it",
    "GatedRepoError": "the Hub shows this repository only to those who were let in, on its page",
    "RevisionNotFoundError": "the repository has no such commit",
    "EntryNotFoundError": "the repository has no such file at this commit",
    "RemoteEntryNotFoundError": "the repository has no such file at this commit",
}
"""By the names of the client's errors, which its versions have in other places."""

_PART = regex.compile(r"(?!\.\.?$)[\w.+=@ -]+")


class PackReference(NamedTuple):
    """What stands behind `pack:`, taken apart.

    `pack` is a name, a path, or an `hf://` address; `member` is one class of it, None is all of them.
    """

    pack: str
    member: str | None = None

    @classmethod
    def of(cls, text: object, path: str) -> PackReference:
        """Raises `ConfigError` at `path` of the config where `text` has none of the three forms."""
        match = (_FILE.fullmatch(text) or _MEMBER.fullmatch(text)) if isinstance(text, str) else None
        if match is None:
            forms = f"{', '.join(known_packs())}, ./file.yml, hf://user/repo@<commit>/file.yml"
            hint = "for one class of a pack write a dot and its name after it"
            if isinstance(text, (list, tuple)):
                hint = "one pack stands here; for several write `any: [{pack: a}, {pack: b}]`"
            raise ConfigError.at(path, "not a pack", text, forms, hint)
        return cls(match["pack"], match["member"])


class PackText(NamedTuple):
    """The text of a pack, and its name in messages."""

    name: str
    text: str


def shipped_packs() -> list[str]:
    """The names of the packs of this package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yml"))


def known_packs() -> list[str]:
    """The names of packs that can be used here: of this package, then of others that are installed."""
    shipped = shipped_packs()
    return [*shipped, *other_names("pack", shipped)]


def read_pack(reference: PackReference, folders: Sequence[Path] | None, path: str) -> PackText:
    """The text of a pack; raises `ConfigError` with the problem at `path` of the config.

    Args:
        reference: which pack.
        folders: where a relative path may lie; the first that has the file is taken. None: only packs of this package may be read.
        path: where the config names the pack.
    """
    name, shipped = reference.pack, shipped_packs()
    known = shipped if folders is None else known_packs()
    if name in known:
        source = _SHIPPED / f"{name}.yml" if name in shipped else load("pack", name, path)
        return PackText(name, decoded(_limited(source, name, path), name))
    if name.isidentifier():
        hint = did_you_mean(name, known) or "a pack of your own is `./its_file.yml`"
        raise ConfigError.at(path, "no such pack", name, ", ".join(known), hint)
    if folders is None:
        raise ConfigError.at(path, "a pack can use only the packs of this package", name, ", ".join(known))
    if name.startswith("hf://"):
        return _from_hub(name, path)
    tried = [folder / name for folder in folders]
    file = next(filter(os.path.exists, tried), None)  # False of a name that no file can have, too
    if file is None:
        hint = f"looked for {' and '.join(dict.fromkeys(str(candidate) for candidate in tried))}"
        raise ConfigError.at(path, "there is no such file", name, hint=hint)
    if not os.path.isabs(name) and _leads_out(folders[tried.index(file)], name):
        hint = "put the file there, or name it by its absolute path"
        raise ConfigError.at(path, "a link that leads out of the folder where the pack is looked for", name, hint=hint)
    return PackText(name, decoded(_limited(file, name, path), name))


def _leads_out(folder: Path, name: str) -> bool:
    """Whether a link on the way leads elsewhere than the path says. `..` at its head can be seen by whoever reads the config."""
    seen = takewhile("..".__eq__, Path(os.path.normpath(name)).parts)
    return not (folder / name).resolve().is_relative_to(folder.joinpath(*seen).resolve())


def _limited(source: object, name: str, path: str) -> bytes:
    """The bytes of a file, or of the text that another package has."""
    try:
        data = read_regular(source, MAX_BYTES) if isinstance(source, Path) else str(source).encode()
    except UnreadableError as error:
        raise ConfigError.at(path, f"{source} {error.why}", name) from None
    if len(data) > MAX_BYTES:
        raise ConfigError.at(path, f"is not read: it has more than {MAX_BYTES >> 10:,} KiB", name)
    return data


def is_fetched(address: str) -> bool:
    """Whether the file at an `hf://` address is on this disk already: a commit is never another one."""
    try:
        return _cached(_on_hub(PackReference.of(address, "").pack, ""))
    except (ConfigError, ImportError, ValueError):  # a ValueError for what the client takes for no name of a repository
        return False


def _on_hub(address: str, path: str) -> dict[str, Any]:
    """Repository, file and commit of an address, as the Hub's client calls them. Raises `ConfigError` at `path`."""
    match = _HUB.fullmatch(address)
    if match is None:
        form, hint = "hf://user/repo@<commit>/file.yml", "the packs of a data set are at hf://datasets/user/repo@<commit>/file.yml"
        raise ConfigError.at(path, "not an address on the Hub", address, form, hint)
    if not all(_PART.fullmatch(part) for part in (*match["repo"].split("/"), *match["file"].split("/"))):
        why = "between two `/` of an address stands the plain name of a folder or file: no `..`, `\\` or `%`, and not nothing"
        raise ConfigError.at(path, why, address)
    if _COMMIT.fullmatch(match["commit"] or "") is None:
        why = "a branch or a tag can be moved to other content" if match["commit"] else "without one the content can change"
        hint = "the Hub shows it under `Files`, `History`"
        raise ConfigError.at(path, f"needs the full commit, 40 hexadecimal digits: {why}", address, hint=hint)
    kind = "dataset" if match["kind"] else "model"
    return {"repo_id": match["repo"], "filename": match["file"], "repo_type": kind, "revision": match["commit"]}


def _cached(where: Mapping[str, Any]) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(**where), str)


def _from_hub(address: str, path: str) -> PackText:
    where = _on_hub(address, path)
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    except ImportError:
        raise ConfigError.at(path, "needs the package huggingface_hub, which is not installed", address) from None
    try:
        if not _cached(where):
            size = get_hf_file_metadata(hf_hub_url(**where)).size
            if size is not None and size > MAX_BYTES:
                raise ConfigError.at(path, f"a pack has at most {MAX_BYTES // 1024} KiB; this one has {size:,} bytes", address)
        file = Path(hf_hub_download(**where))
    except ConfigError:
        raise
    except Exception as error:  # the client's errors have no common base: offline, no such repository, no such file, ...
        if why := _NOT_THERE.get(type(error).__name__):
            raise ConfigError.at(path, why, address) from error
        first, *_ = str(error).strip().splitlines() or [""]
        why = f"could not be fetched from the Hub: {type(error).__name__}: {first}"
        hint = "without a network, download the file once and name it as `./file.yml`"
        raise ConfigError.at(path, why, address, hint=hint) from error
    data = _limited(file, address, path)
    _say_hash(address, hashlib.sha256(data).hexdigest())
    return PackText(address, decoded(data, address))


@lru_cache(maxsize=64)
def _say_hash(address: str, digest: str) -> None:
    """Once in a process; a config is parsed several times."""
    print(f"{PREFIX} pack {printable(address)}: sha256 {digest}", file=sys.stderr, flush=True)
