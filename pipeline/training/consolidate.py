"""A model's folder from a checkpoint, a parameter at a time: no process ever holds the model.

    consolidate(run / "transformer/checkpoints/step-00001000", run / "transformer/model")

Whatever number of processes and ZeRO stage wrote the checkpoint: each parameter is put together from their shards.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.core.atomic_io import atomic_path, read_json, write_json
from pipeline.core.errors import UserError
from pipeline.core.manifest import first_fault
from pipeline.core.tensor_file import TensorLayout
from pipeline.core.weights import SHARD_BYTES, model_files, write_weights
from pipeline.core.writable import Taken, new_folder
from pipeline.orchestration.stage_run import StageRun
from pipeline.training.checkpoint import step_of
from pipeline.training.sharded_state import ShardedState


@dataclass(frozen=True)
class _State:
    """What a checkpoint has of an objective, by its names."""

    layouts: dict[str, TensorLayout]
    read: Callable[[str], Tensor]


def consolidate(
    checkpoint: Path, directory: Path, averaged: bool | None = None, shard_bytes: int = SHARD_BYTES
) -> bool:
    """Write the weights of a checkpoint, in float32, and config.json into a model's folder; whether they are averaged.

    Args:
        averaged: take the averaged weights; None: where there are any.
        shard_bytes: of one file of the folder, at most, if it is not a single tensor's.

    Raises:
        UserError: the checkpoint has no averaged weights, or no model that could be exported.
    """
    if not (checkpoint / "model.json").is_file():
        raise UserError(
            f"expected model.json in the checkpoint {checkpoint}, found none: an older version wrote it;"
            " resume the run, and export the next one"
        )
    exported = read_json(checkpoint / "model.json")
    average = ShardedState(checkpoint, "ema", alone=True)
    if averaged and not average.names:
        raise UserError(
            f"expected averaged weights in {checkpoint}, found none: the training has no ema_decay; add --no-averaged"
        )
    averaged = bool(average.names) if averaged is None else averaged
    state = _of_shards(checkpoint) if (checkpoint / "engine.json").is_file() else _of_one_file(checkpoint)
    of_average = set(average.names) if averaged else set()
    prefix = exported["prefix"]
    names = {name.removeprefix(prefix): name for name in state.layouts if name.startswith(prefix)}

    def read(short: str) -> Tensor:
        name = names[short]
        if name not in of_average:
            value = state.read(name)
            return value.float() if value.is_floating_point() else value
        return _whole(average, name, state.layouts[name].exported)

    write_weights(directory, {short: state.layouts[name].exported for short, name in names.items()}, read, shard_bytes)
    write_json(directory / "config.json", exported["config"])
    return averaged


def export_step(
    run_directory: Path,
    stage: str,
    step: int,
    target: Path | None = None,
    averaged: bool | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[Path, bool]:
    """Export the model of a training stage as it was after `step` steps; its folder, and whether weights are averaged.

    One parameter at a time, from the checkpoint's shards. The stage need not be finished.

    Args:
        target: a new or empty folder; None: `exported/step-N` of the stage.
        averaged: the averaged weights; None: where the training has them.

    Raises:
        Taken: `target` holds something.
        UserError: no such checkpoint, a damaged one, or one without averaged weights.
    """
    checkpoint = find_checkpoint(run_directory / stage, step)
    name = f"step-{step:08d}" + {None: "", True: "-averaged", False: "-not-averaged"}[averaged]
    target = target or run_directory / stage / "exported" / name
    with new_folder(target) as draft:
        averaged = consolidate(checkpoint, draft, averaged, shard_bytes)
    return target, averaged


def exported_step(run_directory: Path, stage: str, step: int) -> Path:
    """The folder of `export_step`: what is there, or what this process or another one at the same time makes.

    Raises:
        UserError: as `export_step`.
    """
    target = run_directory / stage / "exported" / f"step-{step:08d}"
    if not (target / "config.json").is_file():
        try:
            export_step(run_directory, stage, step)
        except Taken:
            if not (target / "config.json").is_file():
                raise
    return target


def finish_model(run: StageRun, checkpoint: Path) -> None:
    """Write model/ and the samples.png of its step, as outputs of the stage; on rank 0 alone."""
    consolidate(checkpoint, run.directory / "model")
    with atomic_path(run.directory / "samples.png") as temporary:
        shutil.copyfile(run.tracker.image_path("samples", step_of(checkpoint)), temporary)
    for name in (*(f"model/{file}" for file in model_files(run.directory / "model")), "samples.png"):
        run.add_output(name, artifact=True)


def find_checkpoint(stage: Path, step: int) -> Path:
    """The complete checkpoint of a stage after `step` steps, whose files are as they were written.

    Raises:
        UserError: there is none, it is damaged, or it cannot be read.
    """
    checkpoint = stage / "checkpoints" / f"step-{step:08d}"
    if not (checkpoint / "manifest.json").is_file():
        found = [str(int(p.name.removeprefix("step-"))) for p in sorted((stage / "checkpoints").glob("step-????????"))]
        raise UserError(f"no checkpoint at {checkpoint}: the steps that have one are {', '.join(found) or 'none'}")
    try:
        fault = first_fault(checkpoint, read_json(checkpoint / "manifest.json")["files"])
    except OSError as error:
        raise UserError(f"{checkpoint}: the checkpoint cannot be read ({error}); export another one") from error
    if fault:
        raise UserError(f"{fault}: the checkpoint is damaged; export another one")
    return checkpoint


def _of_shards(checkpoint: Path) -> _State:
    """DeepSpeed's engine: float32 weights, and the buffers."""
    state = read_json(checkpoint / "engine.json")
    weights, buffers = (ShardedState(checkpoint, kind, alone=True) for kind in ("training", "buffers"))
    layouts = {name: TensorLayout(torch.float32, tuple(shape)) for name, shape in state["shapes"].items()}
    of_buffers = {name: TensorLayout(buffers.dtype(name), tuple(s)) for name, s in state.get("buffers", {}).items()}

    def read(name: str) -> Tensor:
        if name in of_buffers:
            return _whole(buffers, name, of_buffers[name])
        return _whole(weights, f"weight:{name}", layouts[name])

    return _State(layouts | of_buffers, read)


def _of_one_file(checkpoint: Path) -> _State:
    """Accelerate's engine: a state dict, mapped, of which is read what is asked for."""
    state = torch.load(checkpoint / "training.pt", map_location="cpu", mmap=True, weights_only=True)["model"]
    return _State({name: TensorLayout.of(value) for name, value in state.items()}, state.__getitem__)


def _whole(saved: ShardedState, name: str, layout: TensorLayout) -> Tensor:
    flat = torch.empty(layout.elements, dtype=layout.dtype)
    saved.read_into(name, 0, flat)
    return flat.view(layout.shape)
