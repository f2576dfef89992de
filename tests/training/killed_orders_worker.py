"""Run by tests/training/test_orders_resume.py: trainings of order any and scale that are killed, and resumed.

python -m tests.training.killed_orders_worker TINY_RUN FOLDER
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from pathlib import Path

from benchmarks.checkpoint_kills import Training, kills
from pipeline.config.base import to_yaml
from pipeline.config.pipeline import load_pipeline

_FINISHED = {
    "any": ("prepare", "text-tokenizer", "image-tokenizer", "tokenize"),
    "scale": ("prepare", "text-tokenizer"),
}
_LEVELS = "{kind: multiscale, scales: [1, 2, 4], codebook: {kind: ema, codebook_size: 16, code_width: 4}}"
_SETTINGS = {
    "any": ["transformer.order=any", "transformer.order_anneal=[1, 6]"],
    "scale": [
        "transformer.order=scale",
        f"image_tokenizer.model={{kind: vqvae, patch_size: 4, widths: [8], blocks: 1, quantizer: {_LEVELS}}}",
        "image_tokenizer.training.steps=2",
        "image_tokenizer.training.warmup_steps=1",
    ],
}


def main(tiny: str, folder: str) -> None:
    for order, finished in _FINISHED.items():
        run = Path(folder) / order / "tiny"
        (run / "logs").mkdir(parents=True)
        shutil.copy(Path(tiny) / "run.json", run)
        settings = [*_SETTINGS[order], f"runs={run.parent}", "tracking.enabled=false"]
        (run / "config.yaml").write_text(to_yaml(load_pipeline(Path(tiny) / "config.yaml", settings)))
        for stage in finished:
            shutil.copytree(Path(tiny) / stage, run / stage)
        if order == "scale":
            _run_stage("image_tokenizer", run)
            _run_stage("tokenize", run)
        report = kills(Training(run, steps=6), count=2, seed=1)
        print(f"{order}: {report}", flush=True)


def _run_stage(name: str, run: Path) -> None:
    """In a process that is forked from this one, which has imported what it needs."""
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, f"{name} failed: see {run / 'logs'}"
        return
    sys.argv = [name, "--config", str(run / "config.yaml")]
    runpy.run_module(f"stages.{name}", run_name="__main__", alter_sys=True)
    os._exit(70)  # a stage ends its process


if __name__ == "__main__":
    main(*sys.argv[1:])
