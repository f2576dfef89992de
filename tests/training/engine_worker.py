"""Run by tests/training/test_engines.py, by one or two processes: trainings of a small network on an engine."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.config.training import DeepSpeedConfig, TrainingConfig, accumulation_steps
from pipeline.config.transformer import TransformerConfig
from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.initial_values import InitialValues, initial_values
from pipeline.core.objective import Exported, Objective
from pipeline.training.checkpoint_files import write_files
from pipeline.training.ema import Ema
from pipeline.training.engines import build_engine
from pipeline.training.engines.base import Engine, Start, shapes_of
from pipeline.training.engines.partitioned_start import give_memory
from pipeline.training.schedule import learning_rate_factor
from pipeline.training.sharded_state import ShardedState, shards_file
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.objective import JointObjective
from tests.no_sync import HostSync
from tests.no_sync import _Operations as no_wait  # DeepSpeed moves tensors to where they are, by name

STEPS, BATCH, WIDTH, HIDDEN = 6, 8, 12, 30  # odd enough that slices of ZeRO cut through parameters
LAYOUT = Layout.of(3, 11, [(1, 1, 7), (2, 2, 7), (3, 3, 9)])  # of the transformers


@dataclass(frozen=True)
class Case:
    """One training."""

    kind: Literal["accelerate", "deepspeed"] = "deepspeed"
    zero: int = 1
    accumulation: int = 1
    optimizer: str = "adamw"
    precision: str = "fp32"
    overlap: bool = False
    offload: bool = False
    recompute: bool = False
    dropout: bool = False
    without_memory: bool = False  # built so; its initial weights are drawn by the engine, or come from a checkpoint
    order: str | None = None  # a transformer of this order, in place of the small network
    average: bool = False  # of weights: what the training ends with, and what is saved beside the weights
    may_wait: bool = True  # False: a step after the first two that waits for the device is an error
    poisoned_step: int | None = None  # one sample of the last process is not a number
    first_step: int = 0
    last_step: int = STEPS
    load: str | None = None
    save: str | None = None

    @property
    def name(self) -> str:
        default = Case()
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return " ".join(f"{k}={v}" for k, v in changed.items() if k in ("kind", "zero") or v != getattr(default, k))


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(dropout)
        self.into, self.out = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.out(nn.functional.gelu(self.into(self.norm(x)))))


class SmallObjective(Objective):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def exported(self) -> Exported:
        return Exported("", {"small": True})

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["x"].to(self.head.weight.dtype)  # in bf16 with bf16-weights
        for block in self.layers:
            x = block(x)
        return (self.head(x).to(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean(), {}


def objective_of(case: Case) -> Objective:
    if case.order is None:
        return SmallObjective(dropout=0.3 if case.recompute or case.dropout else 0.0)
    shape = {"layers": 2, "width": 16, "heads": 2, "order": case.order, "caption_dropout": 0.0}
    if case.order == "scale":
        shape["code_noise"] = 0.0  # it is drawn by each process for its samples
    config = TransformerConfig.model_validate(shape)
    return JointObjective(build_transformer(LAYOUT, config), config)


def global_batch(step: int, poisoned: bool = False, order: str | None = None) -> dict[str, Tensor]:
    if order is not None:
        numbers = torch.Generator().manual_seed(step)
        text, codes = (
            torch.randint(1, most, (BATCH, count), generator=numbers)
            for most, count in ((LAYOUT.text_vocab_size, LAYOUT.text_length), (7, LAYOUT.image_length))
        )
        return {"text": text, "codes": codes}
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
    if poisoned:
        x[-1, 0] = float("nan")
    return {"x": x}


def without_memory(case: Case) -> tuple[Objective, InitialValues]:
    with initial_values(0) as initial:
        objective = objective_of(case)
    if case.order:  # gradients of smaller queries are rounding alone, of which Adam makes whole steps
        initial.replace(lambda parameter, drawn: drawn if parameter.ndim < 2 else 5 * drawn)
    return objective, initial


def started(case: Case) -> Objective:
    """With memory, and the initial values of seed 0."""
    objective, initial = without_memory(case)
    give_memory(objective, initial, drawn=True)
    return objective


def training(case: Case, processes: int) -> TrainingConfig:
    return TrainingConfig(
        optimizer=case.optimizer,
        steps=STEPS,
        batch_size=BATCH,
        micro_batch_size=BATCH // processes // case.accumulation,
        precision=case.precision,
        activation_checkpointing=case.recompute,
        learning_rate=1e-2,
        warmup_steps=3,
        gradient_clipping=0.5,
        weight_decay=0.1,
    )


def run(case: Case, folder: Path) -> dict[str, Any]:
    config = training(case, distributed.world_size())
    torch.manual_seed(0)
    if case.without_memory:
        objective, initial = without_memory(case)
        start = Start(initial, drawn=not case.load)
    else:
        objective, start = started(case), None
    shapes = shapes_of(objective)
    zero = DeepSpeedConfig(
        zero_stage=case.zero,
        overlap_communication=case.overlap,
        offload_optimizer=case.offload,
    )
    try:
        engine = build_engine(case.kind, objective, config, zero, folder, start)
        ema = Ema(engine.local_parameters, 0.8) if case.average else None
        if case.load:
            engine.load(folder / case.load)
            if ema:
                engine.read_shards(ema.average, ShardedState(folder / case.load, "ema"))
                ema.updates = case.first_step
    except UserError as error:
        return {"error": str(error)}
    rank, world = distributed.rank(), distributed.world_size()
    micro_batches = accumulation_steps(config, world)
    norms, applied = [], []
    for step in range(case.first_step, case.last_step):
        torch.manual_seed(step)
        waits = nullcontext() if case.may_wait or step < 2 else no_wait("cpu")
        batch = global_batch(step, step == case.poisoned_step, case.order)
        parts = [
            dict(zip(batch, own, strict=True))
            for own in zip(*(x.chunk(world * micro_batches) for x in batch.values()), strict=True)
        ]
        try:
            with waits:
                for index, micro in enumerate(parts[rank * micro_batches : (rank + 1) * micro_batches]):
                    last = index == micro_batches - 1
                    engine.accumulate(micro, step, 1 / micro_batches, last)
                update = engine.update(learning_rate_factor(config, step))
                if ema:
                    ema.update(update.applied)
        except HostSync as error:
            return {"error": str(error)}
        norms.append(float(update.gradient_norm))
        applied.append(bool(update.applied))
    if case.save or case.average:
        _save(engine, ema, folder / (case.save or f"{case.name} at the end of {world}"))
    averaged = sum(part.numel() for part in ema.average.values()) if ema else 0
    dtypes = {parameter.dtype for parameter in objective.parameters()}
    weights = not_averaged = _gathered(engine, shapes)
    if ema:
        ema.swap()
        weights = _gathered(engine, shapes)
    return {
        "weights": weights,
        "not averaged": not_averaged,
        "norms": norms,
        "applied": applied,
        "averaged": averaged,
        "dtypes": dtypes,
    }


def _save(engine: Engine, ema: Ema | None, folder: Path) -> None:
    if distributed.is_main():
        folder.mkdir(parents=True)
    distributed.barrier()
    files = engine.checkpoint_files()
    if ema:
        files |= [shards_file("ema", engine.local_shards(ema.average))]
    if distributed.is_main():
        files["model.json"] = vars(engine.objective.exported())
    write_files(folder, files)
    distributed.barrier()


def _gathered(engine: Engine, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Every parameter in float32, from what the processes hold now."""
    mine = [(shard.name, shard.start, shard.value) for shard in engine.local_shards(engine.local_parameters())]
    weights = {name: torch.full([math.prod(shape)], torch.nan) for name, shape in shapes.items()}
    for of_rank in distributed.all_gather_objects(mine):
        for name, start, value in of_rank:
            weights[name][start : start + value.numel()] = value.flatten()
    return {name: weights[name].view(shape) for name, shape in shapes.items()}


def main(cases: str, folder: str) -> None:
    distributed.init()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    results = {}
    for values in json.loads(cases):
        case = Case(**values)
        results[case.name] = run(case, Path(folder))
        _forget_accelerate()
        gc.freeze()  # at ZeRO-3 each engine collects garbage: half a second among all that DeepSpeed has imported
    needless = {"mlflow", "torch._inductor.compile_fx"} & sys.modules.keys()
    assert not needless, f"expected a start without them, found {needless}: they take seconds"
    if distributed.is_main():
        torch.save(results, Path(folder) / "results.pt")
    distributed.leave(0)


def _forget_accelerate() -> None:
    """Accelerate allows one precision per process."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()


if __name__ == "__main__":
    main(*sys.argv[1:])
