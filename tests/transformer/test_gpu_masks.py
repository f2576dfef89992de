"""Which masks a training step on a GPU makes, held on fake CUDA tensors, with and without a compiler."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config.transformer import TransformerConfig
from pipeline.core.fake_cuda import fake_cuda, to_fake_cuda
from pipeline.transformer import attention
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.objective import JointObjective
from pipeline.transformer.tables import Tables

LAYOUT = Layout.of(6, 30, [(2, 2, 16), (4, 4, 16)])
SHAPES: dict[str, dict[str, object]] = {
    "any": {"order": "any"},
    "scale": {"order": "scale"},
    "sparse": {"attention": "sparse", "layers": 3},
}


@pytest.fixture
def without_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.core.compiler.find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)


def _masks_of_a_step(shape: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many masks of each kind two steps made."""
    made = {"allowed": 0, "bias": 0, "block_mask": 0}

    def count(name: str) -> None:
        make = getattr(Tables, name)

        def counted(tables: Tables, *arguments: object) -> object:
            made[name] += 1
            return make(tables, *arguments)

        monkeypatch.setattr(Tables, name, counted)

    config = TransformerConfig.model_validate({"layers": 2, "width": 32, "heads": 2, **SHAPES[shape]})
    objective = JointObjective(build_transformer(LAYOUT, config), config).train()
    for name in made:
        count(name)
    with fake_cuda():
        to_fake_cuda(objective, torch.bfloat16)
        with monkeypatch.context() as patch:  # the rest of torch would look for a real one
            patch.setattr("torch.cuda.is_available", lambda: True)
            _ = objective.transformer.tables.compiles_flex
        sizes = {"text": LAYOUT.text_length, "codes": LAYOUT.image_length}
        batch = {name: torch.zeros((2, n), dtype=torch.long, device="cuda") for name, n in sizes.items()}
        for step in range(2):
            loss, _ = objective(batch, step)
            loss.backward()
    return made


def test_order_any_makes_no_mask_of_all_pairs_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(_masks_of_a_step("any", monkeypatch).values()) == {0}


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("shape", ["scale", "sparse"])
def test_without_a_compiler_sparse_layers_and_order_scale_train_with_dense_masks_and_say_so_once(
    shape: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        made = _masks_of_a_step(shape, monkeypatch)
    assert made["allowed"] > 0
    assert made["block_mask"] == 0
    [told] = [record.getMessage() for record in caplog.records]
    assert told.startswith("attention: expected a C compiler (gcc, clang, or $CC), which triton calls, found none")


@pytest.mark.parametrize("shape", ["scale", "sparse"])
def test_with_a_compiler_they_take_flex_attention(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def flex(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        return query + key + value

    monkeypatch.setattr("pipeline.transformer.tables.missing_compiler", lambda _: None)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex)
    made = _masks_of_a_step(shape, monkeypatch)
    assert made["block_mask"] > 0
    assert made["allowed"] == 0
