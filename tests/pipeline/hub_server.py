"""A Hugging Face Hub on loopback: the requests that huggingface_hub makes to fetch and push models, and faults on demand."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class Repo:
    """Its commits by name, and what branches and tags point to."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        self.commits[commit_of(files)] = files
        self.refs[branch] = commit_of(files)
        return self.refs[branch]


@dataclass
class Hub:
    """``refuse``: a status (and error code) for every request. ``cut``: names of files whose first answer breaks half-way.

    ``hold``: names of files of which half is sent, and the rest when ``go`` is set. ``requests``: method, path, range.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    refuse: tuple[int, str] | None = None
    cut: set[str] = field(default_factory=set)
    hold: set[str] = field(default_factory=set)
    go: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def add(self, repo: str, folder: Path, branch: str = "main", **more: bytes) -> str:
        """The files of a folder as a commit."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        return self.repos.setdefault(repo, Repo()).commit(files | more, branch)

    def fetched(self, name: str) -> list[str | None]:
        """The ranges of the requests for a file's content."""
        return [of for method, path, of in self.requests if method == "GET" and "/resolve/" in path and path.endswith(name)]

    def environment(self, cache: Path) -> dict[str, str]:
        """What a process needs to take this for the Hub."""
        names = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_" + 20 * "t"}
        return {**names, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.go.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.refuse is not None:
            status, code = self.hub.refuse
            self._send(status, b"{}", {"X-Error-Code": code} if code else {})
        elif path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            self.hub.repos.setdefault(name, Repo())
            self._json({"url": f"{self.hub.url}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit|branch)/(.+))?", path):
            self._api(*found.groups(), body)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*found.groups())
        else:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _api(self, repo: str, what: str | None, revision: str | None, body: bytes) -> None:
        kept = self.hub.repos.get(repo)
        if kept is None:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif what == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
            self._json({"files": modes})
        elif what == "commit":
            self._commit(repo, kept, str(revision), body)
        elif what == "branch":
            self._json({})
        else:
            commit = kept.refs.get(revision or "main", revision or "")
            files = kept.commits.get(commit)
            if files is None:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif what == "tree":
                oids = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
                self._json([{"type": "file", "path": n, "size": len(d), "oid": oids[n]} for n, d in files.items()])
            else:
                listed = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                self._json({"id": repo, "modelId": repo, "sha": commit, "siblings": listed, "tags": [], "private": False})

    def _commit(self, repo: str, kept: Repo, branch: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        files = dict(kept.commits.get(kept.refs.get(branch, ""), {}))
        files |= {ln["value"]["path"]: base64.b64decode(ln["value"]["content"]) for ln in lines if ln["key"] == "file"}
        commit = kept.commit(files, branch)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None})

    def _file(self, repo: str, revision: str, name: str) -> None:
        kept = self.hub.repos.get(repo, Repo())
        commit = kept.refs.get(revision, revision)
        data = kept.commits.get(commit, {}).get(name)
        if data is None:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, data[start:], headers, name if self.command == "GET" else "")

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], name: str = "") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2
        if name in self.hub.cut:
            self.hub.cut.discard(name)
            self.wfile.write(body[:half])
            self.wfile.flush()
            time.sleep(0.1)  # what is read before the end counts
            self.close_connection = True
            return
        if name in self.hub.hold:
            self.wfile.write(body[:half])
            self.wfile.flush()
            self.hub.go.wait(60)
            body = body[half:]
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)
