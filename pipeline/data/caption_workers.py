"""Captions encoded in other processes. BPE dropout is Python: in a thread it would take turns with the training's own.

    with CaptionWorkers(encode, seed=0, count=3) as workers:
        ids = workers.encode(captions, epochs, samples)     # encode(caption, random numbers of (seed, epoch, sample))

A worker is `python -m pipeline.data.caption_workers`, which imports no torch. It reads pickles and writes pickles, and
ends when nobody is left to write to it.
"""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from types import TracebackType
from typing import cast

from pipeline.core.seeds import random_of

Encode = Callable[[str, random.Random], Sequence[int]]
_Piece = tuple[str, int, int]  # caption, epoch, sample
# A signal for the training (Ctrl-C, or Slurm's to all processes of a step) is none for a worker that starts.
_DEAF = ["/bin/sh", "-c", 'trap "" INT TERM USR2; exec "$@"', "sh"]


class CaptionWorkers:
    """Processes that encode captions; with `count` 0 it is done right here, and the ids are the same."""

    def __init__(self, encode: Encode, seed: int, count: int) -> None:
        """`encode` is pickled: a function of a module, or an object of a class there."""
        self._encode, self._seed = encode, seed
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [*_DEAF, sys.executable, "-m", "pipeline.data.caption_workers"]
        self._workers = [
            subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(count)
        ]
        for worker in self._workers:
            self._send(worker, (encode, seed))

    def encode(self, captions: Sequence[str], epochs: Sequence[int], samples: Sequence[int]) -> list[Sequence[int]]:
        """The ids of each caption."""
        pieces = list(zip(captions, epochs, samples, strict=True))
        if not self._workers:
            return _encoded(self._encode, self._seed, pieces)
        share = -(-len(pieces) // len(self._workers))
        for index, worker in enumerate(self._workers):
            self._send(worker, pieces[index * share : (index + 1) * share])
        return list(chain.from_iterable(self._answer(worker) for worker in self._workers))

    def __enter__(self) -> CaptionWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.kill()  # it has nothing of its own to save
            worker.communicate()

    def _send(self, worker: subprocess.Popen[bytes], value: object) -> None:
        assert worker.stdin is not None
        try:
            pickle.dump(value, worker.stdin)
            worker.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError(f"a process that encodes captions ended with {worker.wait()}") from error

    def _answer(self, worker: subprocess.Popen[bytes]) -> list[Sequence[int]]:
        assert worker.stdout is not None
        try:
            answer = pickle.load(worker.stdout)
        except EOFError as error:
            raise RuntimeError(f"a process that encodes captions ended with {worker.wait()}") from error
        if isinstance(answer, Exception):
            raise answer
        return cast("list[Sequence[int]]", answer)


def _encoded(encode: Encode, seed: int, pieces: Sequence[_Piece]) -> list[Sequence[int]]:
    return [encode(caption, random_of("caption", seed, epoch, sample)) for caption, epoch, sample in pieces]


def _work() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    sys.stdout = sys.stderr  # what an encoder prints is no answer
    try:
        encode, seed = pickle.load(sys.stdin.buffer)
        while True:
            pieces = pickle.load(sys.stdin.buffer)
            try:
                answer: object = _encoded(encode, seed, pieces)
            except Exception as error:
                answer = error
            pickle.dump(answer, answers)
            answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)


if __name__ == "__main__":
    _work()
