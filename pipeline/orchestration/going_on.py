"""A training that resumes from its checkpoint though its config changed: more steps, or with --amend what may change.

Its directory then stays where it is. What changed, and after which step, is recorded in its identity.json as
`amendments`, and in the manifest when it is finished. Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

from pipeline.config.base import flatten
from pipeline.config.pipeline import PipelineConfig
from pipeline.core.atomic_io import read_json
from pipeline.core.checkpoint_names import saved_steps
from pipeline.core.errors import UserError
from pipeline.orchestration.graph import SHARES, Stage, as_of_today

log = logging.getLogger(__name__)

# Of `training`: each is read at the step it is used in. (What is operational needs no --amend.) The weights of
# prepare.sources are amendable, too.
AMENDABLE = (
    *("learning_rate", "muon_learning_rate", "schedule", "warmup_steps", "decay_fraction"),
    *("final_learning_rate_ratio", "evaluate_every", "evaluate_batches", "keep_best.patience"),
)
_ABSENT = "(absent)"


class Amendment(TypedDict):
    """One key of a config that changed in the middle of a training."""

    step: int  # done before
    key: str  # transformer.training.learning_rate
    old: object
    new: object


def recorded_identity(directory: Path) -> object:
    """The identity that a stage directory is made from, as it is after amendments; None if there is none."""
    path = directory / "identity.json"
    if not path.exists():
        return None
    found: dict[str, object] = read_json(path)
    found.pop("amendments", None)
    return found | {"config": as_of_today(cast(dict[str, object], found["config"]))}


def amendments_of(directory: Path) -> list[Amendment]:
    """What changed in the middle of a stage's training, oldest first."""
    path = directory / "identity.json"
    found: list[Amendment] = read_json(path).get("amendments", []) if path.exists() else []
    return found


def new_amendments(directory: Path, stage: Stage, wanted: Mapping[str, object], amend: bool) -> list[Amendment]:
    """With which changes the training in `directory` resumes as `wanted`, an identity.

    Empty: it is `wanted`, or other things changed, too, so that it starts over.

    Args:
        amend: changes in the middle of a training are wanted; more steps are without.

    Raises:
        UserError: they are not wanted, or there is nothing left to train.
    """
    recorded = recorded_identity(directory)
    if not stage.trains or recorded is None or recorded == wanted:
        return []
    before, after = flatten(recorded), flatten(dict(wanted))
    changed = [key for key in sorted(before | after) if before.get(key, _ABSENT) != after.get(key, _ABSENT)]
    prefix = f"config.{stage.section}.training."
    names = ["steps" if key == f"{prefix}steps" else key for key in changed]
    if not {*names} <= {f"{prefix}{name}" for name in AMENDABLE} | {"steps", f"config.{SHARES}"}:
        return []
    step, (old_steps, steps) = _newest_step(directory), (_steps(before, prefix), _steps(after, prefix))
    finished = (directory / "_SUCCESS").exists()
    if finished and amend and stays_finished(recorded, wanted):
        return [Amendment(step=steps, key=SHARES, old=before[changed[0]], new=after[changed[0]])]
    if step == 0:
        if finished:
            log.warning("%s: no checkpoint is left to go on from: it starts over", stage.name)
        return []
    found = [
        Amendment(step=step, key=key.removeprefix("config."), old=before.get(key, _ABSENT), new=after.get(key, _ABSENT))
        for key in changed
    ]
    if finished and "steps" not in names and not amend:
        return []  # another training, as ever
    _expect_wanted(stage, found, step, old_steps, steps, amend)
    return found


def stays_finished(recorded: object, wanted: object) -> bool:
    """Whether a training that is finished stays so, when these two are its config: --amend gave sources other weights.

    What it has drawn from each, its amendments say.
    """
    before, after = flatten(recorded), flatten(wanted)
    changed = [key for key in before.keys() | after.keys() if before.get(key, _ABSENT) != after.get(key, _ABSENT)]
    return [key.rpartition(".")[2] for key in changed] == [SHARES]


def shares_of_training(config: PipelineConfig, stage: Stage, directory: Path) -> list[tuple[int, list[int]]]:
    """From which sample of a training on how many of each 1,000 come from each of prepare.sources; of one, empty."""
    training, now = config.training(stage.section), list(config.prepare.source_shares)
    if not now or training is None:
        return []
    changes = [change for change in amendments_of(directory) if change["key"] == SHARES]
    from_step = {0: changes[0]["old"] if changes else now} | {change["step"]: change["new"] for change in changes}
    return [(step * training.batch_size, cast(list[int], shares)) for step, shares in sorted(from_step.items())]


def _expect_wanted(stage: Stage, found: list[Amendment], step: int, old_steps: int, steps: int, amend: bool) -> None:
    told = "; ".join(f"{change['key']}: {change['old']} -> {change['new']}" for change in found)
    anew = "or name=… to train another model"
    if steps <= step:
        raise UserError(
            f"{stage.name}: expected training.steps above {step}, which are done, found {told}: set more steps,"
            f" set back what changed, {anew}"
        )
    more_steps_alone = len(found) == 1 and steps > old_steps
    if not (amend or more_steps_alone):
        raise UserError(
            f"{stage.name}: expected the config that the training began with, found {told} after step {step} of"
            f" {old_steps}: add --amend to go on with it, set it back, {anew}"
        )


def _steps(flat: Mapping[str, object], prefix: str) -> int:
    return int(str(flat[f"{prefix}steps"]))


def _newest_step(directory: Path) -> int:
    """Of a training's complete checkpoints; 0: there is none."""
    return max(saved_steps(directory / "checkpoints"), default=0)
