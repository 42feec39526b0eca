"""What is read of a path that a stranger may have made."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from dwl_plugin.errors import DWLError
from dwl_plugin.files import read_regular


def test_a_file_is_read_whole_also_through_a_link(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"abcd")
    link.symlink_to(file)
    assert read_regular(file, 4) == read_regular(link, 4) == b"abcd"


def test_what_is_no_file_is_named_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.path.relpath(tmp_path / "socket"))
    for name, why in {"pipe": "a pipe", "folder": "a folder", "endless": "a device", "socket": "a socket"}.items():
        with pytest.raises(DWLError, match=f"{name} is not read: it is {why}"):
            read_regular(tmp_path / name, 100)
    for name in ("loop", "nowhere", "n" * 300):
        with pytest.raises(DWLError, match=f"{name} cannot be read: "):
            read_regular(tmp_path / name, 100)
    listening.close()


def test_a_pipe_that_took_the_place_of_a_file_is_seen_once_it_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_bytes(b"abcd")
    os.mkfifo(pipe)
    before = os.stat(file)
    monkeypatch.setattr(os, "stat", lambda *_, **__: before)
    with pytest.raises(DWLError, match="is a pipe"):
        read_regular(pipe, 100)


def test_a_file_that_is_too_large_is_not_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    os.truncate(file, 1 << 40)
    with pytest.raises(DWLError, match="more than 4 KiB"):
        read_regular(file, 4096)
