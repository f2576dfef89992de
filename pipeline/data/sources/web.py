"""Images that a table names by http(s) URL: which failures are the row's fault, and which may pass.

An answer such as 403, 404 or 410, or a host that does not exist, is that row's fault. What may pass (5xx, 408, 429, a
time-out, no network) is tried again, and then stops the stage, so that it is not taken for a bad sample.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

from fsspec import AbstractFileSystem

from pipeline.data.sources.base import LARGEST_IMAGE, UnreadableFile, interrupted

_MAY_PASS = (408, 425, 429)  # of the answers 4xx
_WAITS_S = (0.5, 2.0, 8.0)  # before the second, third and fourth try
_CHUNK = 1 << 20


def read_url(files: AbstractFileSystem, url: str, largest: int = LARGEST_IMAGE) -> bytes:
    """The content at an http(s) URL, in one request that ends after `largest` bytes.

    Raises:
        UnreadableFile: it is not there for good, or too large.
        UserError: it may be there later.
    """
    for wait_s in (*_WAITS_S, None):
        try:
            return _content(files, url, largest)
        except UnreadableFile:
            raise
        except Exception as error:
            if _for_good(error):
                raise UnreadableFile(_words(error)) from error
            if wait_s is None:
                raise interrupted(url, f"{_words(error)} ({len(_WAITS_S) + 1} tries)") from error
            time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def _content(files: AbstractFileSystem, url: str, largest: int) -> bytes:
    content = bytearray()
    with files.open(url, "rb", block_size=0, size=1) as stream:  # size: known or not, it need not ask for it first
        while chunk := stream.read(_CHUNK):
            content += chunk
            if len(content) > largest:
                raise UnreadableFile(f"more than {largest} bytes, which is the most that is read")
    return bytes(content)


def _for_good(error: Exception) -> bool:
    """Whether asking again would give the same answer."""
    status = getattr(error, "status", None)  # of aiohttp's errors
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _MAY_PASS
    if isinstance(error, FileNotFoundError | PermissionError | ValueError):
        return True
    # EAI_AGAIN, which is what a machine without network says, may pass.
    return any(isinstance(e, socket.gaierror) and e.errno == socket.EAI_NONAME for e in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it came from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        inner = getattr(cause, "os_error", None)  # of aiohttp's errors of connections
        if isinstance(inner, BaseException):
            yield from _causes(inner)
        cause = cause.__cause__


def _words(error: Exception) -> str:
    status = getattr(error, "status", None)
    return f"the server answers {status}" if isinstance(status, int) else str(error) or type(error).__name__
