"""Promises of pipeline/transformer/functional.py: hand-written derivatives are those of automatic differentiation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.transformer import functional


def test_rms_norm_is_that_of_torch_with_its_derivatives() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)[:, :, :2].requires_grad_()  # heads of a larger tensor
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(functional.rms_norm(x, weight, 1e-3), F.rms_norm(x, (8,), weight, 1e-3))
    # As attention takes it: its gradient comes with other strides.
    assert torch.autograd.gradcheck(
        lambda x, weight: functional.rms_norm(x, weight, 1e-3).transpose(1, 2).contiguous(), (x, weight)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_cross_entropy_is_that_of_its_definition_with_its_derivatives(
    smoothing: float, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(functional._CHUNK_ELEMENTS, "cpu", 3 * 7)  # 3 positions at a time, and a rest
    torch.manual_seed(0)
    hidden = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (2, 4))
    total, plain = functional.cross_entropy(hidden, weight, targets, smoothing, z_loss)
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits.mT, targets, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(total, expected + z_loss * logits.logsumexp(-1).square())
    torch.testing.assert_close(plain, F.cross_entropy(logits.mT, targets, reduction="none"))
    assert not plain.requires_grad
    assert torch.autograd.gradcheck(
        lambda hidden, weight: functional.cross_entropy(hidden, weight, targets, smoothing, z_loss)[0], (hidden, weight)
    )


def test_cross_entropy_of_extreme_logits_is_finite_and_right() -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[500.0, -500.0], [-500.0, 500.0], [0.0, 0.0]], requires_grad=True)
    total, plain = functional.cross_entropy(hidden, weight, torch.tensor([1, 1]))
    assert plain.tolist() == [1000.0, 0.0]
    total.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[1000.0, -1000.0], [0.0, 0.0]]


@pytest.mark.parametrize("function", ["rms_norm", "cross_entropy"])
def test_in_bf16_values_and_gradients_are_right_within_its_precision(function: str) -> None:
    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if function == "rms_norm":
            return functional.rms_norm(x, weight, 1e-6)
        return functional.cross_entropy(x, weight, targets)[0]

    torch.manual_seed(0)
    x, targets = torch.randn(64, 32).bfloat16(), torch.randint(0, 50, (64,))
    weight = (torch.randn(32) if function == "rms_norm" else torch.randn(50, 32)).bfloat16()
    upstream = torch.randn_like(run(x, weight)).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [value.to(dtype).requires_grad_() for value in (x, weight)]
        out = run(*inputs)
        found.append([out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))])
    for mine, exact in zip(*found, strict=True):
        assert float((mine - exact).detach().norm() / exact.detach().norm()) < torch.finfo(torch.bfloat16).eps
