"""Tables whose images are URLs: a real server on loopback that answers, refuses, and comes back."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.data.sources import web
from tests.data.sample_images import encoded, image
from tests.data.test_foreign_data import captions_in, prepared_csv


class _Answers(http.server.BaseHTTPRequestHandler):
    """`/403` is answered by 403, and so on; `/once-503` works at the second time."""

    asked: dict[str, int] = {}

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.asked[name] = self.asked.get(name, 0) + 1
        status = int(name) if name.isdigit() else 503 if name.startswith("once") and self.asked[name] == 1 else 200
        body = encoded(image(len(name))) if status == 200 else b"no"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server on loopback."""
    monkeypatch.setattr(web, "_WAITS_S", (0.01, 0.01))
    monkeypatch.setattr(_Answers, "asked", {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def test_urls_that_are_gone_for_good_are_their_rows_fault(tmp_path: Path, server: str) -> None:
    urls = [f"{server}/fine.png", f"{server}/403", f"{server}/404", f"{server}/410", "http://nowhere.invalid/a.png"]
    urls += ["nothing://x/y.png", f"{server}/once-more"]
    lines = [f"{url},number {n}" for n, url in enumerate(urls)]
    index = prepared_csv(tmp_path, "\n".join(["file,caption", *lines]))
    assert index["rejected"]["reasons"] == {"unreadable file": 5}
    assert captions_in(tmp_path / "out") == ["number 0", "number 6"]
    assert "the server answers 403" in (tmp_path / "out/rejected.jsonl").read_text()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_url_that_may_come_back_stops_after_retries_and_rejects_nothing(
    tmp_path: Path, server: str, status: int
) -> None:
    with pytest.raises(UserError, match=rf"the server answers {status} \(3 tries\); finished shards are kept"):
        prepared_csv(tmp_path, f"file,caption\n{server}/{status},a cat\n")
    assert _Answers.asked == {str(status): 3}
