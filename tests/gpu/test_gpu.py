"""Promises that only a GPU can prove (`pytest -m gpu`), whose bodies run once on the CPU everywhere.

Figures instead of promises: `python -m benchmarks.gpu`.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks.gpu_models import FULL, TINY
from benchmarks.gpu_parts import plan, resume
from pipeline.config.generate import SamplingConfig
from pipeline.sampling.decode import candidate_uniforms, draw_codes
from pipeline.transformer.attention import attend
from pipeline.transformer.layout import Layout
from tests.gpu.worker import LAYOUT, transformer
from tests.launch import launch

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
)
on_both = pytest.mark.parametrize("device", ["cpu", GPU])
LOSSES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32", "zero": 0},
    "bf16-autocast": {"precision": "bf16-autocast", "zero": 1},
    "bf16-weights": {"precision": "bf16-weights", "zero": 1},
    "fp16": {"precision": "fp16", "zero": 1},
    **{f"ZeRO {stage}": {"precision": "fp32", "zero": stage} for stage in (1, 2, 3)},
    "compiled": {"precision": "fp32", "zero": 1, "compile": True},
}
ONLY_ON_GPUS = {"fp16", "compiled"}  # compiled on CPUs: tests/training/test_compilation.py
WAITS: dict[str, dict[str, Any]] = {
    "transformer": {"kind": "deepspeed", "precision": "bf16-weights", "zero": 1},
    "transformer, ZeRO 2": {"kind": "deepspeed", "precision": "bf16-weights", "zero": 2},
    "tokenizer": {"kind": "accelerate", "precision": "bf16-autocast", "zero": None},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By device, and by the names of LOSSES and WAITS; each case that the machine has, in a process of its own."""
    results: dict[str, dict[str, Any]] = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        losses = {name: case for name, case in LOSSES.items() if device == "cuda" or name not in ONLY_ON_GPUS}
        cases = [*(("losses", case) for case in losses.values()), *(("waits", case) for case in WAITS.values())]
        file = tmp_path_factory.mktemp("gpu") / "found.json"
        # DeepSpeed's bf16 is global to a process.
        ordered = sorted(range(len(cases)), key=lambda index: str(cases[index][1]["precision"]), reverse=True)
        launch("tests.gpu.worker", json.dumps([cases[index] for index in ordered]), str(file), **hidden)
        by_index = dict(zip(ordered, json.loads(file.read_text()), strict=True))
        results[device] = {name: by_index[index] for index, name in enumerate([*losses, *WAITS])}
    return results


def _case(found: dict[str, dict[str, Any]], device: str, name: str) -> Any:
    if device == "cpu" and name in ONLY_ON_GPUS:
        pytest.skip("on GPUs only")
    return found[device][name]


@pytest.mark.slow
@on_both
@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast", "bf16-weights", "fp16"])
def test_a_training_step_computes_in_its_precision(
    precision: str, device: str, found: dict[str, dict[str, Any]]
) -> None:
    case = _case(found, device, precision)
    expected = {"fp32": "float32", "fp16": "float16"}.get(precision, "bfloat16")
    assert case["device"] == [device]
    assert set(case["dtypes"].values()) == {expected}, case["dtypes"]
    assert len(case["dtypes"]) == 4
    weights = "float32" if precision in ("fp32", "bf16-autocast") else expected
    assert case["weights"] == [f"torch.{weights}"]
    assert case["masters"] == ["torch.float32"]
    assert case["losses"][-1] < 0.98 * case["losses"][1]  # the same batch
    assert case["losses"] == pytest.approx(found[device]["fp32"]["losses"], rel=0.03)


@pytest.mark.slow
@on_both
@pytest.mark.parametrize("case", ["ZeRO 1", "ZeRO 2", "ZeRO 3", "compiled"])
def test_zero_and_compilation_change_no_loss_on_one_device(
    case: str, device: str, found: dict[str, dict[str, Any]]
) -> None:
    assert _case(found, device, case)["losses"] == pytest.approx(found[device]["fp32"]["losses"], rel=1e-4)


@pytest.mark.slow
@on_both
@pytest.mark.parametrize("case", WAITS)
def test_no_training_step_waits_for_the_device(case: str, device: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[device][case] == ""


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_killed_and_resumed_with_deterministic_ends_with_the_same_bits() -> None:
    assert resume(TINY)[0][1] == "same bits"  # on CPUs: tests/training/test_resume.py


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_plan_says_what_a_training_takes() -> None:
    (_, _, against, verdict), *_ = plan(FULL)
    assert verdict == "holds", against


@on_both
def test_the_static_cache_draws_the_codes_of_the_reference(device: str) -> None:
    model = transformer().transformer.to(device).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    text = torch.randint(1, 40, (3, LAYOUT.text_length), generator=torch.Generator().manual_seed(0)).to(device)
    uniforms = torch.stack([candidate_uniforms(0, i, 0, LAYOUT.image_length) for i in range(3)]).to(device)
    rows = torch.arange(3, device=device)
    codes = [draw_codes(model, text, rows, uniforms, SamplingConfig(), step=kind) for kind in ("static", "model")]
    assert torch.equal(*codes)
    assert codes[0].device.type == device


@pytest.mark.slow
@on_both
@pytest.mark.parametrize("pattern", ["row", "column", "convolution"])
def test_flex_attention_is_the_dense_one(pattern: Any, device: str) -> None:
    """On a GPU with gradients, over several blocks and an odd length; FlexAttention has none on CPUs."""
    from tests.transformer.test_tables import tables_of

    layout = Layout.of(100, 40, [(8, 8, 16), (16, 16, 16)])
    tables = tables_of(layout, torch.device(device))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, heads, layout.length, 16, generator=generator).to(device) for heads in (4, 2, 2)]
    results = []
    for backend in ("flex", "sdpa"):
        copies = [tensor.clone().requires_grad_(device == "cuda") for tensor in inputs]
        mixed = attend(copies[0], copies[1], copies[2], 0.25, pattern, tables, backend)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(mixed.square().sum(), copies) if device == "cuda" else ()
        results.append([mixed, *gradients])
    torch.testing.assert_close(
        *results, rtol=1e-2 if device == "cuda" else 1e-5, atol=1e-2 if device == "cuda" else 1e-5
    )
