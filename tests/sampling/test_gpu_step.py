"""What a decode step costs on a GPU: launches, and no waiting for the device. On fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.config.transformer import TransformerShape
from pipeline.core.fake_cuda import fake_cuda, to_fake_cuda
from pipeline.sampling import draw_next
from pipeline.sampling.cuda_graph import Replayed
from pipeline.sampling.decode import draw_codes
from pipeline.sampling.decode_step import ModelStep
from pipeline.sampling.draw_next import Drawing, DrawNext, DrawWithNumbers, DrawWithTensors, guidance_scales
from pipeline.sampling.static_step import StaticStep, static_length
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from tests.launches import Launches
from tests.no_sync import no_sync

OnCode = Callable[[int, Tensor], object] | None
LAYOUT = Layout.of(8, 300, [(2, 2, 512), (3, 3, 1024)])
EVERYTHING = SamplingConfig(
    guidance=3, guidance_schedule="cosine", top_k=100, top_p=0.9, min_p=0.01, temperature=0.9, dtype="bf16"
)
SHAPES: list[dict[str, object]] = [
    {},
    {"style": "modern"},
    {"style": "modern", "kv_heads": 1, "attention": "sparse"},
    {"style": "classic"},
]


def fake_model(shape: dict[str, object], layers: int) -> Transformer:
    """In bf16 on the fake GPU; to be called inside `fake_cuda`."""
    values = {"layers": layers, "width": 64, "heads": 2, **shape}
    model = Transformer(LAYOUT, TransformerShape.model_validate(values)).eval()
    to_fake_cuda(model, torch.bfloat16)
    return model


def turn(model: Transformer, sampling: SamplingConfig, reference: bool) -> DrawNext:
    """What draws the next code of 4 images."""
    cuda = {"device": "cuda"}
    codes = torch.zeros(4, LAYOUT.image_length, dtype=torch.int64, **cuda)
    uniforms = torch.zeros(4, LAYOUT.image_length, dtype=torch.float64, **cuda)
    scales = guidance_scales(sampling, LAYOUT)
    rows = 4 if scales is None else 8
    drawing = Drawing(codes, uniforms, None, sampling, scales)
    hidden = torch.zeros(rows, model.shape.width, dtype=torch.bfloat16, **cuda)
    cache = model.new_cache(rows, static_length(LAYOUT.length))
    if reference:
        return DrawWithNumbers(ModelStep(model, cache), hidden, drawing)
    return DrawWithTensors(StaticStep(model, cache, 0), hidden, drawing)


def launches(shape: dict[str, object], layers: int, sampling: SamplingConfig, reference: bool = False) -> Launches:
    """Those of one code: logits, draw and step."""
    with fake_cuda(), torch.inference_mode():
        draw = turn(fake_model(shape, layers), sampling, reference)
        draw(0)  # makes what is made once
        with Launches() as counted:
            draw(1)
    return counted


@pytest.fixture(autouse=True)
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors cannot be captured; what would be runs as it is."""
    monkeypatch.setattr(draw_next, "Replayed", lambda _: Replayed(torch.device("cpu")))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sampling", [SamplingConfig(), EVERYTHING], ids=["plain", "everything"])
def test_a_code_takes_at_most_30_launches_a_layer_and_30(shape: dict[str, object], sampling: SamplingConfig) -> None:
    counted = launches(shape, 4, sampling)
    assert counted.total <= 30 * 4 + 30, counted


def images(shape: dict[str, object], sampling: SamplingConfig, on_code: OnCode = None) -> Tensor:
    """The codes of 3 images of 2 prompts, by the whole loop; to be called inside `fake_cuda`."""
    model = fake_model(shape, 2)
    text = torch.zeros(2, LAYOUT.text_length, dtype=torch.int64, device="cuda")
    prompt_of = torch.zeros(3, dtype=torch.int64, device="cuda")
    uniforms = torch.zeros(3, LAYOUT.image_length, dtype=torch.float64, device="cuda")
    return draw_codes(model, text, prompt_of, uniforms, sampling, on_code=on_code)


def test_nothing_is_computed_in_float64_and_nothing_sorted_without_top_p() -> None:
    with fake_cuda(), _Results() as counted:
        images({"positions": "learned"}, SamplingConfig(top_k=100, guidance=3))
    assert not counted.float64
    assert not any("sort" in name for name in counted.by_operation)


class _Results(Launches):
    """Also which operations give float64."""

    def __init__(self) -> None:
        super().__init__()
        self.float64: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        made = "zeros" not in func.__name__ and not func.is_view
        if made and isinstance(result, Tensor) and result.dtype == torch.float64:
            self.float64.add(func.__name__)
        return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_image_waits_for_the_device_between_its_codes(shape: dict[str, object]) -> None:
    with fake_cuda(), ExitStack() as stack:
        images(shape, EVERYTHING, lambda drawn, _: stack.enter_context(no_sync()) if drawn == 1 else None)
