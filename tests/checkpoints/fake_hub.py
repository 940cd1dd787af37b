"""A Hugging Face hub of a few files, on the loopback address: it answers what huggingface_hub asks, and no more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

COMMITS = {"main": "c" * 40, "v1": "1" * 40}


class FakeHub:
    """repositories: {"owner/name": {file: content}}, the same at all revisions. requests: "METHOD path", in order."""

    def __init__(self, repositories: dict[str, dict[str, bytes]], gated: tuple[str, ...] = ()) -> None:
        self.repositories, self.gated = repositories, gated
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

            def _reply(self, with_body: bool) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                status, headers, body = hub.answer(unquote(self.path.partition("?")[0]))
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
