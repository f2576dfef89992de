"""A config, or a run: what it names is there, its tracking answers, its extractors have their weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.evaluate import EXTRACTORS
from pipeline.config.pipeline import PipelineConfig
from pipeline.core.errors import UserError
from pipeline.core.lock import owner_of
from pipeline.core.writable import check_writable
from pipeline.doctor.finding import Finding, fail, note, ok
from pipeline.orchestration.mlflow_store import Store


def run_directory(config: PipelineConfig) -> Iterator[Finding]:
    folder = config.run_directory
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        check_writable(folder / "config.yaml")
    except UserError as error:
        yield fail("run directory", f"{error} (runs=…)")
        return
    for path in made:
        path.rmdir()
    held = [path.stem for path in sorted((folder / "locks").glob("*.json")) if owner_of(path)]
    if held:
        yield note("run directory", f"{folder}: being written now: {', '.join(held)}")
    else:
        yield ok("run directory", f"{folder}")


def tracking(config: PipelineConfig) -> Iterator[Finding]:
    if not config.tracking.enabled:
        yield note("mlflow", "tracking.enabled: false: metrics stay in metrics.jsonl")
        return
    with tempfile.TemporaryDirectory() as temporary:
        # The run's own database is made at its start; whether MLflow works here is asked of another one.
        probe = config.model_copy(update={"runs": Path(temporary)})
        store = Store(config) if config.tracking.uri else Store(probe)
        probe.run_directory.mkdir(parents=True, exist_ok=True)
        try:
            store.connect().search_experiments(max_results=1)
        except Exception as error:  # MLflow's, SQLAlchemy's, requests', of many kinds
            said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            yield fail("mlflow", f"expected a store that answers at {store.uri}, found: {said}: mend tracking.uri,"
                                 " start the server, or set tracking.enabled=false")  # fmt: skip
        else:
            yield ok("mlflow", config.tracking.uri or "a database in the run directory")


def extractors(config: PipelineConfig | None) -> Iterator[Finding]:
    """Weights of each extractor; those that the config does not use are notes."""
    import torch

    from pipeline.extractors.registry import load_extractor

    used = config.evaluate.extractor if config else None
    for name in EXTRACTORS:
        weights = config.evaluate.weights if config and name == used else None
        if name != used and name in ("clip", "dinov2"):
            continue  # without a folder there is nothing to look at
        try:
            load_extractor(name, torch.device("cpu"), weights=weights)
        except UserError as error:
            yield fail(f"weights {name}", str(error)) if name == used else note(f"weights {name}", str(error))
        else:
            yield ok(f"weights {name}", "there")
