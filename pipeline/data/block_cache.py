"""Blocks of objects on this node's own disk, within a bound, shared by its processes; each is fetched once.

    cache = BlockCache(folder, most_bytes)
    block = cache.get(("3f…a0", 7), size, fetch)       # from the disk, or what `fetch` returns, of one process alone

    FOLDER/3f…a0/000007         a block and its CRC-32, which is compared when a process reads it first
    FOLDER/3f…a0/000007.part    on its way, locked by who fetches it; the kernel lets go of what a killed process locked
    FOLDER/used                 bytes of all blocks, and how often room was made

Nothing waits for the disk: what a dead machine left half-written is told by its checksum, and fetched again, as is a
block that was damaged since. The blocks that were not used for longest make room for others; so they do when the disk
is full, and where that makes no room, blocks are used without being kept.

Why none of what there is: fsspec's `blockcache` is not safe for several processes, has no bound and no checksums, and
`filecache` fetches whole files; diskcache (SQLite) writes to its database at each read to know what was used, has no
checksums, and lets two processes fetch one key at once; obstore has no cache on disk.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.core.atomic_io import is_full
from pipeline.core.errors import UserError
from pipeline.core.process_limits import open_files

Key = tuple[str, int]  # what the object holds, by a hash, and the number of the block
Block = mmap.mmap | bytes  # at least as long as asked for
Fetch = Callable[[], bytes]
log = logging.getLogger(__name__)

_NAME_DIGITS = 32  # of an object's hash
_CHECKSUM = struct.Struct("<I")
_USED = struct.Struct("<qq")  # bytes of all blocks, times that room was made
_KEPT = 0.9  # of the bound, once room was made
_KEPT_ON_FULL_DISK = 0.8  # of what is there
_USED_AGAIN_S = 30.0  # a block's time of use is this exact
_LOOK_S = 5.0  # between looks for blocks that other processes have removed: until then the disk keeps them
_TRY_AGAIN_S = 30.0  # after a full disk
_POLL_S = 0.002
_PATIENCE_S = 300.0  # with another process that fetches a block: longer than a store is waited for


class _Held:
    """A block that this process has read and compared."""

    def __init__(self, content: mmap.mmap, inode: int, used: float) -> None:
        self.content, self.inode, self.used = content, inode, used


class BlockCache:
    """Blocks in a folder. Threads and processes may share it."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """Raises UserError when the folder cannot be made or written, or is another user's."""
        self.folder, self.most_bytes = folder, most_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[Key, _Held] = OrderedDict()
        self._most_held = max(64, open_files() // 4)  # a mapped file holds a descriptor
        self._compared: dict[Key, int] = {}  # inodes of blocks whose checksum was right
        self._looked, self._evictions = time.monotonic(), -1
        self._full_until, self._told_damage = 0.0, False
        try:
            with self._used() as (bytes_used, evictions, write):
                write(bytes_used, evictions)
            if folder.stat().st_uid != os.getuid():
                raise PermissionError("it is another user's")
        except OSError as error:
            raise UserError(
                f"expected a folder for the cache of object stores that can be written at {folder}, found: {error}:"
                " set store.cache to a folder on a disk of this node"
            ) from error

    @property
    def is_full(self) -> bool:
        """Whether the disk has lately had no room for a block, so that fetching whole ones is in vain."""
        return time.monotonic() < self._full_until

    def has(self, key: Key) -> bool:
        """Whether a block is there, as far as a look tells."""
        return key in self._held or self._path(key).exists()

    def held(self, key: Key) -> Block | None:
        """A block that this process has read lately; None: ask `get`. Takes a microsecond, and no lock."""
        held, now = self._held.get(key), time.monotonic()
        if held is None or now - held.used > _USED_AGAIN_S or now - self._looked > _LOOK_S:
            return None
        return held.content

    def get(self, key: Key, size: int, fetch: Fetch) -> Block:
        """A block of `size` bytes; what `fetch` raises."""
        if held := self._opened(key, size):
            return held
        started = time.monotonic()
        while time.monotonic() - started < _PATIENCE_S:
            with self._filling(key) as descriptor:
                if held := self._opened(key, size):
                    return held
                if descriptor is not None:
                    content = fetch()
                    return self._keep(key, descriptor, content) or content
            time.sleep(_POLL_S)
        return fetch()  # its process hangs

    def drop(self, key: Key) -> None:
        """Forget a block, which turned out to be damaged."""
        with self._lock:
            self._held.pop(key, None)
            self._compared.pop(key, None)
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: Key) -> Path:
        return self.folder / f"{key[0][:_NAME_DIGITS]}/{key[1]:06d}"

    def _opened(self, key: Key, size: int) -> mmap.mmap | None:
        """A block that is there and is whole."""
        now = time.monotonic()
        with self._lock:
            if now - self._looked > _LOOK_S:
                self._looked = now
                self._let_go_of_removed()
            held = self._held.get(key)
            if held is not None:
                self._held.move_to_end(key)
                if now - held.used > _USED_AGAIN_S:
                    held.used = now
                    with suppress(OSError):
                        os.utime(self._path(key))
                return held.content
        found = self._read(key, size)
        if found is None:
            return None
        with self._lock:
            self._held[key] = found
            self._compared[key] = found.inode
            while len(self._held) > self._most_held:
                self._held.popitem(last=False)
        return found.content

    def _read(self, key: Key, size: int) -> _Held | None:
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            about = os.fstat(descriptor)
            is_whole = about.st_size == size + _CHECKSUM.size
            content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if is_whole else None
        finally:
            os.close(descriptor)
        if content is not None and self._compared.get(key) != about.st_ino:
            with memoryview(content) as view, view[:size] as block:
                is_whole = zlib.crc32(block) == _CHECKSUM.unpack_from(content, size)[0]
        if content is None or not is_whole:
            if not self._told_damage:
                log.warning("%s is damaged: that block is fetched again, and so are others, untold", path)
            self._told_damage = True
            self.drop(key)
            return None
        with suppress(OSError):
            os.utime(path)
        return _Held(content, about.st_ino, time.monotonic())

    @contextmanager
    def _filling(self, key: Key) -> Iterator[int | None]:
        """Its `.part`, open and locked; None: somebody else fills it, or has done so meanwhile."""
        part = self._path(key).with_suffix(".part")
        try:
            part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # its folder was empty, and is removed this moment
            yield None
            return
        except OSError as error:
            if not is_full(self.folder, error):
                raise
            yield -1
            return
        try:
            yield descriptor if _is_ours(descriptor, part) else None
        finally:
            os.close(descriptor)

    def _keep(self, key: Key, descriptor: int, content: bytes) -> mmap.mmap | None:
        """Write a block and let it have its name; None: there is no room."""
        for kept in (_KEPT_ON_FULL_DISK, 0.0):
            try:
                if descriptor < 0:
                    raise OSError(28, "no room for another file")
                _write(descriptor, content)
                break
            except OSError as error:
                if not is_full(self.folder, error):
                    raise
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)
                if not kept or not self._make_room(kept):
                    self._is_full_now()
                    return None
        try:
            with self._used() as (used, evictions, write):
                os.rename(self._path(key).with_suffix(".part"), self._path(key))
                write(used + len(content), evictions)
                inode = os.fstat(descriptor).st_ino
        except FileNotFoundError:  # somebody has emptied the cache
            return None
        with self._lock:
            self._compared[key] = inode
        if used + len(content) > self.most_bytes:
            self._make_room(None)
        return self._opened(key, len(content))

    def _is_full_now(self) -> None:
        if not self._full_until:
            log.warning(
                "no space left for the cache of object stores in %s: what does not fit is read from the store each"
                " time; free some, or set store.cache to another disk",
                self.folder,
            )
        self._full_until = time.monotonic() + _TRY_AGAIN_S

    def _make_room(self, kept: float | None) -> bool:
        """Remove the blocks that were not used for longest; whether any was.

        `kept`: the share that stays; None: what the bound lets stay, if there is more.
        """
        with self._used() as (_, evictions, write):
            blocks = sorted(self._all_blocks())
            total = sum(size for _, size, _ in blocks)
            most = total * kept if kept is not None else self.most_bytes * _KEPT
            if kept is None and total <= self.most_bytes:  # another process was faster
                write(total, evictions)
                return False
            removed = 0
            for _, size, path in blocks:
                if total <= most:
                    break
                with suppress(OSError):
                    os.unlink(path)
                    total, removed = total - size, removed + 1
            write(total, evictions + 1)
        with self._lock:
            self._let_go_of_removed()
        return removed > 0

    def _all_blocks(self) -> Iterator[tuple[float, int, str]]:
        """(time of use, bytes, path) of each; what killed processes left half-written is removed, and empty folders."""
        with os.scandir(self.folder) as folders:
            keys = [entry.path for entry in folders if entry.is_dir(follow_symlinks=False)]
        for key in keys:
            found = 0
            with suppress(FileNotFoundError), os.scandir(key) as entries:
                for entry in entries:
                    found += 1
                    with suppress(OSError):
                        about = entry.stat(follow_symlinks=False)
                        if entry.name.endswith(".part"):
                            _remove_if_left(entry.path)
                        else:
                            yield about.st_mtime, about.st_size, entry.path
            if not found:
                with suppress(OSError):
                    os.rmdir(key)

    def _let_go_of_removed(self) -> None:
        """Close blocks that somebody has removed, which keep their room on the disk until then. Hold the lock."""
        with self._used() as (_, evictions, _write):
            if evictions == self._evictions:
                return
            self._evictions = evictions
        for key, held in list(self._held.items()):
            try:
                is_there = os.stat(self._path(key)).st_ino == held.inode
            except OSError:
                is_there = False
            if not is_there:
                del self._held[key]
                self._compared.pop(key, None)

    @contextmanager
    def _used(self) -> Iterator[tuple[int, int, Callable[[int, int], None]]]:
        """Bytes of all blocks, how often room was made, and a function that writes both; locked for all processes."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            content = os.pread(descriptor, _USED.size, 0)
            used, evictions = _USED.unpack(content) if len(content) == _USED.size else (0, 0)

            def write(now_used: int, now_evictions: int) -> None:
                with suppress(OSError):  # on a full disk: counted again when room is made
                    os.pwrite(descriptor, _USED.pack(now_used, now_evictions), 0)

            yield used, evictions, write
        finally:
            os.close(descriptor)


def _write(descriptor: int, content: bytes) -> None:
    """A block and its checksum, in place of whatever a killed process has left there."""
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    for piece in (content, _CHECKSUM.pack(zlib.crc32(content))):
        view = memoryview(piece)
        while view:
            view = view[os.write(descriptor, view) :]


def _is_ours(descriptor: int, part: Path) -> bool:
    """Whether this call locks a `.part`, and it has not got its name, or been removed, since it was opened."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.stat(part).st_ino == os.fstat(descriptor).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove_if_left(part: str) -> None:
    descriptor = os.open(part, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(part)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)
