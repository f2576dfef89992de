"""What each process of a ZeRO-3 training takes of the host's memory, phase by phase, beside its share of the state.

    python -m benchmarks.large_models --width 1536 --layers 16 --processes 2 FOLDER

On CPUs, with random ids instead of data: start, steps, an evaluation, a grid of sample images, a checkpoint, the end
(an export from the checkpoint), and a resume at another number of processes. A line for each phase and rank: peak
resident memory since the phase began, without what torch took before; the share of weights, optimizer, gradients and
average (float32: 24 bytes a parameter / processes; bf16-weights: 20; without an average 4 less); and the bar at the
start, 1.2 × share + 2 × the largest parameter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.config.training import DeepSpeedConfig, TrainingConfig
from pipeline.config.transformer import TransformerConfig
from pipeline.core import distributed
from pipeline.core.initial_values import initial_values
from pipeline.image_tokenizer.base import build
from pipeline.sampling.all_ranks import generate_on_all_ranks
from pipeline.sampling.pipeline import Pipeline
from pipeline.text_tokenizer.bpe import TextTokenizer
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.consolidate import consolidate
from pipeline.training.ema import Ema
from pipeline.training.engines import build_engine
from pipeline.training.engines.base import Engine, Start
from pipeline.training.sharded_state import ShardedState, shards_file
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective

_BATCH = 2
_GB = 1e9


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


class Meter:
    """Peak resident memory by phase."""

    def __init__(self) -> None:
        self.before = psutil.Process().memory_info().rss
        self.found: dict[str, dict[str, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        started = time.monotonic()
        yield
        peak = (_peak_bytes() - self.before) / _GB
        self.found[name] = {"peak_gb": round(peak, 3), "s": round(time.monotonic() - started, 1)}


def _train(arguments: argparse.Namespace, folder: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401 – what it takes by itself is not the training's

    distributed.init()
    text = TextTokenizer.train(["red joker", "Brazil"], TextTokenizerConfig(vocab_size=300, text_length=8))
    ema = {"kind": "ema", "codebook_size": arguments.codebook, "code_width": 8}
    shape = {"patch_size": 2, "widths": [16, 16], "blocks": 1, "block_kernels": [3, 1]}
    image_tokenizer = build({"kind": "vqvae", "quantizer": ema, **shape}, 16).eval()
    precision, decay = arguments.precision, arguments.average or None
    training = TrainingConfig(steps=8, batch_size=_BATCH * 2, warmup_steps=0, precision=precision, ema_decay=decay)
    config = TransformerConfig(
        layers=arguments.layers,
        width=arguments.width,
        heads=arguments.width // 64,
        caption_dropout=0,
        training=training,
    )
    layout = Layout.of(text.text_length, text.vocab_size, image_tokenizer.levels)
    meter, checkpoints = Meter(), Checkpoints(folder / "checkpoints", keep=1)
    resumes = (folder / "checkpoints").exists()
    with meter.phase("start"):
        with initial_values(0) as initial:
            objective = JointObjective(Transformer(layout, config), config)
        sizes = [parameter.numel() for parameter in objective.parameters()]
        start = Start(initial, drawn=not resumes)
        engine = build_engine("deepspeed", objective, training, DeepSpeedConfig(zero_stage=3), folder, start)
        average = Ema(engine.local_parameters, arguments.average) if arguments.average else None
    if resumes:
        with meter.phase("resume"):
            checkpoints.restore(lambda directory: _read(engine, average, directory))
    _phases(meter, engine, average, checkpoints, Pipeline(text, objective.transformer, image_tokenizer), resumes)
    share = _bytes_a_parameter(arguments) * sum(sizes) / distributed.world_size() / _GB
    bar = 1.2 * share + 2 * 4 * max(sizes) / _GB
    told = {"parameters": sum(sizes), "share_gb": round(share, 3), "bar_gb": round(bar, 3), "phases": meter.found}
    for rank, own in enumerate(distributed.all_gather_objects(told)):
        if distributed.is_main():
            print(json.dumps({"processes": distributed.world_size(), "rank": rank} | own), flush=True)
    distributed.leave(0)


def _bytes_a_parameter(arguments: argparse.Namespace) -> int:
    """Of weights, their float32 copy, moments, gradients and average, on all processes together."""
    return (16 if arguments.precision == "bf16-weights" else 20) + (4 if arguments.average else 0)


def _read(engine: Engine, average: Ema | None, directory: Path) -> None:
    engine.load(directory)
    if average:
        engine.read_shards(average.average, ShardedState(directory, "ema"))


def _phases(
    meter: Meter, engine: Engine, average: Ema | None, checkpoints: Checkpoints, pipeline: Pipeline, resumed: bool
) -> None:
    layout, share = pipeline.transformer.layout, 2 * _BATCH // distributed.world_size()
    text = torch.randint(1, 200, (share, layout.text_length))
    batch = {"text": text, "codes": torch.zeros(share, layout.image_length, dtype=torch.long)}
    with meter.phase("2 steps"):
        for step in range(2):
            engine.accumulate(batch, step, 1.0, last=True)
            engine.update(1.0)
            if average:
                average.update()
    engine.objective.eval()
    with meter.phase("evaluation"), torch.no_grad():
        if average:
            average.swap()
            engine.sync_parameters()
        engine.model(batch, 0)
    with meter.phase("images"), torch.no_grad(), engine.gathered_outside_blocks():
        generate_on_all_ranks(pipeline, [["red joker", "Brazil"]], 0, engine.in_step)
    if average:
        average.swap()
        engine.sync_parameters()
    if resumed:
        return
    with meter.phase("checkpoint"):
        files = engine.checkpoint_files()
        if average:
            files |= [shards_file("ema", engine.local_shards(average.average))]
        if distributed.is_main():
            files["model.json"] = vars(engine.objective.exported())
        checkpoints.save(2, files)
    if distributed.is_main():
        with meter.phase("end: model/ from the checkpoint"):
            consolidate(checkpoints.path(2), checkpoints.directory.parent / "model")
    distributed.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--codebook", type=int, default=8192)
    parser.add_argument("--precision", choices=("fp32", "bf16-weights"), default="fp32")
    parser.add_argument("--average", type=float, default=0.9, help="ema_decay; 0: none")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--resume-processes", type=int, default=4)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        _train(arguments, arguments.folder)
        return
    arguments.folder.mkdir(parents=True)
    for processes in (arguments.processes, arguments.resume_processes):
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, "-m", *torchrun, "-m", "benchmarks.large_models", *sys.argv[1:]]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
