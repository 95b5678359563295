"""A small proxy in front of the S3 server, which spoils requests on the wire as networks and busy stores do."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_CODES = {"500": "InternalError", "503": "SlowDown", "400": "ExpiredToken", "403": "AccessDenied"}
_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


@dataclass
class WireFault:
    """What happens to ``times`` requests (-1: all) of ``method`` whose path holds ``name``.

    ``kind``: "500", "503" (SlowDown), "403" and "expired" are answered in the store's place. "reset": the connection is reset
    before an answer; "reset late": in the middle of the answer; "truncated": half of the upload is passed on, and both
    connections end; "trickle": the answer comes a few bytes at a time.
    """

    kind: str
    method: str = ""
    name: str = ""
    times: int = 1
    met: int = 0

    def meets(self, method: str, path: str) -> bool:
        if method != (self.method or method) or self.name not in path or self.met == self.times:
            return False
        self.met += 1
        return True


@dataclass
class Proxy:
    """``port`` of the proxy; ``faults`` are met in order."""

    upstream: str
    port: int = 0
    faults: list[WireFault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, kind: str, method: str = "", name: str = "", times: int = 1) -> WireFault:
        self.faults.append(WireFault(kind, method, name, times))
        return self.faults[-1]

    def kind_for(self, method: str, path: str) -> str:
        with self.lock:
            fault = next((fault for fault in self.faults if fault.meets(method, path)), None)
        return fault.kind if fault else ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def _serve(self) -> None:
        kind = self.proxy.kind_for(self.command, self.path)
        body = self._body()
        if kind in ("500", "503", "403", "expired"):
            self._refuse("400" if kind == "expired" else kind)
        elif kind == "reset":
            self._reset()
        elif kind == "truncated":
            self._pass_half(body)
            self._reset()
        else:
            self._pass(body, kind)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _sent(self) -> dict[str, str]:
        return {name: value for name, value in self.headers.items() if name.lower() not in _HOP}

    def _pass(self, body: bytes, kind: str) -> None:
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=30)
        connection.request(self.command, self.path, body=body, headers=self._sent() | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        content = answer.read()
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        connection.close()
        if kind == "reset late" and content:
            self.wfile.write(content[: len(content) // 2])
            self._reset()
        elif kind == "trickle":
            step = max(len(content) // 4, 1)
            for i in range(0, len(content), step):
                self.wfile.write(content[i : i + step])
                self.wfile.flush()
                time.sleep(0.02)
        elif self.command != "HEAD":
            self.wfile.write(content)

    def _pass_half(self, body: bytes) -> None:
        host, _, port = self.proxy.upstream.partition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as upstream:
            lines = [f"{self.command} {self.path} HTTP/1.1", *(f"{k}: {v}" for k, v in self._sent().items())]
            head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "Connection: close", "", ""])
            upstream.sendall(head.encode() + body[: len(body) // 2])
            upstream.shutdown(socket.SHUT_WR)
            upstream.recv(1)

    def _refuse(self, status: str) -> None:
        code = _CODES[status]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected {code}</Message></Error>".encode()
        self.send_response(int(status))
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        """An RST instead of a FIN, as from a machine that is gone."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


@contextlib.contextmanager
def proxying(endpoint: str) -> Iterator[Proxy]:
    """A proxy in front of the server at ``endpoint``, on a port of its own."""
    proxy = Proxy(endpoint.removeprefix("http://"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    proxy.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield proxy
    server.shutdown()
    server.server_close()
    thread.join()
