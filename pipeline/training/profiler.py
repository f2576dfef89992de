"""`training.profile`: a trace of some steps by each rank, for Perfetto or chrome://tracing; MLflow gets it, too."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.config.training import ProfileConfig
from pipeline.core import distributed
from pipeline.orchestration.tracking import Tracker


class Profiler:
    """Profiles the steps that the config names; each rank writes `profile/rank-<rank>.json.gz`."""

    def __init__(self, config: ProfileConfig | None, directory: Path, tracker: Tracker) -> None:
        self._config, self._directory, self._tracker = config, directory / "profile", tracker
        self._running: profile | None = None

    def before_step(self, step: int) -> None:
        """`step`: how many are done."""
        config = self._config
        if config is None:
            return
        if step == config.start and self._running is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._running = profile(activities=activities)
            self._running.start()
        elif self._running is not None and step >= config.start + config.steps:
            self.finish()

    def finish(self) -> None:
        """Write what was profiled; the training's end may come before the last step to profile."""
        if self._running is None:
            return
        self._running.stop()
        self._directory.mkdir(exist_ok=True)
        self._running.export_chrome_trace(str(self._directory / f"rank-{distributed.rank():05d}.json.gz"))
        self._running = self._config = None
        distributed.barrier()
        for path in sorted(self._directory.iterdir()) if distributed.is_main() else ():
            self._tracker.artifact(path, folder="profile")
