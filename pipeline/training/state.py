"""The training loop's counters: trainer.json of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.atomic_io import read_json
from pipeline.training.best import Best


@dataclass
class State:
    """The loop's counters: trainer.json of a checkpoint. All but `step` are as of the latest look at the device."""

    step: int = 0  # optimizer updates done
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of metrics since the last log line
    count: int = 0
    # The line logged at this step, if its evaluation was stopped: the resumed training begins with both.
    evaluation_stopped: dict[str, float] | None = None
    best: Best = field(default_factory=Best)  # with keep_best
    has_optimizer: bool = True  # of its checkpoint; False after the last step with keep_optimizer: false

    @classmethod
    def read(cls, path: Path) -> State:
        """The state that a checkpoint's trainer.json holds."""
        values = read_json(path)
        return cls(**values | {"best": Best(**values.get("best", {}))})
