"""Promises of continuous-depth blocks: Euler is the residual stack, and gradients agree however they are computed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from pipeline.config.base import parse_config
from pipeline.config.ode import OdeConfig
from pipeline.core.errors import UserError
from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.image_tokenizer.ode import OdeStack
from pipeline.training.activation_checkpointing import checkpoint_activations

GAIN, WIDTH = 0.5, 6


def branches(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Tanh(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Tanh(), nn.Conv2d(WIDTH, WIDTH, 1))
        for _ in range(count)
    ]


def stack(count: int = 2, **settings: object) -> OdeStack:
    return OdeStack(branches(count), GAIN, OdeConfig(**settings))  # type: ignore[arg-type]


def residual(z: Tensor, count: int) -> Tensor:
    for branch in branches(count):
        z = z + GAIN * branch(z)
    return z


def image() -> Tensor:
    return torch.randn(2, WIDTH, 5, 5, generator=torch.Generator().manual_seed(1))


def gradients(module: OdeStack, half: bool = False) -> list[Tensor]:
    """Gradients of the input and of every parameter; `half`: the forward pass under autocast, as in training."""
    z = image().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = module(z).square().sum()
    loss.backward()
    assert z.grad is not None
    return [z.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("count", [1, 3])
def test_an_euler_step_of_size_one_is_the_residual_block_to_the_last_bit(count: int) -> None:
    assert torch.equal(stack(count, solver="euler")(image()), residual(image(), count))


def test_an_euler_step_has_the_gradients_of_the_residual_stack() -> None:
    module = stack(3, solver="euler")
    z = image().requires_grad_()
    twin = copy.deepcopy(module.branches)
    out = z
    for branch in twin:
        out = out + GAIN * branch(out)
    out.square().sum().backward()
    expected = [z.grad, *(p.grad for p in twin.parameters())]
    torch.testing.assert_close(gradients(module), expected)


def test_one_block_alone_does_not_change_with_time() -> None:
    [branch] = branches(1)
    z = image()
    expected = z + GAIN * branch(z + GAIN / 2 * branch(z))
    torch.testing.assert_close(stack(1, solver="midpoint")(z), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "euler", "steps_per_block": 400},
        {"solver": "midpoint", "steps_per_block": 20},
        {"solver": "rk4", "steps_per_block": 4},
        {"solver": "dopri5", "tolerance": 1e-6},
    ],
)
def test_all_solvers_find_the_same_solution(settings: dict[str, object]) -> None:
    exact = stack(2, solver="rk4", steps_per_block=50)(image())
    torch.testing.assert_close(stack(2, **settings)(image()), exact, atol=2e-3, rtol=0)


def test_the_order_of_a_solver_is_what_it_says() -> None:
    exact = stack(2, solver="rk4", steps_per_block=64)(image())
    for solver, order in (("euler", 1), ("midpoint", 2)):
        errors = [(stack(2, solver=solver, steps_per_block=n)(image()) - exact).norm().item() for n in (8, 16)]
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "rk4", "steps_per_block": 8},
        {"solver": "midpoint", "steps_per_block": 50},
        {"solver": "dopri5", "tolerance": 1e-6, "steps_per_block": 8},
    ],
)
def test_adjoint_and_direct_gradients_agree(settings: dict[str, object]) -> None:
    direct, adjoint = (gradients(stack(2, adjoint=adjoint, **settings)) for adjoint in (False, True))
    assert len(direct) == len(adjoint) == 1 + 8
    for a, b in zip(direct, adjoint, strict=True):
        assert (a - b).norm() < 2e-3 * a.norm()


def test_tolerance_governs_the_gradients_of_dopri5s_adjoint() -> None:
    exact = torch.cat([g.flatten() for g in gradients(stack(3, solver="rk4", steps_per_block=64))])
    errors = []
    for tolerance in (1e-2, 1e-4, 1e-6):
        module = stack(3, solver="dopri5", adjoint=True, tolerance=tolerance, max_steps=2000)
        found = torch.cat([g.flatten() for g in gradients(module)])
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert errors[1] < errors[0] / 5
    assert errors[2] < errors[1] / 2
    assert errors[2] < 1e-3


@pytest.mark.parametrize("settings", [{"solver": "euler"}, {"solver": "midpoint"}, {"solver": "rk4"}])
@pytest.mark.parametrize("per_block", [1, 4])
def test_fixed_steps_are_torchdiffeqs_to_the_last_bit(settings: dict[str, str], per_block: int) -> None:
    module, z = stack(3, steps_per_block=per_block, **settings), image()
    slope = module._field("cpu")
    times = torch.tensor([0.0, 3.0])
    expected = odeint(slope, z, times, method=settings["solver"], options={"step_size": 1 / per_block})[-1]
    assert torch.equal(module(z), expected)


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_every_parameter_gets_a_gradient(solver: str) -> None:
    """DistributedDataParallel waits for ever for the gradient of a parameter that took no part."""
    assert len(gradients(stack(4, solver=solver, tolerance=10.0))) == 1 + 4 * 4


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("adjoint", [False, True])
def test_under_autocast_the_state_stays_float32_and_a_second_pass_gives_the_same_bits(
    solver: str, adjoint: bool
) -> None:
    seen = set()
    module = stack(2, solver=solver, adjoint=adjoint)
    module.branches[0][1].register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(image().bfloat16()).dtype == torch.float32
    once = gradients(module, half=True)
    module.zero_grad()
    again = gradients(module, half=True)
    assert seen == {torch.bfloat16}  # in the adjoint's backward pass too
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("adjoint", [False, True])
def test_what_dopri5_cannot_solve_is_a_step_that_is_not_finite_and_is_told_once(
    adjoint: bool, caplog: pytest.LogCaptureFixture
) -> None:
    module = stack(2, solver="dopri5", tolerance=1e-9, max_steps=2, adjoint=adjoint)
    for _ in range(2):
        found = gradients(module)
    assert all(gradient.isnan().any() for gradient in found)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_gradient_that_is_not_finite_passes_through_the_adjoint(solver: str) -> None:
    module = stack(2, solver=solver, adjoint=True)
    (module(image()) * float("inf")).sum().backward()
    assert not all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_channels_last_stays() -> None:
    z = image().contiguous(memory_format=torch.channels_last)
    assert stack(2, adjoint=True)(z).is_contiguous(memory_format=torch.channels_last)


def test_config_says_what_it_takes() -> None:
    with pytest.raises(UserError, match="steps_per_block.*greater than or equal to 1"):
        parse_config(OdeConfig, {"steps_per_block": 0}, "test")


def test_a_tokenizer_with_euler_blocks_is_the_one_with_residual_blocks(tmp_path: Path) -> None:
    small = {"kind": "vqvae", "patch_size": 2, "widths": (16, 32), "blocks": 2, "bottleneck": 2}
    small |= {"quantizer": {"kind": "fsq", "channels": (8, 5, 5)}}
    tokenizers = []
    for extra in ({}, {"block": "ode", "ode": {"solver": "euler"}}):
        torch.manual_seed(0)
        tokenizers.append(build(small | extra, image_size=16).eval())
    images = torch.rand(3, 3, 16, 16)
    residual, euler = tokenizers
    assert sum(p.numel() for p in residual.parameters()) == sum(p.numel() for p in euler.parameters())
    [codes] = residual.encode(images)
    assert torch.equal(codes, euler.encode(images)[0])
    assert torch.equal(residual.decode([codes]), euler.decode([codes]))
    euler.save_pretrained(tmp_path)
    assert torch.equal(ImageTokenizer.from_pretrained(tmp_path).decode([codes]), euler.decode([codes]))


@pytest.mark.parametrize("adjoint", [False, True])
def test_activation_checkpointing_changes_no_gradient_of_it(adjoint: bool) -> None:
    model = {"kind": "vqvae", "patch_size": 2, "widths": (8, 8), "bottleneck": 1, "block": "ode"}
    model |= {"ode": {"adjoint": adjoint}, "quantizer": {"kind": "fsq", "channels": (4, 4)}}
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        objective = build(model, image_size=16).objective()
        if recompute:
            checkpoint_activations(objective)
        loss, _ = objective({"images": torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)}, 0)
        loss.backward()
        found.append([p.grad for p in objective.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
