"""A Hugging Face hub of a few files, on the loopback address: it answers what huggingface_hub asks, and no more."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants, file_download

COMMITS = {"main": "c" * 40, "v1": "1" * 40}


class FakeHub:
    """repositories: {"owner/name": {file: content}}, the same at all revisions. requests: "METHOD path", in order.

    token: what has to be sent to upload anything; "" lets everybody.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]], gated: tuple[str, ...] = (), token: str = "") -> None:
        self.repositories, self.gated, self.token = repositories, gated, token
        self.requests: list[str] = []
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_HEAD(self) -> None:
                self._reply(with_body=False)

            def do_GET(self) -> None:
                self._reply(with_body=True)

            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers["Content-Length"]))
                self._reply(with_body=True, sent=sent)

            def _reply(self, with_body: bool, sent: bytes | None = None) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                path = unquote(self.path.partition("?")[0])
                if sent is None:
                    status, headers, body = hub.answer(path)
                elif hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
                    status, headers, body = 401, {}, b'{"error": "Invalid username or password."}'
                else:
                    status, headers, body = hub.take(path, sent)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body)"""
        if path.startswith("/api/models/"):
            repo, _, rest = path.removeprefix("/api/models/").partition("/revision/")
            repo, is_tree, tree = repo.partition("/tree/")
            revision = tree or rest or "main"
        else:
            repo, _, rest = path[1:].partition("/resolve/")
            is_tree = ""
            revision, _, file = rest.partition("/")
        if repo not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.repositories[repo]
        if is_tree:
            tree_of = [
                {"type": "file", "oid": "0" * 40, "size": len(body), "path": name} for name, body in files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree_of).encode()
        if path.startswith("/api/"):
            info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        etag = hashlib.sha256(files[file]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, files[file]

    def take(self, path: str, sent: bytes) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of an upload: a repository is made, files are announced, a commit has them."""
        reply: dict[str, Any] = {}
        if path == "/api/repos/create":
            asked = json.loads(sent)
            repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if repo in self.repositories:
                return 409, {}, json.dumps({"url": f"{self.url}/{repo}"}).encode()
            self.repositories[repo] = {}
            reply = {"url": f"{self.url}/{repo}"}
        elif path == "/api/validate-yaml":
            reply = {"warnings": [], "errors": []}
        elif "/preupload/" in path:
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            reply = {"files": [{"path": file["path"], **modes} for file in json.loads(sent)["files"]]}
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    self.repositories[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            reply = {"commitUrl": f"{self.url}/{repo}/commit/{COMMITS['main']}", "commitOid": COMMITS["main"]}
        return 200, {"Content-Type": "application/json"}, json.dumps(reply).encode()


def use_hub(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub ask the hub at `url`, and keep what it gets in `cache`."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in (constants, file_download):  # older releases hold the template twice
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
