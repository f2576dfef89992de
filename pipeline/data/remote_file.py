"""Objects in a store (S3, or whatever fsspec opens) as files that are read by range, through the node's cache.

    configure(config.store)                                # once a process; otherwise the defaults hold
    tar = RemoteFile("s3://bucket/000000.tar", size, sha256)
    tar.read(begin, 100)                                   # the block of 4 MiB around it, from the cache or the store
    with Fetching() as fetching:
        fetching.begin(tar.blocks(begin, 100))             # in the background, in this order

A store that does not answer is asked again, each time by a new connection with credentials that are looked up anew,
for `store.patience_s`; then one line says so. `content` names what the object holds (a hash), so that a cache never
takes one object for another, and runs with the same data share it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.config.store import StoreConfig
from pipeline.core.credentials import put_password_back, url_to_fs
from pipeline.core.errors import UserError
from pipeline.core.text import visible
from pipeline.core.urls import mask
from pipeline.data.block_cache import Block, BlockCache, Key

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BLOCK_BYTES = 4 << 20
_READ_AHEAD = 8  # blocks, for who reads front to back
_REQUEST_S = 30.0  # for 4 MiB
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_FORGOTTEN_S = 60.0  # after so long without a failure, the next one begins an outage of its own
_S3 = ("s3", "s3a")
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """An object of known size and content. Threads may share it; nothing is open."""

    url: str
    size: int
    content: str  # a hash of what it holds

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, where: slice) -> bytes:
        """A range, as of a mapped file."""
        begin, end = where.start or 0, self.size if where.stop is None else min(where.stop, self.size)
        return self.read(begin, max(0, end - begin))

    def read(self, begin: int, size: int) -> bytes:
        """`size` bytes from `begin` on, all within the object. Raises UserError when the store stays away."""
        store, (first, start) = _opened or _store(), divmod(begin, BLOCK_BYTES)
        if start + size <= BLOCK_BYTES:
            if (block := store.cache.held((self.content, first))) is not None:
                return block[start : start + size]
            return store.piece(self, first, start, size)
        pieces = []
        while size > 0:
            here = min(size, BLOCK_BYTES - start)
            pieces.append(store.piece(self, first, start, here))
            first, start, size = first + 1, 0, size - here
        return b"".join(pieces)

    def block(self, number: int) -> Block | None:
        """A whole block; None: there is no room for it, `read` a range."""
        return _store().block(self, number)

    def sha256(self, begin: int = 0, size: int | None = None) -> str:
        """Of a range, in hexadecimal digits. Raises UserError when the store stays away."""
        digest, end = hashlib.sha256(), self.size if size is None else begin + size
        while begin < end:
            here = min(end, (begin // BLOCK_BYTES + 1) * BLOCK_BYTES) - begin
            digest.update(self.read(begin, here))
            begin += here
        return digest.hexdigest()

    def blocks(self, begin: int, size: int) -> list[tuple[RemoteFile, int]]:
        """The blocks around these bytes."""
        return [(self, n) for n in range(begin // BLOCK_BYTES, (begin + max(size, 1) - 1) // BLOCK_BYTES + 1)]

    def read_directly(self, begin: int, size: int) -> bytes:
        """Like `read`, past the cache."""
        return _store().fetch(self, begin, size)

    def read_once(self, begin: int, size: int) -> bytes:
        """Like `read`, for a few bytes here and there: of a block that is not in the cache no others are fetched."""
        is_there = all(_store().cache.has((self.content, number)) for _, number in self.blocks(begin, size))
        return self.read(begin, size) if is_there else self.read_directly(begin, size)

    def forget(self, begin: int, size: int) -> None:
        """Have these bytes read from the store the next time."""
        for _, number in self.blocks(begin, size):
            _store().cache.drop((self.content, number))

    def block_size(self, number: int) -> int:
        """Its bytes: of the last one fewer."""
        return min(BLOCK_BYTES, self.size - number * BLOCK_BYTES)


def is_remote(path: str) -> bool:
    """Whether this is a URL of a store, and no path of the local file system."""
    scheme, colon, _ = path.partition("://")
    return bool(colon) and scheme not in ("file", "local")


class Fetching:
    """Blocks that are fetched in the background; what has not begun when it is closed, is not fetched."""

    def __init__(self) -> None:
        self._futures: set[Future[None]] = set()

    def begin(self, blocks: Iterable[tuple[RemoteFile, int]]) -> int:
        """Have these blocks fetched, in their order, that are not in the cache. Returns how many that are."""
        begun = [future for block in blocks if (future := _store().begin(*block)) is not None]
        self._futures.update(begun)
        return len(begun)

    @property
    def waiting(self) -> int:
        """How many are still to come."""
        self._futures = {future for future in self._futures if not future.done()}
        return len(self._futures)

    def close(self) -> None:
        """Fetch no more."""
        for future in self._futures:
            future.cancel()

    def __enter__(self) -> Fetching:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def configure(config: StoreConfig) -> None:
    """How this process reads from stores from now on."""
    global _config, _opened
    with _opening:
        _config, _opened = config, None


def cache_bytes() -> int:
    """What the cache may hold."""
    return int(_config.cache_gigabytes * 1e9)


def patiently(url: str, ask: Callable[[AbstractFileSystem, str], T]) -> T:
    """What `ask(file system, path)` of a URL returns, which is asked again while the store does not answer.

    Raises:
        UserError: the object is not there, or the store stays away.
    """
    return _store().patiently(url, ask)


class _Store:
    """The connections, the cache and the threads of this process."""

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        folder = config.cache or Path(tempfile.gettempdir()) / f"smalti-cache-{os.getuid()}"
        self.cache = BlockCache(folder, int(config.cache_gigabytes * 1e9))
        self._tasks: queue.SimpleQueue[tuple[Future[None], RemoteFile, int]] = queue.SimpleQueue()
        self._threads = 0
        self._lock = threading.Lock()
        self._coming: dict[Key, Future[None]] = {}
        self._files: dict[str, AbstractFileSystem] = {}  # by scheme and host
        self._outages: dict[str, _Outage] = {}  # likewise
        self._read_last: dict[str, int] = {}  # content -> block, of who reads front to back

    def piece(self, file: RemoteFile, number: int, start: int, size: int) -> bytes:
        """A range within a block."""
        self._read_ahead(file, number)
        if (block := self.block(file, number)) is None:
            return self.fetch(file, number * BLOCK_BYTES + start, size)
        return block[start : start + size]

    def block(self, file: RemoteFile, number: int) -> Block | None:
        """A whole block; None: there is no room for it."""
        key = (file.content, number)
        if self.cache.is_full and not self.cache.has(key):
            return None
        if (coming := self._coming.get(key)) is not None and not coming.cancel():
            coming.result()
        return self._brought(file, number)

    def begin(self, file: RemoteFile, number: int) -> Future[None] | None:
        """Fetch a block in the background; None: it is there, or on its way."""
        key = (file.content, number)
        if self.cache.has(key) or self.cache.is_full:
            return None
        with self._lock:
            if key in self._coming:
                return None
            future = self._coming[key] = Future()
            if self._threads < self.config.connections:
                self._threads += 1
                # Not an executor's, which a process that ends would wait for while the store stays away.
                threading.Thread(target=self._bring_all, name=f"fetch-{self._threads}", daemon=True).start()
        future.add_done_callback(lambda _: self._coming.pop(key, None))
        self._tasks.put((future, file, number))
        return future

    def fetch(self, file: RemoteFile, begin: int, size: int) -> bytes:
        """A range of the object, from the store."""

        def ask(files: AbstractFileSystem, path: str) -> bytes:
            content: bytes = _bounded(files, path, begin, begin + size)
            if len(content) != size:
                raise OSError(f"expected {size} bytes from {begin} on, found {len(content)}: is it another object?")
            return content

        return self.patiently(file.url, ask)

    def patiently(self, url: str, ask: Callable[[AbstractFileSystem, str], T]) -> T:
        """See the function of this name."""
        root = _root(url)
        outage = self._outages.setdefault(root, _Outage(root, self.config.patience_s))
        pause_s, files = _FIRST_PAUSE_S, None
        while True:
            asked = time.monotonic()
            try:
                files, path = self._connection(url, root)
                found = ask(files, path)
            except UserError:
                raise
            except (ImportError, ValueError) as error:
                raise UserError(f"{visible(mask(url))} cannot be opened: {visible(mask(str(error)))}") from error
            except FileNotFoundError as error:
                raise UserError(f"expected an object at {visible(mask(url))}, found none: put it back there") from error
            except Exception as error:  # each kind of storage has its own
                outage.wait(url, error, pause_s, asked)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                self._forget(root, files)
            else:
                outage.end(asked)
                return found

    def _bring_all(self) -> None:
        while True:
            future, file, number = self._tasks.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                self._brought(file, number)
                future.set_result(None)
            except BaseException as error:  # told to who waits for it
                future.set_exception(error)

    def _brought(self, file: RemoteFile, number: int) -> Block:
        fetch = partial(self._fetch_block, file, number)
        return self.cache.get((file.content, number), file.block_size(number), fetch)

    def _fetch_block(self, file: RemoteFile, number: int) -> bytes:
        return self.fetch(file, number * BLOCK_BYTES, file.block_size(number))

    def _read_ahead(self, file: RemoteFile, number: int) -> None:
        """Who reads a block after the one before it, or behind those that were read ahead, reads front to back."""
        last = self._read_last.get(file.content)
        if last == number:
            return
        self._read_last[file.content] = number
        if last is not None and last < number <= last + 1 + _READ_AHEAD:
            end = -(-file.size // BLOCK_BYTES)
            for ahead in range(number + 1, min(number + 1 + _READ_AHEAD, end)):
                self.begin(file, ahead)
        if len(self._read_last) > 4_096:
            self._read_last.clear()

    def _connection(self, url: str, root: str) -> tuple[AbstractFileSystem, str]:
        files = self._files.get(root)
        if files is None:
            options: dict[str, Any] = {}
            if root.partition("://")[0] in _S3:
                # Tries and time-outs are ours: botocore's own would take minutes to say that a store is away.
                pool = self.config.connections + 4
                options = {"config_kwargs": {"max_pool_connections": pool, "retries": {"total_max_attempts": 1}}}
            files, _ = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)
            if hasattr(files, "retries"):
                files.retries = 1
            with self._lock:
                files = self._files.setdefault(root, files)
        return files, str(files._strip_protocol(put_password_back(url)))

    def _forget(self, root: str, files: AbstractFileSystem | None) -> None:
        with self._lock:
            if self._files.get(root) is files:
                del self._files[root]


class _Outage:
    """What all threads of this process know of a store that does not answer."""

    def __init__(self, root: str, patience_s: float) -> None:
        self._root, self._patience_s = root, patience_s
        self._lock = threading.Lock()
        self._first: float | None = None  # failure of this outage
        self._last = self._ended = 0.0

    def wait(self, url: str, error: BaseException, pause_s: float, asked: float) -> None:
        """After a failure of what was asked at a time. Raises UserError when they last too long."""
        reason = " ".join(str(error).split()) or type(error).__name__
        what = visible(mask(f"{type(error).__name__}: {reason}"))[:300]
        with self._lock:
            now = time.monotonic()
            if self._first is None and asked < self._ended:  # of the outage that is over
                return
            if self._first is None or now - self._last > _FORGOTTEN_S:
                self._first = now
                log.warning("%s: %s: waiting for up to %.0f s", mask(self._root), what, self._patience_s)
            self._last, waited_s = now, now - self._first
        if waited_s >= self._patience_s:
            is_refused = isinstance(error, PermissionError) or "Credentials" in type(error).__name__
            remedy = "renew the credentials" if is_refused else "see that it is there"
            raise UserError(
                f"{visible(mask(url))}: expected an answer of the store within store.patience_s={self._patience_s:g}, "
                f"found: {what}: {remedy}, and run the same command again"
            ) from error
        time.sleep(min(pause_s * random.uniform(0.5, 1.0), self._patience_s - waited_s))

    def end(self, asked: float) -> None:
        """After an answer to what was asked at a time."""
        if self._first is not None:
            with self._lock:
                if self._first is not None and asked > self._first:
                    self._ended = time.monotonic()
                    log.info("%s: answers again, after %.0f s", mask(self._root), self._ended - self._first)
                    self._first = None


def _bounded(files: AbstractFileSystem, path: str, begin: int, end: int) -> bytes:
    """A range of an object, within `_REQUEST_S` where the file system can be interrupted."""
    content: bytes
    if files.async_impl:
        from fsspec.asyn import sync

        content = sync(files.loop, files._cat_file, path, start=begin, end=end, timeout=_REQUEST_S)
    else:
        content = files.cat_file(path, start=begin, end=end)
    return content


def _root(url: str) -> str:
    scheme, colon, rest = url.partition("://")
    return f"{scheme}{colon}{rest.partition('/')[0]}"


def _store() -> _Store:
    global _opened
    if _opened is None:
        with _opening:
            _opened = _opened or _Store(_config)
    return _opened


_config = StoreConfig.model_validate({})
_opened: _Store | None = None
_opening = threading.Lock()
