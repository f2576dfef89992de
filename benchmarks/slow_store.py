"""An object store that answers GETs of objects as S3 does, whole or a range, each after a delay.

python -m benchmarks.slow_store FOLDER PORT DELAY_MS        FOLDER/bucket/key is s3://bucket/key
"""

from __future__ import annotations

import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Store(ThreadingHTTPServer):
    """Serves `folder`."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, folder: Path, port: int, delay_s: float) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder, self.delay_s = folder, delay_s


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def do_GET(self) -> None:
        time.sleep(self.server.delay_s)
        with open(self.server.folder / self.path.partition("?")[0].lstrip("/"), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin, end = 0, size - 1
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                begin, end = int(first), min(int(last or end), end)
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(end + 1 - begin))
            self.send_header("Content-Range", f"bytes {begin}-{end}/{size}")
            self.send_header("ETag", '"0"')
            self.end_headers()
            self.wfile.flush()
            while begin <= end:
                begin += os.sendfile(self.connection.fileno(), file.fileno(), begin, end + 1 - begin)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    Store(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) / 1000).serve_forever()
