"""One process of a training on many: its start, a checkpoint of all of them, and what is read of that again.

    python -m benchmarks.one_of_many FOLDER configs/dalle-12b.yaml --processes 64

This process is rank 0 of so many, on torch's `fake` process group, whose collectives do nothing. A process at ZeRO-3
draws its own share of the initial values, so start, memory, files and their names are those that it would have among
the others. (bf16-weights stand for fp16, which CPUs have not.) The others' files have the header that they would have,
and holes for values. After it some of the others start, too, and must hold what those headers say. Told beside each
other are

- the memory of the start, the bar (1.2 × share + 2 × the largest parameter) and what `smalti plan` says
- the size of the whole checkpoint and what `smalti plan` says

and it is an error unless rank 0 completes the checkpoint, finds no damage in its share, reads back the bits that it
wrote, and an export finds every element of the weights (those of the others are zeros; it writes nothing).
It does not train: a step needs what the other processes hold. What the first one makes, the optimizer's states, comes
of gradients that equal the weights and a learning rate of zero.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.large_models import Meter, Training, planned, start_training, tiny
from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core import distributed
from pipeline.core.manifest import BLOCK_BYTES, FileRecord
from pipeline.core.tensor_file import TensorLayout, _header, _in_order
from pipeline.core.weights import _cut
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.consolidate import consolidate
from pipeline.training.engines.base import Engine
from pipeline.training.engines.deepspeed import DeepSpeedEngine
from pipeline.training.optimizer import set_learning_rates
from pipeline.training.resource_plan import checkpoint_bytes, count
from pipeline.training.sharded_state import ShardedState

_GB = 1e9
_ZEROS = sha256(bytes(BLOCK_BYTES)).hexdigest()
Layouts = dict[str, TensorLayout]


def _join(rank: int, ranks: int) -> None:
    """Be one of `ranks` processes that are not there."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    import deepspeed  # noqa: F401 – what it takes by itself is not the training's

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)


def _first_update(engine: Engine) -> None:
    """DeepSpeed's own update of this process's share, which makes the optimizer's states and changes nothing."""
    assert isinstance(engine, DeepSpeedEngine)
    optimizer = engine._optimizer
    set_learning_rates(optimizer, 0.0)
    for group, weights in enumerate(optimizer.fp32_partitioned_groups_flat):
        weights.grad = weights.detach().clone()  # any that make no states of zeros, as what is not read would be
        optimizer._optimizer_step(group)
        weights.grad = None


def _forget(training: Training) -> None:
    """Be as at a start, for a checkpoint to be read: zeros, and no states."""
    assert isinstance(training.engine, DeepSpeedEngine)
    training.engine._optimizer.optimizer.state.clear()
    for content in training.files().values():  # of which tensors are no copies
        for value in content.values() if isinstance(content, dict) else ():
            if isinstance(value, Tensor):
                value.zero_()


@contextmanager
def _others_say(others: list[dict[str, FileRecord]]) -> Iterator[None]:
    """Rank 0's collectives: of files the others have written theirs, of damage they have found none."""

    def all_gather(value: object) -> list[object]:
        return [value, *(others if isinstance(value, dict) else [None] * len(others))]

    alone = partial(ShardedState, alone=True)
    with (
        patch.object(distributed, "all_gather_objects", all_gather),
        patch.object(distributed, "broadcast_object", lambda value: value),
        patch("pipeline.training.engines.deepspeed.ShardedState", alone),
        patch("benchmarks.large_models.ShardedState", alone),
    ):
        yield


def layouts_of(
    rank: int, ranks: int, shapes: Mapping[str, list[int]], like: Mapping[str, Layouts]
) -> dict[str, Layouts]:
    """What the files of a rank hold: of each kind of file that rank 0 has (`like`) its part of each tensor."""
    found: dict[str, Layouts] = {}
    for file, layouts in like.items():
        kind, own = file.rpartition("-")[0], Layouts()
        for key, layout in layouts.items():
            name, parameter = key.rpartition("@")[0], key.rpartition("@")[0].rpartition(":")[2]
            if name.startswith("scalar."):  # written with a parameter's first element
                own |= {key: layout} if rank == 0 else {}
                continue
            size = Tensor(0).new_empty(shapes[parameter], device="meta").numel()
            part = -(-size // ranks)
            length = min(part, size - rank * part)
            if length > 0:
                own[f"{name}@{rank * part}"] = TensorLayout(layout.dtype, (length,))
        found[f"{kind}-{rank:05d}.safetensors"] = own
    return found


def _with_holes(path: Path, layouts: Layouts) -> FileRecord:
    """Write a file's header, and as many zeros behind it as it has values; they take no room on the disk."""
    header = _header(_in_order(layouts), layouts)
    size = len(header) + sum(layout.size for layout in layouts.values())
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(size)
    starts = range(0, size, BLOCK_BYTES)
    lengths = [min(BLOCK_BYTES, size - start) for start in starts]
    hashes = [_ZEROS if length == BLOCK_BYTES else sha256(bytes(length)).hexdigest() for length in lengths]
    hashes[0] = sha256(header[: lengths[0]].ljust(lengths[0], b"\0")).hexdigest()
    if len(header) > BLOCK_BYTES:
        raise RuntimeError("expected a header within the first block")
    if len(hashes) == 1:
        return {"bytes": size, "sha256": hashes[0]}
    return {"bytes": size, "block_bytes": BLOCK_BYTES, "blocks": list(zip(starts, hashes, strict=True))}


def _bits(training: Training) -> dict[str, int]:
    """A checksum of everything that this process saves, by name."""
    tensors = [of_file for name, of_file in training.files().items() if name.endswith(".safetensors")]
    return {
        key: zlib.crc32(value.contiguous().view(-1).numpy().data)
        for of_file in tensors
        if isinstance(of_file, dict)
        for key, value in of_file.items()
    }


def _main_rank(config: PipelineConfig, folder: Path, ranks: int) -> None:
    """Rank 0: everything but the check of the others."""
    _join(0, ranks)
    _first_update(start_training(tiny(config), folder, drawn=True).engine)  # imports what there is to import
    meter, checkpoints = Meter(), Checkpoints(folder / "checkpoints", keep=1)
    with meter.phase("start"):
        training = start_training(config, folder, drawn=True)
    with meter.phase("update"):
        _first_update(training.engine)
    files = training.files()
    like = {
        name: {key: TensorLayout.of(value) for key, value in content.items()}
        for name, content in files.items()
        if isinstance(content, dict) and name.startswith(("training-", "ema-"))
    }
    state = files["engine.json"]
    assert isinstance(state, dict)
    temporary = checkpoints.path(1).with_suffix(".tmp")
    others: list[dict[str, FileRecord]] = []

    def with_the_others() -> None:  # where all wait for rank 0 to make the folder: then each writes its own
        for rank in range(1, ranks):
            layouts = layouts_of(rank, ranks, state["shapes"], like)
            others.append({name: _with_holes(temporary / name, own) for name, own in layouts.items()})

    with meter.phase("checkpoint"), patch.object(distributed, "barrier", with_the_others), _others_say(others):
        checkpoints.save(1, files)
    saved = _bits(training)
    del files  # they have the optimizer's states
    _forget(training)
    with meter.phase("resume"), _others_say(others):
        restored = checkpoints.restore(training.read)
    if restored != 1 or _bits(training) != saved:
        raise RuntimeError("expected to read the bits that were written, found others")
    written = sum(path.stat().st_size for path in checkpoints.path(1).iterdir())
    headers = len(list(checkpoints.path(1).iterdir()))
    _tell(config, training, meter, ranks, written, headers)
    _export(checkpoints.path(1), folder)


def _tell(config: PipelineConfig, training: Training, meter: Meter, ranks: int, written: int, files: int) -> None:
    section, peaks = config.transformer.training, meter.peaks
    model = count(config, ranks, "cpu")
    plan, on_disk = planned(config, model, ranks), checkpoint_bytes(model, section) / _GB
    print(f"{sum(training.sizes) / 1e9:.2f} G parameters, {section.precision}, rank 0 of {ranks}; in GB:")
    print(f"share           {training.share(ranks):.2f}; the largest parameter {4 * max(training.sizes) / _GB:.2f}")
    print(f"start           {peaks['start']:.2f} at most, bar {training.bar(ranks):.2f}, plan {plan['start']:.2f}")
    print(f"update          {peaks['update']:.2f} at most, plan of a resume {plan['resume']:.2f}")
    print(f"checkpoint      {peaks['checkpoint']:.2f} at most, plan {plan['checkpoint']:.2f}")
    print(f"on disk         {written / _GB:.2f} in {files:,} files, plan {on_disk:.2f}")
    print(
        f"resume          {peaks['resume']:.2f} at most, plan {plan['resume']:.2f}; its bits are those that it wrote",
        flush=True,
    )


def _export(checkpoint: Path, folder: Path) -> None:
    """Read all that an export would, a parameter at a time, and say which files it would write."""

    def write(_: Path, layouts: Layouts, tensor_of: Callable[[str], Tensor], shard_bytes: int) -> None:
        for name, layout in layouts.items():
            if TensorLayout.of(tensor_of(name)) != layout:
                raise RuntimeError(f"{name}: expected {layout}")
        sizes = [sum(layout.size for layout in of_file.values()) / _GB for of_file in _cut(layouts, shard_bytes)]
        told = f"{len(layouts)} tensors, {sum(sizes):.2f} GB in {len(sizes)} files of up to {max(sizes):.2f} GB"
        print(f"export          {told}", flush=True)

    meter = Meter()
    with meter.phase("end"), patch("pipeline.training.consolidate.write_weights", write):
        (folder / "model").mkdir(exist_ok=True)
        consolidate(checkpoint, folder / "model")
    print(f"                {meter.peaks['end']:.2f} GB at most beside the training")


def _other_rank(config: PipelineConfig, folder: Path, rank: int, ranks: int) -> None:
    """Start as another rank; what it holds must be what the header says that rank 0 was told."""
    from pipeline.core.tensor_file import TensorFile

    _join(rank, ranks)
    training = start_training(config, folder, drawn=False)
    _first_update(training.engine)
    for name, content in training.files().items():
        assert isinstance(content, dict)
        held = {key: TensorLayout.of(value) for key, value in content.items()}
        if held != TensorFile(folder / "checkpoints" / "step-00000001" / name).layouts:
            raise RuntimeError(f"rank {rank}: expected what {name} says, found other tensors")
    print(f"rank {rank:<11,}holds what its files say", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = ["transformer.deepspeed.zero_stage=3", "transformer.training.precision=bf16-weights"]
    config, ranks = load_pipeline(arguments.config, [*settings, *arguments.overrides]), arguments.processes
    if arguments.rank == 0:
        _main_rank(config, arguments.folder, ranks)
    elif arguments.rank:
        _other_rank(config, arguments.folder, arguments.rank, ranks)
    else:
        arguments.folder.mkdir(parents=True)
        for rank in sorted({0, ranks // 2, ranks - 1}):
            command = [sys.executable, "-m", "benchmarks.one_of_many", *sys.argv[1:], "--rank", str(rank)]
            subprocess.run(command, check=True)
        return
    sys.stdout.flush()
    os._exit(0)  # the group is none that could be left


if __name__ == "__main__":
    main()
