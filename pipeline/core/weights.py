"""The weights in a model's folder: model.safetensors, or several files and their index where they are large.

model-00001-of-00003.safetensors … model.safetensors.index.json     # as Hugging Face writes and reads them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from pipeline.core.atomic_io import atomic_path, read_json, write_json
from pipeline.core.errors import UserError
from pipeline.core.tensor_file import TensorFile, TensorLayout, write_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # of one file, which holds one tensor at least


def write_weights(
    directory: Path,
    layouts: Mapping[str, TensorLayout],
    tensor_of: Callable[[str], Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the weights of a folder, a tensor at a time, and remove those that were there in other files.

    Args:
        tensor_of: gives the tensor of a name; called once for each.
    """
    shards = _cut(layouts, shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        with atomic_path(directory / name) as temporary:
            write_tensors(temporary, shard, tensor_of)
    if len(shards) > 1:
        files = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        size = sum(layout.size for layout in layouts.values())
        write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": files})
    current = {*names, *([INDEX] if len(shards) > 1 else [])}
    for old in (directory / WEIGHTS, directory / INDEX, *directory.glob("model-*-of-*.safetensors")):
        if old.name not in current:
            old.unlink(missing_ok=True)


def _cut(layouts: Mapping[str, TensorLayout], shard_bytes: int) -> list[dict[str, TensorLayout]]:
    """The tensors of each file, in their order."""
    shards: list[dict[str, TensorLayout]] = [{}]
    size = 0
    for name, layout in layouts.items():
        if shards[-1] and size + layout.size > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = layout
        size += layout.size
    return shards


def weight_files(directory: Path) -> list[str]:
    """The names of the files with a folder's weights, of which one may be missing; none where there are no weights.

    Raises:
        UserError: the index is damaged.
    """
    if (directory / WEIGHTS).is_file():
        return [WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        return []
    try:
        names = sorted({*read_json(index)["weight_map"].values()})
        if any(Path(name).name != name for name in names):
            raise ValueError("a file elsewhere")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{index} is damaged ({error!r}): restore it, or run its stage again") from error
    return names


def model_files(directory: Path) -> list[str]:
    """The names of all files of a model's folder, config.json last."""
    names = weight_files(directory)
    return [*names, *([INDEX] if len(names) > 1 else []), "config.json"]


def count_parameters(directory: Path) -> int | None:
    """How many numbers a folder's weights hold, from their headers; None: there are none.

    Raises:
        UserError: a header is damaged.
    """
    files = [TensorFile(directory / name) for name in weight_files(directory)]
    return sum(layout.elements for file in files for layout in file.layouts.values()) if files else None
