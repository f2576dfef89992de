"""A real S3 server (moto) on loopback, and a proxy before it that can be away or refuse."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@contextmanager
def s3_server(bucket: str) -> Iterator[Any]:
    """An s3fs file system on a fresh S3 server with a bucket, which the environment names."""
    pytest.importorskip("moto", reason="moto is not installed: pip install 'smalti[test]'")
    s3fs = pytest.importorskip("s3fs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, server)
        s3fs.S3FileSystem.clear_instance_cache()  # those of another test's server
        files = s3fs.S3FileSystem(skip_instance_cache=True)
        files.mkdir(bucket)
        yield files
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert server.poll() is None, "the S3 server ended"
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.1)


@dataclass
class Proxy:
    """What the proxy does with requests, and those that reached the store: (path, range)."""

    url: str
    mode: str = "on"  # or away (the connection is closed), busy (503)
    answered: list[tuple[str, str]] = field(default_factory=list)
    refused: int = 0


@contextmanager
def proxy_to(endpoint: str) -> Iterator[Proxy]:
    """A proxy to the server at `endpoint`."""
    host = endpoint.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            if proxy.mode != "on":
                proxy.refused += 1
                if proxy.mode == "away":
                    self.close_connection = True
                    self.connection.close()
                    return
                self._answer(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
                return
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            upstream = http.client.HTTPConnection(host, timeout=60)
            upstream.request(self.command, self.path, content, dict(self.headers))
            answer = upstream.getresponse()
            body = answer.read()
            proxy.answered.append((self.path, self.headers.get("Range", "")))
            self._answer(answer.status, dict(answer.getheaders()), body)
            upstream.close()

        def __getattr__(self, name: str) -> Callable[[], None]:
            if name.startswith("do_"):
                return self.pass_on
            raise AttributeError(name)

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            size = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
            self.send_header("Content-Length", size)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:  # a client that was killed
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield proxy
        server.shutdown()
