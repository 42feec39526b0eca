"""`dwl packs push`: a pack file onto the Hugging Face Hub, and the line that uses it at the commit that this made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex
from rich.console import Console

from dwl_plugin.cli.output import say
from dwl_plugin.cli.packs import test_pack
from dwl_plugin.cli.packs.pages import card
from dwl_plugin.config.pack_files import MAX_BYTES, PackText
from dwl_plugin.config.packs import Pack, parse_pack
from dwl_plugin.errors import DWLError, first_line
from dwl_plugin.files import read_regular
from dwl_plugin.yaml_io import decoded

__all__ = ["push_pack"]

_REPO = regex.compile(r"(?P<datasets>datasets/)?(?P<id>(?P<owner>[\w-][\w.-]*)/[\w-][\w.-]*)")
_NAME = regex.compile(r"[\w+=@-][\w.+=@ -]*\.ya?ml")
"""What `hf://` addresses take."""


def push_pack(console: Console, file: Path, repo: str, private: bool, untested: bool) -> None:
    """The whole command. Raises `DWLError` with what is in its way: the pack, its cases, the token, the Hub."""
    if (where := _REPO.fullmatch(repo)) is None:
        raise DWLError(f"{repo} is no repository of the Hub: write `user/repo`, or `datasets/user/repo` for one of data.")
    if _NAME.fullmatch(file.name) is None:
        raise DWLError(f"{file.name} is no name for a pack on the Hub: letters, digits, _ and -, and .yml at its end.")
    content = read_regular(file, MAX_BYTES)
    pack = parse_pack(PackText(str(file), decoded(content, str(file))))
    passed = test_pack(console, _as_path(file))
    if not pack.is_described:
        raise DWLError(f"{file} was not pushed: its `description` is still to be written.")
    if not (passed and pack.tests) and not untested:
        why = "a case fails" if pack.tests else "without a case nobody sees what its classes take"
        raise DWLError(f"{file} was not pushed: {why}. --untested pushes it all the same.")
    commit = _uploaded(where, file.name, content, pack, private)
    cases = "1 case" if len(pack.tests) == 1 else f"{len(pack.tests)} cases"
    say(console, f"Pushed to {repo}, with its {cases}. To use it:")
    say(console, f"  pack: hf://{repo}@{commit}/{file.name}", "bold")
    say(console, f"sha256 {hashlib.sha256(content).hexdigest()}")


def _as_path(file: Path) -> str:
    return str(file) if file.is_absolute() else f"./{file}"


def _uploaded(where: Any, name: str, content: bytes, pack: Pack, private: bool) -> str:
    """The commit that has the file."""
    try:
        from huggingface_hub import CommitOperationAdd, HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    except ImportError:
        raise DWLError("Pushing needs the package huggingface_hub, which is not installed: pip install huggingface_hub") from None
    if get_token() is None:
        raise DWLError("There is no token for the Hub: log in with `hf auth login`, or put one that may write into HF_TOKEN.")
    api, kind, me = HfApi(library_name="axolotl-dwl"), "dataset" if where["datasets"] else "model", dict[str, Any]()
    try:
        me = api.whoami()
        api.create_repo(where["id"], repo_type=kind, private=private or None, exist_ok=True)
        files = {name: content}
        if not api.file_exists(where["id"], "README.md", repo_type=kind):
            files["README.md"] = card(pack, name.rpartition(".")[0], f"hf://{where[0]}@<commit>/{name}").encode()
        commit = api.create_commit(
            where["id"],
            [CommitOperationAdd(path, data) for path, data in files.items()],
            commit_message=f"{name}: a pack of token classes for axolotl-dwl",
            repo_type=kind,
        )
    except HfHubHTTPError as error:
        raise DWLError(_refused(error, me, where)) from error
    except OfflineModeIsEnabled:
        raise DWLError("HF_HUB_OFFLINE is set, so nothing is sent to the Hub: unset it to push.") from None
    except Exception as error:  # the client's errors have no common base: no connection, no name resolution, a proxy, ...
        raise DWLError(f"{name} was not pushed to {api.endpoint}: {type(error).__name__}: {first_line(error)}") from error
    return str(commit.oid)


def _refused(error: Any, me: Mapping[str, Any], where: Any) -> str:
    """What the Hub said no to, as a sentence."""
    status, name = error.response.status_code, me.get("name", "its owner")
    own = [name, *(group["name"] for group in me.get("orgs") or ())]
    if status == 401:
        return "The Hub does not know this token: log in with `hf auth login`, or renew the one in HF_TOKEN."
    if status in (403, 404) and where["owner"] not in own:
        mine = " and ".join(f"`{name}`" for name in own)
        return f"The Hub does not let {name} write under `{where['owner']}`: the names that are theirs are {mine}."
    if status == 403:
        return (
            f"The Hub does not let this token of {name} write to {where['id']}: make one with write access at "
            "https://huggingface.co/settings/tokens."
        )
    return f"The Hub did not take it ({status}): {error.server_message or first_line(error)}"
