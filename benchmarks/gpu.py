"""What only a GPU can tell, as a table with the card's name: speed, memory, and the bits after a kill.

    python -m benchmarks.gpu                        # every part, an hour; writes gpu-figures.md for docs/gpu.md
    python -m benchmarks.gpu step-1.3b sample-1     # some of them
    python -m benchmarks.gpu --device cpu --tiny    # every part at tiny shapes: proves this script, not a figure

Each part is a process of its own, so that none sees the memory of another, and one that fails leaves the rest. Peers
run the same shapes: `transformers`' Llama on our engine, with its compilation and precision, and in sampling with its
static cache; dalle-pytorch and vector-quantize-pytorch where they are installed (benchmarks/peers.py). The parts are
in benchmarks/gpu_parts.py, what they stand on in benchmarks/gpu_models.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click

from benchmarks.gpu_models import FULL, TINY, Row

ROOT = Path(__file__).resolve().parents[1]
_HEADER = ("what", "figure", "bar", "")


@click.command()
@click.argument("parts", nargs=-1)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="tiny shapes, few repeats, nothing compiled")
@click.option("--output", type=click.Path(path_type=Path), default=Path("gpu-figures.md"), show_default=True)
@click.option("--part", "inner", hidden=True)
def main(parts: tuple[str, ...], device: str, tiny: bool, output: Path, inner: str | None) -> None:
    from benchmarks.gpu_parts import PARTS

    if inner:
        rows = PARTS[inner](TINY if tiny else FULL)
        print("\n".join(["ROWS", *(json.dumps(row) for row in rows)]), flush=True)
        return
    if unknown := sorted(set(parts) - set(PARTS)):
        raise click.UsageError(f"expected parts among {', '.join(PARTS)}, found {', '.join(unknown)}")
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    name = _card(environment)
    if device == "cuda" and name == "CPU":
        raise click.UsageError("expected a GPU, found none: run on a machine with one, or with --device cpu --tiny")
    print(f"{name}{', tiny shapes' if tiny else ''}", flush=True)
    found: list[Row] = []
    for part in parts or PARTS:
        rows = _run(part, tiny, environment)
        found += rows
        for row in rows:
            print(f"{row[0]:58} {row[1]:>18}  {row[2]:34} {row[3]}", flush=True)
    output.write_text(markdown(name, tiny, found))
    print(f"written to {output}")


def _run(part: str, tiny: bool, environment: dict[str, str]) -> list[Row]:
    """The rows of one part, from a process of its own; one row that says what failed if it failed."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [(part, "failed", last[:120], "")]
    lines = done.stdout.splitlines()
    return [tuple(json.loads(line)) for line in lines[lines.index("ROWS") + 1 :]]


def _card(environment: dict[str, str]) -> str:
    """The name of the device in a process with this environment."""
    command = [sys.executable, "-c", "from benchmarks.gpu_models import card_name; print(card_name())"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def markdown(card: str, tiny: bool, rows: list[Row]) -> str:
    """The table of docs/gpu.md."""
    command = f"`python -m benchmarks.gpu{' --tiny' if tiny else ''}`"
    lines = [f"### {card}", "", f"{command}:", "", f"| {' | '.join(_HEADER)} |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


if __name__ == "__main__":
    main()
