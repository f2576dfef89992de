"""What a save costs a training, and whether killed trainings resume: the figures in docs/training.md.

    python -m benchmarks.checkpoints stall                       # seconds that a step waits, in the background or not
    python -m benchmarks.checkpoints kills FOLDER -n 100 -p 2    # SIGKILLs at random moments around saves
    python -m benchmarks.checkpoints export                      # peak memory of an export from a checkpoint's shards

The bars: a save in the background stalls a step for no more than 10 % of the time of one that is waited for; every kill
leaves a complete checkpoint, and the weights at the end are those of an undisturbed training, bit for bit.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

from benchmarks.checkpoint_kills import Training, kills, prepared_run
from benchmarks.plan_memory import status_bytes

if TYPE_CHECKING:
    from pipeline.training.ema import Ema
    from pipeline.training.engines.base import Engine
    from pipeline.transformer.objective import JointObjective

_ROUNDS = 4


@click.group()
def main() -> None:
    """Figures of checkpoints."""


@main.command("kills")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-n", "--kills", "count", default=200, show_default=True)
@click.option("-p", "--processes", default=1, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--minutes", default=1e6, help="kill no more after these")
@click.option("--steps", default=40, show_default=True, help="of each training")
def kill(folder: Path, count: int, processes: int, seed: int, minutes: float, steps: int) -> None:
    """Kill trainings in FOLDER, which gets a tiny run if it has none."""
    run = folder / "tiny"
    if not (run / "tokenize" / "_SUCCESS").exists():
        run = prepared_run(folder)
    began = time.monotonic()
    report = kills(Training(run, processes, steps), count, seed, 60 * minutes)
    print(
        f"{report.kills} kills on {processes} processes in {time.monotonic() - began:.0f} s, {report.half_saves} in"
        f" the middle of a save; {report.ends} trainings ended, {report.other_weights} with other bits;"
        f" {len(report.faults)} faults"
    )
    print("\n".join(report.faults))
    sys.exit(not report.holds)


@main.command()
@click.option("--width", default=512, show_default=True)
@click.option("--layers", default=12, show_default=True)
def stall(width: int, layers: int) -> None:
    """Saves of one training, in turns in the background and waited for, with training steps after each."""
    import torch

    from pipeline.training.checkpoint import Checkpoints
    from pipeline.training.checkpoint_files import Files
    from pipeline.training.sharded_state import shards_file

    with tempfile.TemporaryDirectory() as folder:
        engine, average, step = _training(Path(folder), width, layers)
        parameters = sum(p.numel() for p in engine.objective.parameters())
        took: dict[str, list[float]] = {"waited for": [], "in the background": []}
        quiet, busy = [_timed(step) for _ in range(2)][1:], []
        checkpoints = {
            name: Checkpoints(Path(folder) / name.replace(" ", "-"), 1, in_background="back" in name) for name in took
        }
        for number in range(1, _ROUNDS + 1):
            for name in took:
                started = time.monotonic()
                files: Files = engine.checkpoint_files()
                files |= [shards_file("ema", engine.local_shards(average.average))]
                checkpoints[name].save(number, files)
                took[name].append(time.monotonic() - started)
                in_background = name != "waited for"
                (busy if in_background else quiet).append(_timed(step))
                checkpoints[name].finish()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / len(took)
    first, *later = took["in the background"]
    whole = median(took["waited for"])
    print(f"{parameters / 1e6:.0f} M parameters, {size / 1e9:.2f} GB a checkpoint, torch {torch.__version__}")
    print(f"a save that is waited for     {whole:7.2f} s")
    print(f"stall of one in the background {median(later):6.2f} s, {median(later) / whole:.1%} of it (bar 10 %)")
    print(f"stall of the first one        {first:7.2f} s, {first / whole:.1%}: the copy's memory is new")
    print(f"a step, and beside a save     {median(quiet):7.2f} s, {median(busy):.2f} s")


@main.command()
@click.option("--width", default=1536, show_default=True)
@click.option("--layers", default=16, show_default=True)
@click.option("--processes", default=2, show_default=True, help="that wrote the checkpoint")
def export(width: int, layers: int, processes: int) -> None:
    """Export a checkpoint that is made here of random numbers, in a process whose memory is watched."""
    with tempfile.TemporaryDirectory() as folder:
        parameters, largest = _fake_checkpoint(Path(folder) / "checkpoint", width, layers, processes)
        worker = [sys.executable, "-m", "benchmarks.checkpoints", "export-worker", folder]
        done = subprocess.run(worker, capture_output=True, text=True, check=True)
        before, peak, seconds = (float(value) for value in done.stdout.split())
        files = sorted(path.name for path in (Path(folder) / "model").iterdir())
    print(
        f"{parameters / 1e6:.0f} M parameters ({4 * parameters / 1e9:.2f} GB) of {processes} processes: {seconds:.1f} s"
    )
    print(f"rise of resident memory {(peak - before) / 1e6:.0f} MB; the largest parameter has {largest / 1e6:.0f} MB")
    print(f"files: {', '.join(files)}")


@main.command("export-worker", hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
def export_worker(folder: Path) -> None:
    from pipeline.training.consolidate import consolidate

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, began = status_bytes("VmRSS"), time.monotonic()
    consolidate(folder / "checkpoint", folder / "model", averaged=False, shard_bytes=500_000_000)
    print(before, status_bytes("VmHWM"), time.monotonic() - began)


def _fake_checkpoint(folder: Path, width: int, layers: int, processes: int) -> tuple[int, int]:
    """What an export reads, as if processes at ZeRO-3 had written it; parameters, and the largest's bytes."""
    import torch

    from pipeline.training.checkpoint_files import write_files

    with torch.device("meta"):
        objective = _objective(width, layers)
    shapes = {name: list(parameter.shape) for name, parameter in objective.named_parameters()}
    folder.mkdir()
    for rank in range(processes):
        shards = {}
        for name, parameter in objective.named_parameters():
            length = -(-parameter.numel() // processes)
            count = min(length, parameter.numel() - rank * length)
            shards[f"weight:{name}@{rank * length}"] = torch.rand(count)
        write_files(folder, {f"training-{rank:05d}.safetensors": shards})
    write_files(folder, {"engine.json": {"shapes": shapes}, "model.json": vars(objective.exported())})
    sizes = [parameter.numel() for parameter in objective.parameters()]
    return sum(sizes), 4 * max(sizes)


def _objective(width: int, layers: int) -> JointObjective:
    from pipeline.config.transformer import TransformerConfig
    from pipeline.transformer.layout import Layout
    from pipeline.transformer.model import Transformer
    from pipeline.transformer.objective import JointObjective

    shape = TransformerConfig(width=width, layers=layers, heads=8)
    return JointObjective(Transformer(Layout.of(32, 2048, [(16, 16, 8192)]), shape), shape)


def _training(folder: Path, width: int, layers: int) -> tuple[Engine, Ema, Callable[[], None]]:
    """A training on DeepSpeed's engine that has done a step: its engine, average, and what does another one."""
    import torch

    from pipeline.config.training import TrainingConfig
    from pipeline.core import distributed
    from pipeline.training.ema import Ema
    from pipeline.training.engines import build_engine

    distributed.init(without_launcher=True)
    training = TrainingConfig(steps=100, warmup_steps=0, batch_size=4, precision="fp32")
    engine = build_engine("deepspeed", _objective(width, layers), training, None, folder)
    average = Ema(engine.local_parameters, 0.9)
    batch = {"text": torch.ones(4, 32, dtype=torch.long), "codes": torch.ones(4, 256, dtype=torch.long)}

    def step() -> None:
        engine.accumulate(batch, 0, 1.0, last=True)
        engine.update(1.0)
        average.update()

    step()
    return engine, average, step


def _timed(step: Callable[[], None]) -> float:
    started = time.monotonic()
    step()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
