"""Tracking: what a stage appends to two files is the truth, MLflow its mirror (`mlflow_mirror.py`).

    metrics.jsonl    a line a step: {"step": 20, "time": …, "loss": …}
    tracking.jsonl   the rest: {"started": …, "mirrored": true}, {"artifact": "images/a.png", "folder": "images"},
                     {"ended": "FINISHED"}

So whatever MLflow could not take, a later process finds here and sends.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import psutil

from pipeline.core.atomic_io import write_atomic
from pipeline.orchestration.gpu_metrics import gpu_metrics

if TYPE_CHECKING:
    from PIL import Image

METRICS, EVENTS = "metrics.jsonl", "tracking.jsonl"
Status = Literal["FINISHED", "KILLED", "FAILED"]


class Mirroring(Protocol):
    """What sends a stage's files elsewhere, in the background."""

    def start(self) -> None:
        """Begin to send."""

    def close(self, status: Status) -> None:
        """Send the rest, for as long as that may take."""


class Tracker:
    """The metrics, images and artifacts of a stage. On ranks other than 0 (`active=False`) methods do nothing."""

    def __init__(self, directory: Path, mirror: Mirroring | None, *, every_s: float = 5.0, active: bool = True) -> None:
        self.directory = directory
        self.active = active
        self._mirror = mirror
        self._every_s = every_s
        self._system_logged = 0.0

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append a line to metrics.jsonl; every few seconds with system metrics."""
        if not self.active or not metrics:
            return
        line: dict[str, float] = {"step": step, "time": time.time()} | metrics
        if time.monotonic() - self._system_logged > self._every_s:
            line |= _system_metrics()
            self._system_logged = time.monotonic()
        _append(self.directory / METRICS, line)

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        """Save an image of this step under images/ and as an artifact."""
        if not self.active:
            return
        path = self.image_path(name, step)
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        self.artifact(path, folder="images")

    def image_path(self, name: str, step: int) -> Path:
        """Where `log_image` saves."""
        return self.directory / "images" / f"{name}-{step:08d}.png"

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Name a file of the stage that MLflow gets, in this folder there."""
        self._event({"artifact": str(path.relative_to(self.directory)), "folder": folder})

    def truncate(self, step: int) -> None:
        """Remove the lines after `step`: a resumed training writes them again."""
        path = self.directory / METRICS
        if not self.active or not path.exists():
            return
        lines = path.read_text().splitlines()
        kept = [line for line in lines if parsed(line).get("step", step + 1) <= step]
        if len(kept) < len(lines):
            write_atomic(path, "".join(line + "\n" for line in kept))

    def start(self) -> None:
        """Record that the stage starts, and start the mirror."""
        self._event({"started": time.time(), "mirrored": self._mirror is not None})
        if self._mirror:
            self._mirror.start()

    def close(self, status: Status) -> None:
        """Record how the stage ended; the mirror sends what is left."""
        self._event({"ended": status})
        if self._mirror:
            self._mirror.close(status)

    def _event(self, event: dict[str, object]) -> None:
        if self.active:
            _append(self.directory / EVENTS, event)


def parsed(line: str) -> dict[str, Any]:
    """The values of a line of either file; empty if it is damaged, as the last one of a killed process."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def metrics_of(line: str) -> tuple[int, float, dict[str, float]] | None:
    """Step, time and metrics of a line of metrics.jsonl; None if it is damaged."""
    values = parsed(line)
    numbers = {name: float(v) for name, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    step, at = numbers.pop("step", math.nan), numbers.pop("time", math.nan)
    return (int(step), at, numbers) if math.isfinite(step) and math.isfinite(at) else None


def read_history(directory: Path) -> list[dict[str, float]]:
    """A stage's metrics.jsonl: "step", "time" and the metrics of each step, in order of steps.

    A killed stage may have left half a line, and lines of steps that it repeated later: the later value holds.
    """
    path, lines = directory / METRICS, dict[int, dict[str, float]]()
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        if found := metrics_of(text):
            step, at, metrics = found
            lines[step] = lines.get(step, {}) | {"step": step, "time": at} | metrics
    return [lines[step] for step in sorted(lines)]


def _append(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def _system_metrics() -> dict[str, float]:
    memory = psutil.virtual_memory()
    return {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_used_bytes": memory.total - memory.available,
        "system/process_memory_bytes": psutil.Process().memory_info().rss,
        **gpu_metrics(),
    }
