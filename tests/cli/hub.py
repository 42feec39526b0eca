"""As much of the Hugging Face Hub's HTTP API as its own client asks for to make a repository, commit to it and fetch from it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NamedTuple


class User(NamedTuple):
    name: str
    orgs: tuple[str, ...] = ()
    writes: bool = True


USERS = {"token-ann": User("ann", ("acme",)), "token-ann-read": User("ann", ("acme",), writes=False), "token-bob": User("bob")}

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """`repos`: (models or datasets, id) -> its commits, each an id and all the files it has; the last is `main`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[tuple[str, str], list[tuple[str, Files]]] = {}
        self.private: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, kind: str, repo: str, files: Files) -> str:
        commits = self.repos[kind, repo]
        whole = {**commits[-1][1], **files}
        oid = hashlib.sha1(repr((len(commits), kind, repo, whole)).encode()).hexdigest()
        commits.append((oid, whole))
        return oid


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, why: str, code: str = "") -> None:
        self._answer(status, {"error": why}, X_Error_Message=why, **({"X_Error_Code": code} if code else {}))

    @property
    def _user(self) -> User | None:
        return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            if self._user is None:
                return self._refuse(401, "Invalid credentials in Authorization header")
            groups = [{"name": name, "type": "org"} for name in self._user.orgs]
            return self._answer(200, {"type": "user", "name": self._user.name, "orgs": groups})
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/main)?", self.path):
            commits = self.server.repos.get((match[1], match[2]))
            if commits is None:
                return self._refuse(404, "Repository not found", "RepoNotFound")
            return self._answer(200, {"id": match[2], "modelId": match[2], "sha": commits[-1][0], "siblings": [], "tags": []})
        match = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if match is None:  # what a client of this version would like to know besides
            return self._refuse(404, "Not found")
        commits = self.server.repos.get(("datasets" if match[1] else "models", match[2]))
        if commits is None:
            return self._refuse(404, "Repository not found", "RepoNotFound")
        revisions = {**dict(commits), "main": commits[-1][1]}
        if match[3] not in revisions:
            return self._refuse(404, "Invalid rev id", "RevisionNotFound")
        if match[4] not in revisions[match[3]]:
            return self._refuse(404, "Entry not found", "EntryNotFound")
        content = revisions[match[3]][match[4]]
        oid = commits[-1][0] if match[3] == "main" else match[3]
        return self._answer(200, content, ETag=f'"{_blob(content)}"', X_Repo_Commit=oid)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            ok = json.loads(body)["content"].startswith("---\n")
            return self._answer(200 if ok else 400, {"errors": [] if ok else [{"message": "no metadata"}], "warnings": []})
        if self._user is None:
            return self._refuse(401, "Invalid credentials in Authorization header")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            owner, kind = asked["organization"] or self._user.name, f"{asked.get('type', 'model')}s"
            repo = f"{owner}/{asked['name']}"
            if not self._may_write(owner):
                return self._refuse(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')
            if (kind, repo) in self.server.repos:
                return self._answer(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"})
            self.server.repos[kind, repo] = [(hashlib.sha1(repo.encode()).hexdigest(), {".gitattributes": b""})]
            self.server.private |= {repo} if asked.get("private") or asked.get("visibility") == "private" else set()
            return self._answer(200, {"url": f"{self.server.url}/{repo}", "id": repo})
        match = re.fullmatch(r"/api/(models|datasets)/(([^/]+)/[^/]+)/(preupload|commit)/main", self.path)
        assert match is not None, self.path
        kind, repo, owner, what = match.groups()
        if (kind, repo) not in self.server.repos:
            return self._refuse(404, "Repository not found", "RepoNotFound")
        if not self._may_write(owner):
            return self._refuse(403, "Forbidden: you must use a write token to upload to a repository.")
        if repo == "ann/full":
            return self._refuse(507, "No space left for ann")
        present = self.server.repos[kind, repo][-1][1]
        if what == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "regular",
                    "shouldIgnore": False,
                    **({"oid": _blob(present[file["path"]])} if file["path"] in present else {}),
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        assert lines[0]["key"] == "header"
        new = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
        oid = self.server.commit(kind, repo, new)
        return self._answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})

    def _may_write(self, owner: str) -> bool:
        return self._user is not None and self._user.writes and owner in (self._user.name, *self._user.orgs)


def _blob(content: bytes) -> str:
    """git's name of it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
