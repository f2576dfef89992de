"""Promises of functional.py and cross_entropy.py: hand-written derivatives are those of automatic differentiation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.transformer import cross_entropy as module
from pipeline.transformer import functional
from pipeline.transformer.cross_entropy import Part, cross_entropy


def test_rms_norm_is_that_of_torch_with_its_derivatives() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)[:, :, :2].requires_grad_()  # heads of a larger tensor
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(functional.rms_norm(x, weight, 1e-3), F.rms_norm(x, (8,), weight, 1e-3))
    # As attention takes it: its gradient comes with other strides.
    assert torch.autograd.gradcheck(
        lambda x, weight: functional.rms_norm(x, weight, 1e-3).transpose(1, 2).contiguous(), (x, weight)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_that_of_autograd_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    both = torch.randn(5, 3, 2 * 67).to(dtype).requires_grad_()
    gate, value = both.chunk(2, dim=-1)
    expected, mine = F.silu(gate) * value, functional.swiglu(both)
    upstream = torch.randn_like(expected)
    assert torch.equal(mine, expected)
    assert torch.equal(*(torch.autograd.grad(out, both, upstream)[0] for out in (mine, expected)))


@pytest.fixture(params=["gradient of logits kept", "gradients accumulated"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """CPUs' way to the gradients, and that of GPUs; 3 positions at a time, and a rest."""
    monkeypatch.setattr(module, "_keeps_gradient_of_logits", lambda _: request.param == "gradient of logits kept")
    monkeypatch.setitem(module._CHUNK_ELEMENTS, "cpu", 3 * 7)
    return request.param


def two_levels(dtype: torch.dtype) -> list[Part]:
    torch.manual_seed(0)
    return [
        Part(
            torch.randn(2, n, 5, dtype=dtype, requires_grad=True),
            torch.randn(ids, 5, dtype=dtype, requires_grad=True),
            torch.randint(0, ids, (2, n)),
        )
        for n, ids in ((4, 7), (1, 3))
    ]


def defined(parts: list[Part], smoothing: float, z_loss: float) -> list[Tensor]:
    """The losses of all targets, as the docstring defines them."""
    found = []
    for part in parts:
        logits = part.hidden @ part.weight.T
        smoothed = F.cross_entropy(logits.mT, part.targets, label_smoothing=smoothing, reduction="none")
        found.append(smoothed + z_loss * logits.logsumexp(-1).square())
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_cross_entropy_is_that_of_its_definition_with_its_derivatives(
    smoothing: float, z_loss: float, path: str
) -> None:
    parts = two_levels(torch.float64)
    losses = cross_entropy(parts, smoothing, z_loss)
    torch.testing.assert_close(losses.mean, torch.cat(defined(parts, smoothing, z_loss), dim=1).mean())
    for plain, expected in zip(losses.plain, defined(parts, 0.0, 0.0), strict=True):
        torch.testing.assert_close(plain, expected)
        assert not plain.requires_grad

    def mean(*factors: Tensor) -> Tensor:
        own = [Part(*factors[i : i + 2], part.targets) for i, part in zip((0, 2), parts, strict=True)]
        return cross_entropy(own, smoothing, z_loss).mean

    assert torch.autograd.gradcheck(mean, [factor for part in parts for factor in (part.hidden, part.weight)])


def test_targets_that_do_not_count_have_no_gradient(path: str) -> None:
    parts = two_levels(torch.float64)
    counted = torch.tensor([[True] * 5, [False] * 5])
    losses = cross_entropy(parts, counted=counted, count=2.5)
    torch.testing.assert_close(losses.mean, torch.cat(defined(parts, 0.0, 0.0), dim=1)[0].sum() / 2.5)
    factors = [factor for part in parts for factor in (part.hidden, part.weight)]
    expected = torch.autograd.grad(sum(own[0].sum() for own in defined(parts, 0.0, 0.0)) / 2.5, factors)
    for mine, its in zip(torch.autograd.grad(losses.mean, factors), expected, strict=True):
        torch.testing.assert_close(mine, its)


def test_without_gradients_losses_are_the_same_and_what_is_likeliest_is_known(path: str) -> None:
    parts = two_levels(torch.float32)
    training = cross_entropy(parts, 0.1, 0.01)
    with torch.no_grad():
        evaluated = cross_entropy(parts, 0.1, 0.01)
    torch.testing.assert_close(evaluated.mean, training.mean.detach())
    assert not training.right
    for part, plain, right, its in zip(parts, evaluated.plain, evaluated.right, training.plain, strict=True):
        assert torch.equal(plain, its)
        assert torch.equal(right, (part.hidden @ part.weight.T).argmax(-1) == part.targets)


def test_cross_entropy_of_extreme_logits_is_finite_and_right(path: str) -> None:
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    weight = torch.tensor([[500.0, -500.0], [-500.0, 500.0], [0.0, 0.0]], requires_grad=True)
    losses = cross_entropy([Part(hidden, weight, torch.tensor([[1, 1]]))])
    assert losses.plain[0].tolist() == [[1000.0, 0.0]]
    (2 * losses.mean).backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[[1000.0, -1000.0], [0.0, 0.0]]]


@pytest.mark.parametrize("function", ["rms_norm", "cross_entropy"])
def test_in_bf16_values_and_gradients_are_right_within_its_precision(function: str, path: str) -> None:
    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if function == "rms_norm":
            return functional.rms_norm(x, weight, 1e-6)
        return cross_entropy([Part(x[None], weight, targets[None])]).mean

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
