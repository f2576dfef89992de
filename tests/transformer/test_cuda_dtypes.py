"""Promises of the transformer's training step on GPUs, held on fake CUDA tensors: precision, launches, no waiting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config.transformer import TransformerConfig
from pipeline.core.fake_cuda import fake_cuda, to_fake_cuda
from pipeline.transformer import attention, cross_entropy
from pipeline.transformer.attention_patterns import Pattern
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.norms import LayerNorm, RMSNorm
from pipeline.transformer.objective import JointObjective
from pipeline.transformer.tables import Tables
from tests.dtypes import Dtypes
from tests.launches import Launches
from tests.no_sync import no_sync

LAYOUT = Layout.of(16, 300, [(4, 4, 128), (8, 8, 512)])
BATCH = 4
BF16 = torch.bfloat16
SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "modern": {"style": "modern"},
    "modern, shared keys": {"style": "modern", "kv_heads": 1},
    "classic": {"style": "classic", "layers": 3},
    "classic, qk_norm": {"style": "classic", "qk_norm": True},
    "classic, rotary": {"style": "classic", "positions": "rotary"},
    "no qk_norm": {"qk_norm": False},
    "z-loss, smoothing, dropout": {"z_loss": 1e-4, "label_smoothing": 0.1, "dropout": 0.1},
}
# bf16-autocast, whose weights are float32, and bf16, whose weights are what they say.
PRECISIONS = {"bf16-autocast": torch.float32, "bf16": BF16}


def objective_of(**shape: Any) -> JointObjective:
    config = TransformerConfig.model_validate({"layers": 1, "width": 64, "heads": 2} | shape)
    return JointObjective(Transformer(LAYOUT, config), config).train()


def batch() -> dict[str, Tensor]:
    """On the fake GPU."""
    sizes = {"text": LAYOUT.text_length, "codes": LAYOUT.image_length}
    return {name: torch.zeros((BATCH, n), dtype=torch.long, device="cuda") for name, n in sizes.items()}


def autocast(precision: str) -> AbstractContextManager[object]:
    return torch.autocast("cuda", BF16) if precision == "bf16-autocast" else nullcontext()


@contextmanager
def on_fake_gpu(objective: JointObjective, precision: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sparse layers through the stand-in of attention, because FlexAttention compiles for a real GPU."""

    def flex(query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern, tables: Tables) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)

    monkeypatch.setattr(attention, "_flex", flex)
    monkeypatch.setattr(Tables, "block_mask", lambda *_: None)
    with fake_cuda():
        to_fake_cuda(objective, PRECISIONS[precision])
        yield


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_bf16_step_is_in_bf16_but_for_the_sums_of_the_loss(
    shape: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = objective_of(**SHAPES[shape])
    seen: dict[str, set[torch.dtype]] = {"residual": set(), "norm": set(), "head": set(), "q, k, v": set()}
    for block in objective.transformer.blocks:
        block.register_forward_hook(lambda _, args, out: seen["residual"].update({args[0].dtype, out.dtype}))
    for module in objective.modules():
        if isinstance(module, (RMSNorm, LayerNorm)):
            module.register_forward_hook(lambda _, args, out: seen["norm"].update({args[0].dtype, out.dtype}))

    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        seen["q, k, v"].update({query.dtype, key.dtype, value.dtype})
        return own_attend(query, key, value, *rest)

    own_attend = attention.attend
    monkeypatch.setattr(attention, "attend", attend)
    with on_fake_gpu(objective, precision, monkeypatch):
        with Dtypes("cuda") as step:
            with autocast(precision):
                factors = objective.transformer.hidden_and_head_weights(*batch().values())
                seen["head"].update(x.dtype for own in factors for x in own)
                loss, metrics = objective(batch(), 0)
            loss.backward()
        assert seen == {part: {BF16} for part in seen}
        assert {x.dtype for x in (loss, *metrics.values())} == {torch.float32}
        assert {p.grad.dtype for p in objective.parameters() if p.grad is not None} == {PRECISIONS[precision]}
    assert step.found["mm"] == {BF16}
    assert step.found["amax"] == step.found["exp_"] == step.found["sum"] - {BF16} == {torch.float32}
    assert not [name for name, dtypes in step.found.items() if torch.float64 in dtypes]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", ["default", "modern", "classic", "z-loss, smoothing, dropout"])
def test_a_step_does_not_wait_for_the_gpu(shape: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_of(**SHAPES[shape])
    with on_fake_gpu(objective, precision, monkeypatch):
        own = batch()
        with autocast(precision):
            objective(own, 0)  # tables are made
        with no_sync():
            with autocast(precision):
                loss, _ = objective(own, 0)
            loss.backward()


# Before, with norms and head in float32 under autocast: 73, 103 and 57.
@pytest.mark.parametrize(
    ("shape", "precision", "most"),
    [
        ("default", "bf16-autocast", 50),
        ("default", "bf16", 34),
        ("modern", "bf16-autocast", 62),
        ("modern", "bf16", 46),
        ("classic", "bf16-autocast", 41),
        ("classic", "bf16", 25),
    ],
)
def test_launches_of_a_layer_in_a_training_step_stay_few(
    shape: str, precision: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for layers in (2, 3):
        objective = objective_of(**{**SHAPES[shape], "attention": "full", "layers": layers})
        with on_fake_gpu(objective, precision, monkeypatch):
            own = batch()
            with autocast(precision):
                objective(own, 0)
            with Launches() as launches:
                with autocast(precision):
                    loss, _ = objective(own, 0)
                loss.backward()
        counts.append(launches)
    assert counts[1].total - counts[0].total <= most, counts[1]


def test_neither_training_nor_evaluation_keeps_a_tensor_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy._CHUNK_ELEMENTS, "cuda", 2**13)  # 16 positions at a time
    objective = objective_of()
    rows: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Sequence[type], args: tuple[object, ...] = (), kwargs: dict | None = None
        ) -> object:
            result = func(*args, **(kwargs or {}))
            found = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            rows.extend(x.numel() // 512 for x in found if x.shape[-1:] == (512,))  # the finer level's ids
            return result

    with on_fake_gpu(objective, "bf16", monkeypatch):
        with Sizes():
            loss, _ = objective(batch(), 0)
            loss.backward()
        with Sizes(), torch.no_grad():
            objective.eval()(batch(), 0)
    assert max(rows) == 64  # of the transposed head; logits have 16
