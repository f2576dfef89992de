r"""What each process of a ZeRO-3 training takes of the host's memory, phase by phase, beside `smalti plan`'s.

    python -m benchmarks.large_models FOLDER configs/dalle-12b.yaml transformer.layers=2 \
        transformer.training.precision=bf16-weights transformer.training.ema_decay=null

On CPUs, with random ids instead of data. A first life on --processes: start, two steps, an evaluation, a grid of sample
images, and a stop, asked of rank 0 while images are generated, which saves. A second life on --resume-processes: start,
resume, the same again, a checkpoint that is waited for, and the end (an export from it). --only names some phases.

A line for each phase: peak resident memory in GB since the phase began, of each rank, without what was there after the
same phases of a tiny model, which imports all that there is to import; what `plan` says of a GPU and of the host
together; of the start also the bar, 1.2 × share + 2 × the largest parameter,
where the share is that of weights, optimizer, gradients and average.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.plan_memory import status_bytes
from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.config.training import accumulation_steps
from pipeline.core import distributed, signals
from pipeline.core.initial_values import initial_values
from pipeline.image_tokenizer import ImageTokenizer
from pipeline.image_tokenizer.base import build
from pipeline.sampling.all_ranks import generate_on_all_ranks
from pipeline.sampling.pipeline import Pipeline
from pipeline.text_tokenizer.bpe import TextTokenizer
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.checkpoint_files import Files
from pipeline.training.consolidate import consolidate
from pipeline.training.ema import Ema
from pipeline.training.engines import build_engine
from pipeline.training.engines.base import Engine, Start
from pipeline.training.gpu_plan import memory
from pipeline.training.host_plan import host_memory
from pipeline.training.resource_plan import FLOAT32, Model, count
from pipeline.training.sharded_state import ShardedState, shards_file
from pipeline.training.stopping import EvaluationStopped
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.objective import JointObjective

_GB = 1e9
_FIRST = ("start", "steps", "evaluation", "images", "stop")
_SECOND = ("start", "resume", "steps", "evaluation", "images", "checkpoint", "end")
_PROMPTS = ["red joker", "Brazil"]


class Meter:
    """Peak resident memory by phase, in GB beside what was there when it was made."""

    def __init__(self) -> None:
        self.before = psutil.Process().memory_info().rss
        self.peaks: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside is that phase."""
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        started = time.monotonic()
        yield
        self.peaks[name] = (status_bytes("VmHWM") - self.before) / _GB
        self.seconds[name] = time.monotonic() - started


@dataclass
class Training:
    """A training of the config's transformer on DeepSpeed's engine, as the stage builds it."""

    config: PipelineConfig
    engine: Engine
    average: Ema | None
    sizes: list[int]  # of parameters
    image_tokenizer: ImageTokenizer  # for sample images

    def files(self) -> Files:
        """This process's files of a checkpoint."""
        files = self.engine.checkpoint_files()
        if self.average:
            files |= [shards_file("ema", self.engine.local_shards(self.average.average))]
        if distributed.is_main():
            files["model.json"] = vars(self.engine.objective.exported())
        return files

    def read(self, directory: Path) -> None:
        """Load a checkpoint."""
        self.engine.load(directory)
        if self.average:
            self.engine.read_shards(self.average.average, ShardedState(directory, "ema"))

    def share(self, ranks: int) -> float:
        """GB of weights, their float32 copy, moments, gradients and average, on one process."""
        training = self.config.transformer.training
        number = 2 if training.precision == "bf16-weights" else FLOAT32
        moments = 1 if training.optimizer == "muon" else 2
        a_parameter = 2 * number + FLOAT32 * (1 + moments + bool(training.ema_decay))
        return a_parameter * sum(self.sizes) / ranks / _GB

    def bar(self, ranks: int) -> float:
        """GB that a start may take."""
        return 1.2 * self.share(ranks) + 2 * FLOAT32 * max(self.sizes) / _GB


def start_training(config: PipelineConfig, folder: Path, drawn: bool) -> Training:
    """Build it without memory, and give it its share; values are `drawn`, or zeros for a checkpoint to replace."""
    section, text = config.transformer, config.text_tokenizer
    image_tokenizer = build(config.image_tokenizer.model, config.prepare.image_size).eval()
    layout = Layout.of(text.text_length, text.vocab_size, image_tokenizer.levels)
    with initial_values(config.seed) as initial:
        objective = JointObjective(build_transformer(layout, section), section, config.seed)
    sizes = [parameter.numel() for parameter in objective.parameters()]
    start, training = Start(initial, drawn), section.training
    engine = build_engine("deepspeed", objective, training, section.deepspeed, folder, start)
    average = Ema(engine.local_parameters, training.ema_decay) if training.ema_decay else None
    return Training(config, engine, average, sizes, image_tokenizer)


def tiny(config: PipelineConfig) -> PipelineConfig:
    """With a model of a block, which leaves little behind."""
    heads = config.transformer.heads
    shape = {"layers": 1, "width": 4 * heads, "key_value_heads": heads}
    return config.model_copy(update={"transformer": config.transformer.model_copy(update=shape)})


def planned(config: PipelineConfig, model: Model, ranks: int) -> dict[str, float]:
    """GB of one process by phase, what is on a GPU and what is in the host's memory together."""
    training, deepspeed = config.transformer.training, config.transformer.deepspeed
    host = host_memory(model, training, deepspeed, 3, gpus=ranks, per_node=1).peaks
    gpu = memory(model, training, deepspeed, 3, ranks).peaks
    found = {name: (peak + host.get(name, 0.0)) / _GB for name, peak in gpu.items()}
    names = {"step": "steps"}
    found = {names.get(name, name): peak for name, peak in found.items()}
    return found | {"stop": max(found["images"], found["checkpoint"])}


def _live(arguments: argparse.Namespace, config: PipelineConfig) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401 – what it takes by itself is not the training's

    distributed.init()
    signals.install()
    _warm_up(arguments, config)
    meter = Meter()
    checkpoints = Checkpoints(
        arguments.folder / "checkpoints", 1, in_background=config.transformer.training.async_checkpoints
    )
    resumes = arguments.life == 2 and "resume" in arguments.only
    with meter.phase("start"):
        training = start_training(config, arguments.folder, drawn=not resumes)
    if resumes:
        with meter.phase("resume"):
            checkpoints.restore(training.read)
    _phases(arguments, meter, training, checkpoints)
    told = distributed.all_gather_objects((meter.peaks, meter.seconds))
    if distributed.is_main():
        _print(training, [peaks for peaks, _ in told], told[0][1])
    distributed.leave(0)


def _warm_up(arguments: argparse.Namespace, config: PipelineConfig) -> None:
    """All of it but the stop with a tiny model."""
    folder = arguments.folder / f"tiny-{arguments.life}"
    if distributed.is_main():
        folder.mkdir()
    distributed.barrier()
    training = start_training(tiny(config), folder, drawn=True)
    phases = argparse.Namespace(folder=folder, only={*_SECOND})
    _phases(phases, Meter(), training, Checkpoints(folder / "checkpoints", 1, in_background=True))


def _phases(arguments: argparse.Namespace, meter: Meter, training: Training, checkpoints: Checkpoints) -> None:
    engine, average, config = training.engine, training.average, training.config
    batch = _batch(config, engine)
    if "steps" in arguments.only:
        with meter.phase("steps"):
            for step in range(2):
                engine.accumulate(batch, step, 1.0, last=True)
                engine.update(1.0)
                if average:
                    average.update()
    engine.objective.eval()
    _take(average, engine)
    if "evaluation" in arguments.only:
        with meter.phase("evaluation"), torch.no_grad(), engine.autocast():
            engine.model(batch, 0)
    if arguments.only & {"images", "stop"}:
        pipeline = _pipeline(training)
    if "images" in arguments.only:
        with meter.phase("images"), torch.no_grad(), engine.gathered_outside_blocks(), engine.autocast():
            generate_on_all_ranks(pipeline, [_PROMPTS], 0, engine.in_step)
    if "stop" in arguments.only:
        with meter.phase("stop"):
            _stopped(pipeline, engine)
            _take(average, engine)
            checkpoints.save(2, training.files())
            checkpoints.finish()
        return
    _take(average, engine)
    if "checkpoint" in arguments.only:
        with meter.phase("checkpoint"):
            checkpoints.save(4, training.files())
            checkpoints.finish()
    if "end" in arguments.only and distributed.is_main():
        with meter.phase("end"):
            consolidate(checkpoints.path(4), arguments.folder / "model")
    distributed.barrier()


def _take(average: Ema | None, engine: Engine) -> None:
    """Exchange the weights and their average."""
    if average:
        average.swap()
        engine.sync_parameters()


def _stopped(pipeline: Pipeline, engine: Engine) -> None:
    """Rank 0 is asked to stop; all ranks hear it while they generate images."""
    if distributed.is_main():
        os.kill(os.getpid(), signal.SIGUSR2)
    try:
        with torch.no_grad(), engine.gathered_outside_blocks(), engine.autocast():
            generate_on_all_ranks(pipeline, [_PROMPTS], 0, engine.in_step)
    except EvaluationStopped:
        return
    raise RuntimeError("expected the images to end where a rank is asked to stop, found all of them")


def _batch(config: PipelineConfig, engine: Engine) -> dict[str, torch.Tensor]:
    """Of one micro-batch, ids that are none of the data's."""
    objective, training = engine.objective, config.transformer.training
    assert isinstance(objective, JointObjective)
    layout, ranks = objective.transformer.layout, distributed.world_size()
    size = training.batch_size // ranks // accumulation_steps(training, ranks)
    codes = torch.zeros(size, layout.image_length, dtype=torch.long)
    return {"text": torch.randint(1, 200, (size, layout.text_length)), "codes": codes}


def _pipeline(training: Training) -> Pipeline:
    """With tokenizers of the config's sizes, that have learned nothing to speak of."""
    config, objective, chance = training.config, training.engine.objective, random.Random(0)
    words = ("".join(chance.choices(string.ascii_lowercase, k=6)) for _ in range(4 * config.text_tokenizer.vocab_size))
    text = TextTokenizer.train([*_PROMPTS, *words], config.text_tokenizer)
    assert isinstance(objective, JointObjective)
    return Pipeline(text, objective.transformer, training.image_tokenizer)


def _print(training: Training, peaks: list[dict[str, float]], seconds: dict[str, float]) -> None:
    config, ranks = training.config, len(peaks)
    plan = planned(config, count(config, ranks, "cpu"), ranks)
    print(f"{sum(training.sizes) / 1e6:,.0f} M parameters on {ranks} processes, share {training.share(ranks):.2f} GB")
    print("phase       " + "".join(f"  rank {rank}" for rank in range(ranks)) + "    plan       s")
    for name in peaks[0]:
        own = "".join(f"{of_rank[name]:8.2f}" if name in of_rank else "        " for of_rank in peaks)
        told = f"{plan[name]:8.2f}" if name in plan else "        "
        bar = f"   at most {training.bar(ranks):.2f}" if name == "start" else ""
        print(f"{name:12}{own}{told}{seconds[name]:8.0f}{bar}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--resume-processes", type=int, default=1, help="0: no second life")
    parser.add_argument("--only", nargs="+", default=[*_FIRST, *_SECOND], choices=[*_FIRST, *_SECOND], metavar="PHASE")
    parser.add_argument("--life", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.only = {*arguments.only}
    config = load_pipeline(arguments.config, [*arguments.overrides, "transformer.deepspeed.zero_stage=3"])
    if arguments.life:
        arguments.only &= {*(_FIRST if arguments.life == 1 and arguments.resume_processes else _SECOND)}
        _live(arguments, config)
        return
    arguments.folder.mkdir(parents=True)
    for life, processes in enumerate((arguments.processes, arguments.resume_processes), 1):
        if processes:
            torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command = [
                sys.executable,
                "-m",
                *torchrun,
                "-m",
                "benchmarks.large_models",
                *sys.argv[1:],
                "--life",
                str(life),
            ]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
