"""What stands for BPE dropout in tests/data/test_tokens.py: functions that other processes import, quickly."""

from __future__ import annotations

import os
import random

from pipeline.core.errors import UserError


def numbered(caption: str, rng: random.Random) -> list[int]:
    return [int(caption.split()[-1]), rng.randrange(2**16), 0]


def own_process(caption: str, rng: random.Random) -> list[int]:
    return [*divmod(os.getpid(), 2**16), 0]


def failing(caption: str, rng: random.Random) -> list[int]:
    raise UserError(f"no ids for {caption}")
