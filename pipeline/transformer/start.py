"""A transformer that starts with another one's weights (`transformer.init_from`), as far as they fit.

    weights = OtherWeights(transformer, folder, ours, theirs)      # reads headers alone
    initial.replace(weights.values)                                # a parameter at a time, when it gets its values

Taken as it is: every tensor of the same name and shape. Rows of the embedding and of the head: text by token string,
codes by id where a level has as many, the pads and positions of more text with the last one's values. Learned tables
of rows and columns of another size are interpolated linearly (as Dosovitskiy et al. 2021, section 3.2, do in 2D).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config.base import parse_config
from pipeline.config.transformer import TransformerShape
from pipeline.core.atomic_io import read_json
from pipeline.core.start_weights import Fit
from pipeline.core.tensor_file import TensorFile, TensorLayout
from pipeline.core.weights import weight_files
from pipeline.transformer.bit_groups import ids_of
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer

Vocabulary = Mapping[str, int]  # token -> id
_FRESH = -1


class OtherWeights:
    """Another model's weights in a folder, read a tensor at a time."""

    def __init__(
        self, model: Transformer, folder: Path, ours: Vocabulary | None = None, theirs: Vocabulary | None = None
    ) -> None:
        """`ours`, `theirs`: of the text tokenizers; without them rows of text are taken by id, if there are as many."""
        self.fit = Fit()
        self._model, self._layout = model, model.ids
        self._files = {name: file for file in map(TensorFile, _paths(folder)) for name in file.layouts}
        config = read_json(folder / "config.json")
        shape = parse_config(TransformerShape, config["shape"], str(folder))
        self._theirs = ids_of(Layout.from_dict(config["layout"]), shape.code_groups)
        self._as_many_digits = shape.code_groups == model.shape.code_groups
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._text = self._text_rows(ours, theirs)
        self._rows = {"embedding.weight": self._embedding_rows(), "head.weight": self._predictable_rows()}
        self.fit.changed += _other_shape(shape, model.shape)
        self._taken = {name for name, parameter in model.named_parameters() if self._fits(name, parameter)}

    def values(self, parameter: nn.Parameter, drawn: Tensor) -> Tensor:
        """What a parameter of the model starts with: of the other model, or `drawn`, float32 and in full."""
        name = self._names.get(id(parameter), "")
        if name not in self._taken:
            return drawn
        found = self._files[name].layouts[name]
        other = torch.empty(found.elements, dtype=torch.float32)
        self._files[name].read_into(name, 0, other)
        other = other.view(found.shape)
        if name in self._rows:
            return _rows_of(other, drawn, self._rows[name])
        if other.shape == drawn.shape:
            return other
        return _extended(other, len(drawn)) if name == "text_position.weight" else _interpolated(other, len(drawn))

    def _fits(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the other model has something for this parameter; noted in `fit`."""
        found = self._files[name].layouts[name] if name in self._files else None
        shape = tuple(parameter.shape)
        table = name == "text_position.weight" or name.startswith(("rows.", "columns."))
        if found is None or (
            found.shape != shape and not (_same_width(found, shape) and (table or name in self._rows))
        ):
            self.fit.fresh.append(f"{name}: expected {list(shape)}, found {list(found.shape) if found else 'none'}")
            return False
        self.fit.taken += 1
        if name in self._rows:
            fresh = int((self._rows[name] == _FRESH).sum())
            if fresh:
                self.fit.changed.append(f"{name}: {shape[0] - fresh} of {shape[0]} rows; the others begin fresh")
        elif found.shape != shape:
            how = "the last one's values for more" if name == "text_position.weight" else "interpolated"
            self.fit.changed.append(f"{name}: {found.shape[0]} positions to {shape[0]}, {how}")
        return True

    def _text_rows(self, ours: Vocabulary | None, theirs: Vocabulary | None) -> list[int]:
        """For each of our text ids the other model's."""
        size = self._layout.text_vocab_size
        if ours is not None and theirs is not None:
            rows = [_FRESH] * size
            for token, number in ours.items():
                rows[number] = theirs.get(token, _FRESH)
            return rows
        same = size == self._theirs.text_vocab_size
        how = "by id" if same else f"fresh, expected {size}, found {self._theirs.text_vocab_size}"
        self.fit.changed.append(f"no text tokenizer near the other model: rows of text are {how}")
        return list(range(size)) if same else [_FRESH] * size

    def _predictable_rows(self) -> Tensor:
        rows = list(self._text)
        levels = self._theirs.levels
        for index, level in enumerate(self._layout.levels):
            fits = index < len(levels) and levels[index].codebook_size == level.codebook_size and self._as_many_digits
            first = self._theirs.level_offsets[index] if fits else 0
            rows += range(first, first + level.codebook_size) if fits else [_FRESH] * level.codebook_size
        return torch.tensor(rows)

    def _embedding_rows(self) -> Tensor:
        last = self._theirs.text_length - 1
        pads = [self._theirs.pad_offset + min(position, last) for position in range(self._layout.text_length)]
        return torch.cat([self._predictable_rows(), torch.tensor([*pads, self._theirs.start_id])])


def _other_shape(theirs: TransformerShape, ours: TransformerShape) -> list[str]:
    """What differs in the shape: weights may fit and mean something else, as with another number of heads."""
    names = [name for name in TransformerShape.model_fields if name != "style"]
    pairs = [(name, getattr(theirs, name), getattr(ours, name)) for name in names]
    return [f"shape: {name}: {before} -> {now}" for name, before, now in pairs if before != now]


def _paths(folder: Path) -> list[Path]:
    return [folder / name for name in weight_files(folder)]


def _same_width(found: TensorLayout, shape: tuple[int, ...]) -> bool:
    return len(found.shape) == len(shape) and found.shape[1:] == shape[1:]


def _rows_of(other: Tensor, drawn: Tensor, rows: Tensor) -> Tensor:
    return torch.where((rows == _FRESH)[:, None], drawn, other[rows.clamp(min=0)])


def _extended(table: Tensor, length: int) -> Tensor:
    """The first `length` rows; behind the last one its copies."""
    return table[torch.arange(length).clamp(max=len(table) - 1)]


def _interpolated(table: Tensor, length: int) -> Tensor:
    """[n, D] -> [length, D]."""
    resized: Tensor = nn.functional.interpolate(table.T[None], length, mode="linear", align_corners=False)
    return resized[0].T.contiguous()
