"""Weights of another library, by its names. Nothing but tensors is ever read from a file.

Safetensors, of which only the tokenizer's own are read where a file holds a larger model, or what
torch.load(weights_only=True) reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.config.image_tokenizer import PretrainedTokenizerConfig
from pipeline.core.errors import UserError
from pipeline.core.tokenizer_files import tokenizer_files


class Weights:
    """Tensors by their library's names, of which each that is taken is crossed off."""

    def __init__(self, config: PretrainedTokenizerConfig, what: str, tensors: dict[str, Tensor]) -> None:
        """`what`: the model that they are expected to be of, for errors."""
        self.config, self.what, self._tensors = config, what, tensors
        self._taken: set[str] = set()

    @classmethod
    def read(
        cls, config: PretrainedTokenizerConfig, what: str, prefixes: Sequence[str], ignored: Sequence[str]
    ) -> Weights:
        """All tensors that belong to the tokenizer.

        Args:
            prefixes: of all names, in files that hold more than the tokenizer.
            ignored: beginnings of names that no image depends on.

        Raises:
            UserError: a file is missing or damaged, or holds something else than tensors.
        """
        path = Path(config.path)
        files = tokenizer_files(path)
        if not files:
            raise UserError(
                f"{path}: expected the weights of a tokenizer of {config.library}'s, {_expected(config.library)}, found"
                " neither: give the folder that has them, or the file itself"
            )
        # The halves of OpenAI's are two files with the same names.
        halves = [f"{file.stem}." if file.stem in ("encoder", "decoder") else "" for file in files]
        stored = [_Stored(file, half) for file, half in zip(files, halves, strict=True)]
        prefix = next((p for p in prefixes if any(name.startswith(p) for each in stored for name in each.names)), "")
        tensors = {
            name.removeprefix(prefix): each.tensor(name)
            for each in stored
            for name in each.names
            if name.startswith(prefix) and not name.removeprefix(prefix).startswith(tuple(ignored))
        }
        return cls(config, what, tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> Iterable[str]:
        """All that there are."""
        return self._tensors.keys()

    def size(self, name: str, dimension: int = 0) -> int:
        """Of a tensor along a dimension. Raises UserError when it is not there, or has fewer dimensions."""
        shape = self._tensor(name).shape
        if dimension >= len(shape):
            raise self.wrong(f"'{name}' is {list(shape)}, where at least {dimension + 1} dimensions were expected")
        return shape[dimension]

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor, which has to have `shape` if one is given. Raises UserError when it is not there, or has not."""
        tensor = self._tensor(name)
        if shape and tuple(tensor.shape) != shape:
            raise self.wrong(f"'{name}' is {list(tensor.shape)}, where {list(shape)} was expected")
        self._taken.add(name)
        return tensor

    def take_like(self, name: str, own: Tensor) -> Tensor:
        """The tensor in the form of `own`: a matrix and a 1×1 convolution are the same."""
        tensor = self.take(name)
        if [n for n in tensor.shape if n > 1] != [n for n in own.shape if n > 1]:
            raise self.wrong(f"'{name}' is {list(tensor.shape)}, where {list(own.shape)} was expected")
        return tensor.reshape(own.shape)

    def check_all_taken(self) -> None:
        """Raises UserError when there are tensors that nobody has taken."""
        if left := sorted(self._tensors.keys() - self._taken):
            more = f" and {len(left) - 1} more" if left[1:] else ""
            raise self.wrong(f"found '{left[0]}'{more}, which it has not")

    def wrong(self, reason: str) -> UserError:
        """What is told when they are of something else."""
        return UserError(
            f"{self.config.path} is no {self.what} of {self.config.library}'s: {reason};"
            " check image_tokenizer.pretrained's library and path"
        )

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise self.wrong(f"there is no '{name}'")
        return self._tensors[name]


def _expected(library: str) -> str:
    if library == "openai":
        return "encoder.safetensors or decoder.safetensors"
    return "model.safetensors or diffusion_pytorch_model.safetensors"


class _Stored:
    """The tensors of a file; of safetensors none is read before it is asked for."""

    def __init__(self, file: Path, half: str) -> None:
        """`half`: what their names in the file are to begin with."""
        if not file.is_file():
            raise UserError(
                f"image_tokenizer.pretrained.path: expected weights at {file}, found no file: check the path"
            )
        self.file, self.half = file, half
        self._loaded = None if file.suffix == ".safetensors" else _tensors_of(_opened(file))
        self.names = [half + name for name in (self._header() if self._loaded is None else self._loaded)]

    def tensor(self, name: str) -> Tensor:
        name = name.removeprefix(self.half)
        if self._loaded is not None:
            return self._loaded[name]
        with safe_open(self.file, framework="pt") as opened:
            found: Tensor = opened.get_tensor(name)
        return found

    def _header(self) -> list[str]:
        try:
            with safe_open(self.file, framework="pt") as opened:
                return list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise _damaged(self.file, error) from error


def _opened(file: Path) -> object:
    try:
        found: object = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise _damaged(file, error) from error
    return found


def _damaged(file: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"{file} holds something else than tensors, or is damaged ({reason}): nothing else is read from it; where"
        " you trust it, load it with the library it comes from and save its state_dict with safetensors"
    )


def _tensors_of(found: object) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
