"""A Hub on this machine: the part of the HTTP interface of huggingface.co that uploads and downloads use.

The client is the real ``huggingface_hub``. Files are kept in memory, and all of them are sent inline in the commit, as
small files are; large files go to other servers of the real Hub (LFS, Xet), which this one does not have.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40


@dataclass
class LocalHub:
    """The state of the server.

    Attributes:
        token: The access token that it accepts.
        account: Answer of ``whoami``.
        repositories: Content of each file of each repository.
        private: Visibility that each repository was created with.
        requests: Method and path of each request.
        may_write: False answers 403 to whoever creates a repository.
    """

    token: str = "hf_" + "a" * 34
    account: dict[str, Any] = field(default_factory=lambda: {"name": "alice", "orgs": [{"name": "lab"}]})
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    may_write: bool = True
    address: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _respond(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._answer({"error": "Invalid credentials"}, 401)
        if path == "/api/whoami-v2":
            return self._answer(self.hub.account)
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        words = path.strip("/").split("/")
        is_api = words[:1] == ["api"]
        words = words[2:] if is_api else words[words[:1] == ["datasets"] :]  # after "api/models" or "api/datasets"
        owner, name, *rest = words
        files = self.hub.repositories.get(f"{owner}/{name}")
        if files is None:
            return self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if not is_api:
            return self._file(files, "/".join(rest[2:]))
        if rest[:1] == ["preupload"]:
            asked = json.loads(body)["files"]
            return self._answer(
                {"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]}
            )
        if rest[:1] == ["commit"]:
            return self._commit(files, body, f"{owner}/{name}")
        if rest[:1] == ["tree"]:
            return self._answer([_entry(path, content) for path, content in sorted(files.items())])
        siblings = [{"rfilename": each} for each in sorted(files)]
        return self._answer({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings})

    do_GET = do_POST = do_HEAD = _respond  # noqa: N815  # names of the standard library

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _create(self, asked: dict[str, Any]) -> None:
        if not self.hub.may_write:
            return self._answer({"error": "You don't have the rights to create a model"}, 403)
        owner = asked.get("organization") or self.hub.account["name"]
        hub_id = f"{owner}/{asked['name']}"
        if hub_id in self.hub.repositories:
            taken = {"error": "You already created this model repo", "url": f"{self.hub.address}/{hub_id}"}
            return self._answer(taken, 409)
        self.hub.repositories[hub_id] = {".gitattributes": b""}
        self.hub.private[hub_id] = asked.get("private") is True or asked.get("visibility") == "private"
        return self._answer({"url": f"{self.hub.address}/{hub_id}"})

    def _commit(self, files: dict[str, bytes], body: bytes, hub_id: str) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        self._answer(
            {"commitUrl": f"{self.hub.address}/{hub_id}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        )

    def _file(self, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        return self._answer(files[path], ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """Runs a server on a free port until the block is left."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
