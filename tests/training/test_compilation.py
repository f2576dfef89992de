"""Promises of training.compile and training.activation_checkpointing: the same training, with other code or memory."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pipeline.config.training import TrainingConfig
from pipeline.core.compiler import missing_compiler
from pipeline.core.errors import UserError
from pipeline.image_tokenizer.base import build
from pipeline.training.activation_checkpointing import checkpoint_activations
from pipeline.training.compilation import compile_blocks
from pipeline.training.engines import build_engine
from tests.launch import launch
from tests.training.compile_worker import SAVED_AFTER, batch, built
from tests.training.engine_worker import SmallObjective

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EAGER: dict[str, Any] = {"kind": "deepspeed", "zero": 0}
RESUMED = EAGER | {"compile": True, "first": SAVED_AFTER + 1}
MUON = {"kind": "deepspeed", "zero": 1, "optimizer": "muon", "compile": True}  # whose own kernels run eagerly
COMPILED: list[dict[str, Any]] = [
    {"kind": "deepspeed", "zero": 2, "compile": True},
    {"kind": "deepspeed", "zero": 3, "compile": True, "activation_checkpointing": "block"},
    {"kind": "accelerate", "zero": 0, "compile": True, "activation_checkpointing": "attention"},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compiled")
    launch("tests.training.compile_worker", json.dumps([EAGER, RESUMED, MUON, *COMPILED]), str(folder))
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled_blocks_train_as_eager_ones_on_both_engines(case: dict[str, Any], trained: dict[str, Any]) -> None:
    found = trained[json.dumps(case)]
    assert found["losses"] == pytest.approx(trained[json.dumps(EAGER)]["losses"], rel=1e-6)
    assert found["same_names"]
    assert (found["graphs"], found["breaks"]) == (2, 0)  # one a pattern, neither of evaluation nor of sampling


@pytest.mark.slow
def test_a_compiled_training_resumes_what_an_eager_one_saved(trained: dict[str, Any]) -> None:
    expected = trained[json.dumps(EAGER)]["losses"][SAVED_AFTER + 1 :]
    assert trained[json.dumps(RESUMED)]["losses"] == pytest.approx(expected, rel=1e-6)
    assert trained[json.dumps(RESUMED)]["graphs"] == 2


@pytest.mark.slow
def test_muon_on_a_cpu_leaves_compilation_elsewhere_on(trained: dict[str, Any]) -> None:
    assert trained[json.dumps(MUON)]["graphs"] == 2
    assert trained[json.dumps(COMPILED[0])]["graphs"] == 2  # in the same process, after it


def test_a_tokenizers_blocks_compile_to_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"kind": "vqvae", "patch_size": 2, "widths": (8, 16), "blocks": 1, "stem_kernel": 1}
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    gradients, calls = [], []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        calls.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for compiled in (False, True):
        torch.manual_seed(0)
        objective = build(model, image_size=16).objective().train()
        if compiled:
            compile_blocks(objective, CPU)
        objective({"images": images}, 0)[0].backward()
        gradients.append([parameter.grad for parameter in objective.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)
    assert len(calls) == 2  # one for each resolution, in encoder and decoder


def test_compilation_without_a_compiler_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    training = TrainingConfig(steps=10, warmup_steps=0, batch_size=4, compile=True)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"expected a C\+\+ compiler .*found none: install it or set") as caught:
            build_engine("accelerate", SmallObjective(), training, None, tmp_path)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr("pipeline.core.compiler.find_spec", lambda _: None)
    assert missing_compiler(GPU) == "triton, which compiles for GPUs"
    monkeypatch.setattr("pipeline.core.compiler.find_spec", lambda name: name)
    assert str(missing_compiler(GPU)).startswith("a C compiler")
    monkeypatch.setenv("CC", "/bin/sh -m64")
    assert missing_compiler(GPU) is None
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert str(missing_compiler(GPU)).startswith(f"Python's headers for the compiler, {tmp_path}")


def _kept_bytes(what: Any) -> int:
    """Bytes of distinct tensors, but weights, that the forward pass keeps for the backward pass."""
    objective = built().train()
    if what != "none":
        checkpoint_activations(objective, what)
    weights = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = objective(batch(0), 0)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)


def test_recomputing_attention_alone_keeps_less_than_nothing_recomputed_and_more_than_blocks_recomputed() -> None:
    none, attention, block = (_kept_bytes(what) for what in ("none", "attention", "block"))
    assert 0.9 * none > attention > 1.5 * block


def test_recomputing_attention_alone_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        objective = built().train()
        if recompute:
            checkpoint_activations(objective, "attention")
        objective(batch(0), 0)[0].backward()
        gradients.append([parameter.grad for parameter in objective.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_what_is_recomputed_is_none_attention_or_block_and_old_values_keep_their_meaning(tmp_path: Path) -> None:
    values = {"steps": 10, "warmup_steps": 0, "batch_size": 4}
    for given, expected in ((True, "block"), (False, "none"), ("attention", "attention")):
        config = TrainingConfig.model_validate(values | {"activation_checkpointing": given})
        assert config.activation_checkpointing == expected
    config = TrainingConfig.model_validate(values | {"activation_checkpointing": "attention"})
    with pytest.raises(UserError, match="attention needs a model with attention, found none: set it to block or none"):
        build_engine("accelerate", SmallObjective(), config, None, tmp_path)
