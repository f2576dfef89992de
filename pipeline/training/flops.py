"""FLOPs and activations of a training step, counted on fake tensors, which have shapes and no data.

`smalti plan` and the training loop's MFU use it; the count follows the code, whatever the model.
"""

from __future__ import annotations

import copy
import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from pipeline.config.training import Precision
from pipeline.core.objective import Objective

log = logging.getLogger(__name__)

_DTYPES = {
    "bf16": torch.bfloat16,
    "bf16-autocast": torch.bfloat16,
    "bf16-weights": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of one forward pass on a micro-batch."""

    flops: int  # of matrix products and convolutions, attention in full; a training step has three times as many
    saved_bytes: int  # kept for the backward pass
    scores_bytes: int  # of them: attention scores, which fused kernels on GPUs do not keep
    block_bytes: int  # of them: the largest block's
    all_blocks_bytes: int  # of them: all blocks'
    blocks: int
    after_blocks_bytes: int  # of them: the loss's, which are freed before a block has its gradients
    between_blocks_bytes: int  # the inputs of all blocks: what activation checkpointing keeps
    output_bytes: int  # the largest tensor up to the last block: its gradient lives at the start of the backward pass


def cost_of(objective: Objective, batch: dict[str, Tensor], precision: Precision) -> Cost | None:
    """The cost of an objective with real parameters; None, with a line in the log, if it cannot run without data."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    inputs: dict[str, Tensor] = {name: fake.from_tensor(tensor) for name, tensor in batch.items()}
    # A copy of all but the weights, because a forward pass in training may change running statistics.
    known: dict[int, Tensor] = {}
    for tensor in (*objective.parameters(), *objective.buffers()):
        known[id(tensor)] = fake.from_tensor(tensor)
    try:
        shell = copy.deepcopy(objective, known)
        with fake:
            return measure(shell, inputs, precision)
    except Exception as error:  # a metric less is no reason to end a training
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        log.info("no FLOPs utilisation for %s, which does not run without data (%s)", type(objective).__name__, reason)
        return None


def measure(objective: Objective, batch: dict[str, Tensor], precision: Precision) -> Cost:
    """The cost on the CPU's code path. `batch` and the objective's parameters may be real or fake."""
    parameters = {parameter.untyped_storage()._cdata for parameter in objective.parameters()}
    saved: dict[int, Tensor] = {}
    sizes: list[int] = []
    inputs: list[int] = []
    largest: list[int] = []
    handles: list[RemovableHandle] = []
    for block in objective.blocks():
        handles.append(block.register_forward_pre_hook(lambda _, args: inputs.append(_bytes(args[0]))))
        handles.append(block.register_forward_pre_hook(lambda *_: sizes.append(-_total(saved))))
        handles.append(block.register_forward_hook(lambda *_: sizes.append(_total(saved))))
        handles.append(
            block.register_forward_hook(lambda *_: largest.append(max(map(_bytes, saved.values()), default=0)))
        )

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in parameters:
            saved[storage] = tensor
        return tensor

    autocast = nullcontext() if precision == "fp32" else torch.autocast("cpu", _DTYPES[precision])
    counter = FlopCounterMode(display=False)
    try:
        with autocast, counter, saved_tensors_hooks(keep, lambda tensor: tensor):
            objective(batch, 0)
    finally:
        for handle in handles:
            handle.remove()
    blocks = [end + start for start, end in zip(sizes[::2], sizes[1::2], strict=True)]
    tensors = list(saved.values())
    return Cost(
        flops=counter.get_total_flops(),
        saved_bytes=_total(saved),
        scores_bytes=sum(_bytes(t) for t in tensors if t.ndim >= 3 and t.shape[-1] == t.shape[-2] > 1),
        block_bytes=max(blocks, default=0),
        all_blocks_bytes=sum(blocks),
        blocks=len(blocks),
        after_blocks_bytes=_total(saved) - sizes[-1] if sizes else 0,
        between_blocks_bytes=sum(inputs),
        output_bytes=max(largest or map(_bytes, tensors), default=0),
    )


def _total(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def matmul_flops_per_s(precision: Precision, device: torch.device, seconds: float = 0.2) -> float:
    """The rate of one device on a square matrix product in the training's precision, the best within `seconds`."""
    size = 4096 if device.type == "cuda" else 768
    left = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(_DTYPES.get(precision, torch.float32))
    product = left @ left  # the first one sets things up
    best, deadline = float("inf"), time.monotonic() + seconds
    while time.monotonic() < deadline:
        _wait_for(device)
        started = time.perf_counter()
        torch.matmul(left, left, out=product)
        _wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
