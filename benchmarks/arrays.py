"""Arrays over many files on a slow file system: does each task start and end, and is any refused?

    python -m benchmarks.arrays [--tasks 64] [--shards 2000] [--stat-ms 1] [--stages prepare,tokenize]

A real Slurm (`slurm/testbed`) runs `prepare` over as many tars, and then `tokenize` over as many shards, as one array
each with its join. In the jobs, a library that is preloaded makes each stat of a path below the benchmark's folder
sleep. The table: what the tasks' lives came to, by the supervisor's records.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config.pipeline import load_pipeline
from pipeline.orchestration.graph import stage_named, stages_of
from pipeline.slurm.supervisor.record import read_record, record_path

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "configs" / "tiny.yaml"
SLOW_STAT = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
static void slow(const char *path) {
    const char *under = getenv("SLOW_STAT_UNDER"), *us = getenv("SLOW_STAT_US");
    if (under && us && path && !strncmp(path, under, strlen(under))) usleep(atoi(us));
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
int stat(const char *path, struct stat *s) { slow(path); return REAL(stat)(path, s); }
int lstat(const char *path, struct stat *s) { slow(path); return REAL(lstat)(path, s); }
int stat64(const char *path, struct stat64 *s) { slow(path); return REAL(stat64)(path, s); }
int lstat64(const char *path, struct stat64 *s) { slow(path); return REAL(lstat64)(path, s); }
int fstatat(int d, const char *path, struct stat *s, int f) { slow(path); return REAL(fstatat)(d, path, s, f); }
int fstatat64(int d, const char *path, struct stat64 *s, int f) { slow(path); return REAL(fstatat64)(d, path, s, f); }
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--shards", type=int, default=2_000)
    parser.add_argument("--stat-ms", type=float, default=1.0)
    parser.add_argument("--stages", default="prepare,tokenize")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="arrays-") as name:
        folder = Path(name)
        testbed = os.environ | {"SMALTI_TESTBED": str(folder / "t"), "SLURM_CONF": str(folder / "t/etc/slurm.conf")}
        subprocess.run([ROOT / "slurm" / "testbed", "up"], env=testbed, check=True)
        try:
            _run(folder, testbed, options)
        finally:
            subprocess.run([ROOT / "slurm" / "testbed", "down"], env=testbed, check=True)


def _run(folder: Path, environment: dict[str, str], options: argparse.Namespace) -> None:
    cluster = _cluster_file(folder, options.tasks, options.stat_ms)
    source = json.dumps({"kind": "webdataset", "urls": str(_tars(folder / "tars", options.shards) / "*.tar")})
    config = [str(TINY), f"runs={folder}", f"prepare.source={source}", "prepare.workers=1", "tracking.enabled=false"]
    config += ["image_tokenizer.training.steps=6", "generate.training_prompts=[]"]
    wanted = options.stages.split(",")
    last = max(stages_of(load_pipeline(TINY)).index(stage_named(name)) for name in wanted)
    print(f"{options.shards} files, {options.tasks} tasks, {options.stat_ms:g} ms a stat", flush=True)
    print(f"{'stage':<16}{'tasks':>6}{'lives':>7}  outcomes, seconds of a task (median, longest), seconds in all")
    for stage in stages_of(load_pipeline(TINY))[: last + 1]:
        python = [sys.executable, "-m", "pipeline"]
        if stage.name not in wanted:
            command = ["run", *config, "--only", stage.name]
            subprocess.run([*python, *command], env=environment, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            continue
        started = time.monotonic()
        command = ["submit", *config, "--cluster", str(cluster), "--only", stage.name]
        subprocess.run([*python, *command], env=environment, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        while subprocess.run(["squeue", "-h"], env=environment, capture_output=True, text=True, check=True).stdout:
            time.sleep(1)
        _tell(folder / "tiny", stage.name, options.tasks, time.monotonic() - started)


def _tell(run: Path, stage: str, tasks: int, seconds: float) -> None:
    lives = [life for task in range(tasks) for life in read_record(record_path(run, stage, task)).lives]
    outcomes = Counter(life.outcome or "none" for life in lives)
    times = sorted(life.ended - life.started for life in lives if life.ended)
    joined = "joined" if (run / stage / "_SUCCESS").exists() else "NOT JOINED"
    said = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    middle = f"{np.median(times):.1f}, {times[-1]:.1f}" if times else "no times"
    print(f"{stage:<16}{tasks:>6}{len(lives):>7}  {said}; {middle}; {seconds:.0f}; {joined}", flush=True)
    if outcomes["finished"] != tasks or joined != "joined":
        logs = sorted((run / "logs" / "slurm").glob(f"{stage}-*.log"), key=os.path.getmtime)
        sys.exit("".join(log.read_text()[-3000:] for log in logs[-2:]))


def _tars(folder: Path, count: int) -> Path:
    """As many tars of one captioned image each."""
    folder.mkdir()
    for number in range(count):
        image = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image, "PNG")
        with tarfile.open(folder / f"{number:06d}.tar", "w") as tar:
            for name, content in (("png", image.getvalue()), ("txt", f"image {number}".encode())):
                info = tarfile.TarInfo(f"{number:06d}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


def _cluster_file(folder: Path, tasks: int, stat_ms: float) -> Path:
    """Arrays of `tasks`, whose processes stat slowly."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        sys.exit("benchmarks.arrays: needs a C compiler (gcc), found none")
    (folder / "slow.c").write_text(SLOW_STAT)
    library = folder / "slow.so"
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(folder / "slow.c"), "-ldl"]
    subprocess.run(command, check=True)
    values = {
        "SLOW_STAT_UNDER": f"{folder}/t",  # tars, tiny, and the few files of the testbed
        "SLOW_STAT_US": str(round(stat_ms * 1000)),
        "LD_PRELOAD": str(library),
    }
    cluster = {
        "python": sys.executable,
        "setup": [f"export {name}={value}" for name, value in values.items()],
        "default": {"time": "60", "cpus_per_task": 1},
        "stages": {"prepare": {"array": tasks}, "tokenize": {"array": tasks}},
        "stop_ahead_s": 30,
    }
    path = folder / "cluster.yaml"
    path.write_text(json.dumps(cluster))  # YAML, too
    return path


if __name__ == "__main__":
    main()
