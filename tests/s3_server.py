"""A real S3 server (moto) in a process of its own, and a proxy before it that breaks what tests tell it to break."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import pytest

Fault = Literal["hang", "403", "500", "503", "cut", "flip", "reset"]
Plan = Callable[[str, str], Fault | None]
"""What happens to a request of this method and path; None: it is served."""
_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


class S3:
    """The server behind the proxy."""

    def __init__(self, port: int, proxy_port: int, proxy: "Proxy") -> None:
        self.port = port
        self.endpoint = f"http://127.0.0.1:{proxy_port}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
            "FSSPEC_S3_ENDPOINT_URL": self.endpoint,
        }  # fmt: skip
        self._proxy = proxy

    @contextmanager
    def faults(self, plan: Plan) -> Iterator[Counter[str]]:
        """While the block lasts, requests suffer; how often each did, and `served` for those that did not."""
        self._proxy.plan, self._proxy.counts = plan, Counter()
        try:
            yield self._proxy.counts
        finally:
            self._proxy.plan = lambda method, path: None

    def put(self, path: str, content: bytes) -> None:
        """Put an object there; a path is that of a bucket and of a file in it."""
        self.request("PUT", f"/{path}", content)

    def names(self, folder: str) -> list[str]:
        """Names of the files that lie directly in a folder of a bucket."""
        bucket, prefix = folder.split("/", 1)
        found = self.request("GET", f"/{bucket}?list-type=2&delimiter=/&prefix={prefix}/").decode()
        return [key.removeprefix(f"{prefix}/") for key in re.findall(r"<Key>([^<]+)</Key>", found)]

    def files(self, folder: str) -> dict[str, bytes]:
        """Those files."""
        return {name: self.request("GET", f"/{folder}/{name}") for name in self.names(folder)}

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Straight to the server, past the proxy; signatures are not checked."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=any/20260101/us-east-1/s3/aws4_request"}
        connection.request(method, path, body=body, headers=signed)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        assert answer.status < 300, (method, path, answer.status, content[:500])
        return content


class Proxy(ThreadingHTTPServer):
    daemon_threads = True
    plan: Plan = staticmethod(lambda method, path: None)  # type: ignore[assignment]
    target_port = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.counts: Counter[str] = Counter()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is what tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *arguments: object) -> None:
        pass

    def _serve(self) -> None:
        fault = self.server.plan(self.command, self.path)
        self.server.counts[fault or "served"] += 1
        body = self._body()
        if fault == "hang":
            time.sleep(3)
        if fault in {"hang", "reset"}:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close_connection = True
            return
        if fault in {"403", "500", "503"}:
            code = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}[fault]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>made by the test</Message></Error>"
            self._answer(int(fault), [("Content-Type", "application/xml")], text.encode())
            return
        onward = http.client.HTTPConnection("127.0.0.1", self.server.target_port, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP | {"expect"}}
        onward.request(self.command, self.path, body=body, headers=headers | {"Content-Length": str(len(body))})
        answer = onward.getresponse()
        content = answer.read()
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
        length = int(answer.getheader("Content-Length", len(content)))
        onward.close()
        if fault == "flip" and content:
            content = (
                content[: len(content) // 2]
                + bytes([content[len(content) // 2] ^ 1])
                + content[len(content) // 2 + 1 :]
            )
        self._answer(answer.status, kept, content, length, sent=len(content) // 2 if fault == "cut" else None)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        length: int | None = None,
        sent: int | None = None,
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])
        if sent is not None:
            self.wfile.flush()
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    port = _free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "secret"},
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, "moto did not start"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    proxy = Proxy()
    proxy.target_port = port
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    yield S3(port, proxy.server_address[1], proxy)
    proxy.shutdown()
    proxy.server_close()
    server.send_signal(signal.SIGTERM)
    server.wait(timeout=30)


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, with credentials and endpoint in the environment of this process, as users give them."""
    import fsspec

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": s3_server.endpoint})
    return s3_server


@pytest.fixture
def bucket(s3: S3) -> str:
    """A new bucket."""
    name = f"b{time.monotonic_ns()}"
    s3.request("PUT", f"/{name}")
    return name
