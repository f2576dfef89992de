"""The tests' own instruments: fake CUDA tensors, launches counted, waits for the GPU found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.core.fake_cuda import fake_cuda, to_fake_cuda
from tests.launches import Launches
from tests.no_sync import HostSync, no_sync

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, x),
    "matmul": lambda x: x @ x,
    "mm": lambda x: torch.mm(x, x),
    "conv2d": lambda x: F.conv2d(x.view(1, 1, 8, 8), x.view(1, 1, 8, 8)),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "softmax": lambda x: x.softmax(-1),
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(),
    "exp": lambda x: x.exp(),
    "pow": lambda x: x**2,
    "mul": lambda x: x * x,
    "float64": lambda x: x.double() @ x.double(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_casts_on_fake_cuda_are_those_of_torch(dtype: torch.dtype) -> None:
    def dtypes(x: Tensor) -> dict[str, torch.dtype]:
        return {name: operation(x).dtype for name, operation in OPERATIONS.items()}

    before = torch.get_autocast_dtype("cuda")
    with FakeTensorMode():  # without gradients torch itself casts fake CUDA tensors in any build
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            expected = dtypes(torch.empty(8, 8, device="cuda", dtype=dtype))
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", before)
    with fake_cuda(), torch.autocast("cuda", torch.bfloat16):
        assert dtypes(torch.empty(8, 8, device="cuda", dtype=dtype)) == expected
    assert not torch.is_autocast_enabled("cuda")


def test_a_step_on_fake_cuda_counts_what_a_gpu_would_launch() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 2, bias=False))
    with fake_cuda():
        to_fake_cuda(model)
        x = torch.empty(3, 4, device="cuda")
        with Launches() as forward, torch.autocast("cuda", torch.bfloat16):
            y = model(x)
        with Launches() as backward:
            y.float().sum().backward()
        assert (y.device.type, y.dtype) == ("cuda", torch.bfloat16)
        assert model[0].weight.grad is not None
        assert model[0].weight.grad.dtype == torch.float32
    assert forward.by_operation == {"addmm": 1, "mm": 1, "silu": 1, "_to_copy": 4}  # x, two weights, a bias
    assert backward.by_operation["mm"] == 3


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "a branch": lambda x: bool((x > 0).all()),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "masked assignment": lambda x: x.index_put_((x > 0,), x.flatten()),
    "bincount": lambda x: x.long().flatten().bincount(),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.flatten().repeat_interleave(torch.ones(16, dtype=torch.long, device=x.device)),
    "to the CPU": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
}
FREE: dict[str, Callable[[Tensor], object]] = {
    "products": lambda x: x @ x,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "a mask filled with one value": lambda x: x.masked_fill_(x > 0, 0.0),
    "asynchronous": lambda x: x.to("cpu", non_blocking=True),
    "new on the device": lambda x: x.new_full((3,), 2.0) + torch.arange(3, device=x.device),
}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", [*WAITS, *FREE])
def test_what_waits_for_the_gpu_is_found_and_nothing_else(name: str, device: str) -> None:
    def run(x: Tensor) -> None:
        with no_sync(device):
            (WAITS | FREE)[name](x)

    def check(x: Tensor) -> None:
        if name in FREE:
            run(x)
        else:
            with pytest.raises(HostSync):
                run(x)

    if device == "cpu":
        check(torch.randn(4, 4))
    else:
        with fake_cuda():
            check(torch.empty(4, 4, device="cuda"))


def test_a_copy_to_the_gpu_that_the_host_waits_for_is_found() -> None:
    with fake_cuda(), no_sync():
        torch.empty(3).to("cuda:0", non_blocking=True)
        with pytest.raises(HostSync, match="between cpu and cuda"):
            torch.empty(3).to("cuda:0")
        with pytest.raises(HostSync, match="between cpu and cuda"):
            torch.empty(3, device="cuda").copy_(torch.empty(3))


def test_waiting_in_a_backward_pass_is_found() -> None:
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return gradient * float(gradient.sum())

    with fake_cuda(), no_sync(), pytest.raises(HostSync):
        Waits.apply(torch.empty(3, device="cuda", requires_grad=True)).sum().backward()
