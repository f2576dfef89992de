"""Who is there: ranks announce themselves to rank 0 before they import torch, which takes minutes from a cold disk.

Each rank keeps one connection to rank 0 and sends lines of JSON, which tell what it knows of itself; a connection that
ends is a process that died. Knows no torch.
"""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_RETRY_S = 0.2
_POLL_S = 0.05


class RollCall:
    """Rank 0's side: what each rank has said, and which ones have died."""

    def __init__(self, port: int, processes: int) -> None:
        self.said: dict[int, dict[str, Any]] = {}
        self.died: set[int] = set()
        self.first_arrival: float | None = None  # time.monotonic()
        self.last_arrival: float | None = None
        self.refused = ""  # why a connection could not be taken
        self._processes = processes
        self._listener: socket.socket | None = socket.create_server(("", port), backlog=processes)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._received: dict[socket.socket, bytes] = {}
        self._rank_of: dict[socket.socket, int] = {}
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="roll call", daemon=True)
        self._thread.start()

    def note(self, rank: int, **facts: Any) -> None:
        """Add what a rank says of itself."""
        with self._lock:
            self.said.setdefault(rank, {}).update(facts)
            if "host" in facts:
                self.last_arrival = time.monotonic()
                self.first_arrival = self.first_arrival or self.last_arrival

    def wait_for(self, fact: str, deadline: Callable[[], float], despite_deaths: bool = False) -> list[int]:
        """Wait until each rank has said `fact`, or one has died; the ranks that have not until then or the deadline.

        Args:
            despite_deaths: wait on for those that live.
        """
        while True:
            missing = [rank for rank in range(self._processes) if fact not in self.said.get(rank, {})]
            dead = self.died.intersection(missing)
            ended = len(dead) == len(missing) if despite_deaths else not missing or dead
            if ended or time.monotonic() > deadline():
                return missing
            time.sleep(_POLL_S)

    def hosts(self) -> dict[int, str]:
        """The host of each rank that has announced itself."""
        return {rank: facts["host"] for rank, facts in self.said.items() if "host" in facts}

    def tell(self, word: str) -> None:
        """Send one word to all ranks."""
        for connection in list(self._rank_of):
            with suppress(OSError):
                connection.sendall(f"{word}\n".encode())

    def hand_over_listener(self) -> int:
        """Stop taking new ranks; the descriptor of the socket that listens is the caller's, who serves the port now."""
        assert self._listener is not None
        self._selector.unregister(self._listener)
        listener, self._listener = self._listener, None
        return listener.detach()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select(timeout=_POLL_S):
                if key.fileobj is self._listener and self._listener is not None:
                    self._take(self._listener)
                elif isinstance(key.fileobj, socket.socket):
                    self._read(key.fileobj)

    def _take(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:  # without a file left the listener stays ready
            self.refused = str(error)
            time.sleep(_POLL_S)
            return
        self._received[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ, None)

    def _read(self, connection: socket.socket) -> None:
        chunk = b""
        with suppress(OSError):
            chunk = connection.recv(65_536)
        if not chunk:
            self._selector.unregister(connection)
            if (rank := self._rank_of.pop(connection, None)) is not None:
                self.died.add(rank)
            connection.close()
            return
        *lines, self._received[connection] = (self._received[connection] + chunk).split(b"\n")
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):  # somebody else's words
                facts = json.loads(line)
                rank = int(facts.pop("rank"))
                if rank in range(self._processes):
                    self._rank_of[connection] = rank
                    self.note(rank, **facts)


class Announced:
    """Another rank's side. It connects in the background, for rank 0 may start later."""

    def __init__(self, address: str, port: int, rank: int, host: str, patience_s: float) -> None:
        self._address, self._port, self._rank = address, port, rank
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._connect, args=(host, patience_s), daemon=True)
        self._thread.start()

    def say(self, **facts: Any) -> bool:
        """Tell rank 0; False if it cannot be reached."""
        self._thread.join()
        if self._connection is None:
            return False
        try:
            self._connection.sendall((json.dumps({"rank": self._rank} | facts) + "\n").encode())
        except OSError:
            return False
        return True

    def hear(self, timeout_s: float) -> str:
        """The word that rank 0 tells all; empty if it tells none in time, or is gone."""
        self._thread.join()
        if self._connection is None:
            return ""
        self._connection.settimeout(timeout_s)
        with suppress(OSError), self._connection.makefile() as lines:
            return lines.readline().strip()
        return ""

    def _connect(self, host: str, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while self._connection is None and time.monotonic() < deadline:
            try:
                connection = socket.create_connection((self._address, self._port), timeout=5)
                connection.sendall((json.dumps({"rank": self._rank, "host": host}) + "\n").encode())
                connection.settimeout(None)
                self._connection = connection
            except OSError:  # rank 0 does not listen yet
                time.sleep(_RETRY_S)
