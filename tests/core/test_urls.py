"""A password in a URL reaches what it is for, and nothing that is written or shown."""

from __future__ import annotations

import base64
import http.server
import io
import logging
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipeline.core.credentials import put_password_back, take_password_out
from pipeline.core.errors import UserError
from pipeline.core.urls import MaskingFormatter, mask
from tests.conftest import NO_TRACKING, TINY
from tests.launch import launch

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:s3cr3t@host/x", "https://***@host/x"),
        ("postgresql+psycopg2://me:p@s3cr3t@host:5432/db", "postgresql+psycopg2://***@host:5432/db"),
        ("at https://s3cr3t@host, and ftp://a:s3cr3t@b", "at https://***@host, and ftp://***@b"),
        ("https://h/x?X-Amz-Signature=s3cr3t&part=2", "https://h/x?X-Amz-Signature=***&part=2"),
        ("https://h/x?a=1&token=s3cr3t", "https://h/x?a=1&token=***"),
        ("https://h/mail/me@example.org?monkey=2", "https://h/mail/me@example.org?monkey=2"),
        ("sqlite:////home/me@work/all.db", "sqlite:////home/me@work/all.db"),
    ],
)
def test_what_is_secret_in_a_url_is_masked_and_nothing_else(text: str, masked: str) -> None:
    assert mask(text) == masked


def test_errors_and_log_lines_are_masked() -> None:
    assert SECRET not in str(UserError(f"nothing at https://me:{SECRET}@host/x"))
    record = logging.LogRecord("x", logging.INFO, "", 0, "at %s", (f"https://me:{SECRET}@host",), None)
    assert MaskingFormatter("%(message)s").format(record) == "at https://***@host"


def test_a_password_is_put_back_for_its_own_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALTI_CREDENTIALS", "")
    assert take_password_out("https://me:s3cr3t@host/{00..99}.tar") == "https://host/{00..99}.tar"
    assert put_password_back("https://host/00.tar") == "https://me:s3cr3t@host/00.tar"
    for other in ("https://host.evil.org/x", "http://host/x", "https://host:8443/x", "/a/path"):
        assert put_password_back(other) == other
    take_password_out("https://me:changed@host/x")
    assert put_password_back("https://host/x") == "https://me:changed@host/x"


def test_a_signature_is_put_back_for_its_own_url_and_host_and_missed_where_nobody_knows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SMALTI_CREDENTIALS", "")
    assert take_password_out("https://h/a.tar?part=1&sig=s3cr3t-a") == "https://h/a.tar?part=1&sig=***"
    take_password_out("https://h/b.tar?part=1&sig=s3cr3t-b")
    assert put_password_back("https://h/a.tar?part=1&sig=***") == "https://h/a.tar?part=1&sig=s3cr3t-a"
    take_password_out("https://me:s3cr3t@braces/{0..9}.tar?token=s3cr3t")
    assert put_password_back("https://braces/7.tar?token=***") == "https://me:s3cr3t@braces/7.tar?token=s3cr3t"
    for other in ("https://h.evil.org/a.tar?part=1&sig=***", "http://h/a.tar?sig=***", "https://h/a.tar?token=***"):
        with pytest.raises(UserError, match="written down without what is secret in it: start with the config file"):
            put_password_back(other)
    with pytest.raises(UserError, match="at most 100,000 bytes of URLs"):
        take_password_out(f"https://h/{'x' * 100_000}?sig=s3cr3t")


def _tar(images: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in images.items():
            for member, body in ((name[1:], content), (f"{name[1:-4]}.txt", f"number {name[1:-4]}".encode())):
                info = tarfile.TarInfo(member)
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return stream.getvalue()


class _Guarded(http.server.BaseHTTPRequestHandler):
    """Files for whoever has the password, or a signed URL."""

    def do_GET(self) -> None:
        expected = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
        if self.headers.get("Authorization") != expected and f"sig={SECRET}" not in self.path:
            self.send_response(401)
            self.end_headers()
            return
        content = self.files().get(self.path.partition("?")[0], b"")
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last or len(content)) + 1]
        self.send_response(404 if not content else 206 if "Range" in self.headers else 200)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    do_HEAD = do_GET  # noqa: N815

    def files(self) -> dict[str, bytes]:
        rows, files = ["file,caption"], {}
        for number in range(20):
            stream = io.BytesIO()
            Image.new("RGB", (16, 16), (number * 10, 99, 255 - number * 10)).save(stream, "png")
            files[f"/{number}.png"] = stream.getvalue()
            rows.append(f"{number}.png,number {number}")
        rows.append(f"gone.gif?token={SECRET}x,lost")
        return files | {"/table.csv": "\n".join(rows).encode(), "/all.tar": _tar(files)}

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[int]:
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Guarded)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd.server_port
    httpd.shutdown()
    httpd.server_close()


def _with_the_secret(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "uncommitted.patch")  # of this test
    return [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_run_from_a_guarded_source_has_the_password_nowhere_and_can_be_rerun(server: int, tmp_path: Path) -> None:
    address = f"http://me:{SECRET}@127.0.0.1:{server}/table.csv"
    source = f"{{kind: table, path: '{address}', path_column: file}}"
    options = [f"prepare.source={source}", "prepare.max_rejected_fraction=0.5", "prepare.workers=1"]
    tracking = f"tracking.uri=http://me:{SECRET}@127.0.0.1:1/"
    output = launch("pipeline", "run", str(TINY), "--only", "prepare", *options, tracking, cwd=tmp_path, check=False)
    run = tmp_path / "runs" / "tiny"
    assert (run / "prepare" / "index.json").exists(), output
    assert not _with_the_secret(tmp_path)
    assert SECRET not in output
    again = launch(
        "pipeline",
        "run",
        str(run / "config.yaml"),
        "--only",
        "prepare",
        cwd=tmp_path,
        check=False,
        SMALTI_CREDENTIALS=f"http://me:{SECRET}@127.0.0.1:{server}",
    )
    assert "up to date" in again


@pytest.mark.slow
def test_a_run_from_a_signed_url_has_the_signature_nowhere_and_can_be_resumed(server: int, tmp_path: Path) -> None:
    signed = f"http://127.0.0.1:{server}/all.tar?part=1&sig={SECRET}"
    options = ["--only", "prepare", "prepare.max_rejected_fraction=0.9", "prepare.workers=1"]
    source = f"prepare.source={{kind: webdataset, urls: '{signed}'}}"
    output = launch("pipeline", "run", str(TINY), source, *options, cwd=tmp_path, check=False)
    run = tmp_path / "runs" / "tiny"
    assert (run / "prepare" / "index.json").exists(), output
    assert not _with_the_secret(tmp_path)
    assert SECRET not in output
    options.append(NO_TRACKING)
    assert "up to date" in launch("pipeline", "run", str(TINY), source, *options, cwd=tmp_path)
    own = ["run", str(run), *options, "prepare.image_size=32"]
    without = launch("pipeline", *own, cwd=tmp_path, check=False)
    assert "part=1&sig=*** was written down without what is secret in it" in without
    assert "Traceback" not in without
    launch("pipeline", *own, cwd=tmp_path, SMALTI_CREDENTIALS=signed)
