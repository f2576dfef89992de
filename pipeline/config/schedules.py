"""Schedules of weights and temperatures over a training's steps; the learning rate's is pipeline/training/schedule.py.

Knows no torch. To add one: a class with `at(step)` here; the fields that may follow it take it as their type.
"""

from __future__ import annotations

import math

from pydantic import Field

from pipeline.config.base import Config


class CosineRamp(Config):
    """A value that moves from `start` to `end` along half a cosine over the first `steps` steps, then stays.

    With `steps: 0` it is `end` from the beginning.
    """

    start: float = Field(ge=0, description="value at step 0")
    end: float = Field(ge=0, description="value from step `steps` on")
    steps: int = Field(ge=0, description="optimizer steps that the way from start to end takes")

    def at(self, step: int) -> float:
        """The value at 0-based optimizer step `step`."""
        if step >= self.steps:
            return self.end
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
