"""run.json: which config file a run was made from, and by which format of run directories."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipeline.config.pipeline import is_run_config
from pipeline.core.errors import UserError

FORMAT = 1  # of run.json; a higher one is of a later version, which may mean something else by the same names


def source_name(path: str) -> str:
    """The name under which a run directory records its config file; a run's own copy stands for the original.

    Empty: a run's own copy, beside a run.json that is missing or damaged.
    """
    file = Path(path) / "config.yaml" if os.path.isdir(path) else Path(path)
    return recorded_source(file.parent) if is_run_config(file) else file.name


def recorded_source(run_directory: Path) -> str:
    """The name of the config file that run.json records; empty if run.json is missing or damaged.

    Raises:
        UserError: a later version of Smalti made the run.
    """
    try:
        record = json.loads((run_directory / "run.json").read_text())
        made_by, source = record.get("format", FORMAT), record["config_file"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    if not isinstance(made_by, int) or made_by > FORMAT:
        raise UserError(
            f"{run_directory / 'run.json'}: expected format {FORMAT} or lower, found {made_by}:"
            f" a later version of Smalti made this run; use that one"
        )
    return str(source)
