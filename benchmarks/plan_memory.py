"""The memory that `smalti plan` says, beside that of a real training on this machine's CPU.

    python -m benchmarks.plan_memory [STAGE ...] [--processes N]

Each model trains two steps on DeepSpeed's engine, in N processes per model and stage. Measured is the highest sum of
all live tensors of rank 0, from torch's record of every allocation, with model and engine: what a GPU's allocator would
count, and gloo's copies. The last column is the rise of its resident memory, which includes what the C library did not
give back.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.config.transformer import TransformerConfig
from pipeline.training.gpu_plan import Memory, memory
from pipeline.training.resource_plan import count

ROOT = Path(__file__).resolve().parents[1]
_DATA = ["prepare.image_size=64", "text_tokenizer.vocab_size=2048", "text_tokenizer.text_length=32"]  # 16×16 codes
MODELS = {
    "4 layers, 768 wide, batch 4, fp32": "layers=4 width=768 training.batch_size=4 training.precision=fp32",
    "8 layers, 512 wide, batch 8, bf16, average": (
        "layers=8 width=512 training.batch_size=8 training.precision=bf16 training.ema_decay=0.99"
    ),
    "8 layers, 512 wide, batch 8, bf16-weights, average": (
        "layers=8 width=512 training.batch_size=8 training.precision=bf16-weights training.ema_decay=0.99"
    ),
    "6 layers, 512 wide, batch 8, fp32, recomputed": (
        "layers=6 width=512 training.batch_size=8 training.precision=fp32 training.activation_checkpointing=true"
    ),
    "4 layers, 256 wide, batch 8, bf16, 8,192 codes": (
        "layers=4 width=256 training.batch_size=8 training.precision=bf16"
    ),
}


def config_of(model: str) -> PipelineConfig:
    """The tiny pipeline with the transformer of `MODELS[model]`."""
    codes = 8192 if "8,192 codes" in model else 64
    overrides = [*_DATA, "transformer.heads=8", f"image_tokenizer.model.codebook_size={codes}"]
    overrides += [f"transformer.{override}" for override in MODELS[model].split()]
    return load_pipeline(ROOT / "tests" / "configs" / "tiny.yaml", overrides)


def planned(model: str, stage: int, processes: int = 1) -> Memory:
    """The plan for a process on a CPU, whose attention keeps its scores."""
    config = config_of(model)
    transformer = config.transformer
    counted = replace(count(config, processes, device="cpu"), image_tokenizer=0)  # the benchmark trains without
    return memory(counted, transformer.training, transformer.deepspeed, stage, processes)


def measured(model: str, stage: int, processes: int = 1) -> tuple[int, int]:
    """Bytes of tensors and of resident memory at their peak, measured in processes of their own."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] * (processes > 1)
    command = [sys.executable, "-m", *torchrun, "benchmarks.plan_memory", "--worker", model, str(stage)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    tensors, resident = done.stdout.split()[-2:]
    return int(tensors), int(resident)


def _worker(model: str, stage: int) -> None:
    from torch.profiler import ProfilerActivity, profile

    from pipeline.core import distributed

    config = config_of(model)
    _train(config.model_copy(update={"transformer": _toy(config)}), stage)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = status_bytes("VmRSS")
    resident = _train(config, stage, lambda: status_bytes("VmHWM") - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        _train(config, stage)
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    if distributed.is_main():
        print(max(accumulate(event.nbytes() for event in events)), resident)
    distributed.leave(0)


def _train(config: PipelineConfig, stage: int, at_end: Callable[[], int] = lambda: 0) -> int:
    """Train two steps; returns `at_end()`, which is called while model, engine and average still exist."""
    import torch

    from pipeline.config.training import DeepSpeedConfig
    from pipeline.core import distributed
    from pipeline.training.ema import Ema
    from pipeline.training.engines import build_engine
    from pipeline.transformer.layout import Layout
    from pipeline.transformer.model import Transformer
    from pipeline.transformer.objective import JointObjective

    distributed.init(without_launcher=True)
    section, text = config.transformer, config.text_tokenizer
    layout = Layout.of(text.text_length, text.vocab_size, [(16, 16, config.image_tokenizer.model.codebook_size)])
    objective = JointObjective(Transformer(layout, section), section)
    zero = DeepSpeedConfig(zero_stage=stage)
    with tempfile.TemporaryDirectory() as folder:
        engine = build_engine("deepspeed", objective, section.training, zero, Path(folder))
    average = Ema(engine.local_parameters, section.training.ema_decay) if section.training.ema_decay else None
    size = section.training.batch_size // distributed.world_size()
    batch = {
        "text": torch.ones(size, layout.text_length, dtype=torch.long),
        "codes": torch.ones(size, layout.image_length, dtype=torch.long),
    }
    for step in range(2):  # the second has the optimizer's states
        engine.accumulate(batch, step, 1.0, last=True)
        engine.update(1.0)
        if average:
            average.update()
    return at_end()


def _toy(config: PipelineConfig) -> TransformerConfig:
    """The config's transformer, as small as it gets: a first training, which imports and sets up everything."""
    return config.transformer.model_copy(update={"layers": 1, "width": 32, "heads": 8})


def status_bytes(key: str) -> int:
    """A value of this process's /proc/self/status, VmRSS for one, in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def main(stages: list[int], processes: int) -> None:
    print("model                                             ZeRO    planned    tensors   planned / tensors   resident")
    for model in MODELS:
        for stage in stages:
            if stage == 0 and "bf16-weights" in model:
                continue  # refused
            plan, (tensors, resident) = planned(model, stage, processes).step, measured(model, stage, processes)
            columns = f"{plan / 1e6:8.0f} MB{tensors / 1e6:8.0f} MB{plan / tensors:20.2f}{resident / 1e6:8.0f} MB"
            print(f"{model:50}{stage:4}{columns}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _worker(sys.argv[2], int(sys.argv[3]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("stages", nargs="*", type=int, default=[0, 1, 2, 3], metavar="STAGE")
        parser.add_argument("--processes", type=int, default=1)
        arguments = parser.parse_args()
        main(arguments.stages, arguments.processes)
