"""A real S3 on loopback (moto), answering as badly as a test asks for.

``tests/conftest.py`` makes the fixtures known everywhere: ``s3`` is the server without faults, ``s3_url`` an empty bucket
of its own, credentials and endpoint set for this process and those it starts.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

_BUCKETS = itertools.count()
_REFUSALS = {
    "403": ("403 Forbidden", "AccessDenied"),
    "500": ("500 Internal Server Error", "InternalError"),
    "503": ("503 Slow Down", "SlowDown"),
}


@dataclass
class Fault:
    """What happens to requests of ``method`` whose path holds ``name``, ``times`` times (-1: always).

    ``kind``: "403", "500", "503" and "drop" (the connection) instead of an answer; "500 after" and "drop after" once the
    request was carried out; "cut" in the middle of the answer's body; "slow" answers ``seconds`` late.
    """

    kind: str
    method: str = ""
    name: str = ""
    times: int = 1
    seconds: float = 0.0
    met: int = 0

    def meets(self, method: str, path: str) -> bool:
        """Whether this request is to fail; counts those that do."""
        if method not in (self.method or method) or self.name not in path or self.met == self.times:
            return False
        self.met += 1
        return True


@dataclass
class S3:
    """The server; ``requests`` are those since the last ``reset``, as ("PUT", "/bucket/name")."""

    app: Callable[..., Iterable[bytes]]
    endpoint: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    put: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, kind: str, method: str = "", name: str = "", times: int = 1, seconds: float = 0.0) -> Fault:
        self.faults.append(Fault(kind, method, name, times, seconds))
        return self.faults[-1]

    def reset(self) -> None:
        self.faults.clear()
        self.requests.clear()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        fault = next((fault for fault in self.faults if fault.meets(method, path)), None)
        kind = fault.kind if fault else ""
        if kind == "slow":
            time.sleep(fault.seconds)
        if kind in ("403", "500", "503", "drop"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return _refuse(kind, environ, start_response)
        # S3 decides about one writer of a name after the other; moto looks first and writes then.
        with self.put if method == "PUT" else contextlib.nullcontext():
            if kind.endswith("after"):
                list(self.app(environ, lambda *_: None))
                return _refuse(kind.split()[0], environ, start_response)
            body = self.app(environ, start_response)
        return _cut(b"".join(body), environ) if kind == "cut" else body


def _refuse(kind: str, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    if kind == "drop":
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    status, code = _REFUSALS.get(kind, _REFUSALS["500"])
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected {code}</Message></Error>".encode()
    start_response(status, [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def _cut(body: bytes, environ: dict[str, Any]) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def serving() -> Iterator[S3]:
    """A server on a port of its own."""
    moto = pytest.importorskip("moto.moto_server.werkzeug_app")
    from botocore import session
    from werkzeug.serving import make_server

    s3 = S3(moto.DomainDispatcherApplication(moto.create_backend_app))
    server = make_server("127.0.0.1", 0, s3, threaded=True, request_handler=_quiet(moto.MotoRequestHandler))
    s3.endpoint = f"http://127.0.0.1:{server.port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        # Each client would read the description of S3's interface anew: most of what opening a storage costs in a test.
        patch.setattr(session, "create_loader", functools.cache(session.create_loader))
        yield s3
    server.shutdown()
    thread.join()


def _quiet(handler: type) -> type:
    return type("Quiet", (handler,), {"log": lambda *_: None})


def let_in(s3: S3, patch: pytest.MonkeyPatch) -> None:
    """Have this process, and those it starts, find the server and use it."""
    from fsspec.config import conf

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("NO_PROXY", "127.0.0.1")
    # fsspec reads its variables when it is imported: this process did so long ago.
    patch.setenv("FSSPEC_S3_ENDPOINT_URL", s3.endpoint)
    patch.setitem(conf, "s3", {"endpoint_url": s3.endpoint})


def new_bucket(s3: S3) -> str:
    """URL of an empty bucket."""
    bucket = f"bucket-{next(_BUCKETS)}"
    urllib.request.urlopen(urllib.request.Request(f"{s3.endpoint}/{bucket}", method="PUT"))
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """One server for all tests."""
    with serving() as s3:
        yield s3


@pytest.fixture
def s3(s3_server: S3, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The server without faults; this process and those it starts find it and may use it."""
    assert request.node.get_closest_marker("s3"), "this test starts the S3 server: give it the marker s3"
    let_in(s3_server, monkeypatch)
    s3_server.reset()
    yield s3_server
    s3_server.reset()


@pytest.fixture
def s3_url(s3: S3) -> str:
    """An empty bucket, and a folder in it where nothing is yet."""
    bucket = new_bucket(s3)
    s3.requests.clear()
    return f"{bucket}/caches/one"
