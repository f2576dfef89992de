"""`torch.cuda.graph` on the CPU: what runs inside is written down and undone; `replay` runs it with the same tensors.

As on CUDA, a replay reads and writes the memory that was there at the capture and knows no Python: a number that was
read from an argument, a branch that was taken, a tensor that was made outside stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.sampling import cuda_graph, draw_next

Operation = tuple[Any, tuple[object, ...], dict[str, object], list[Tensor]]


class GraphOnCpu:
    """Stands for `torch.cuda.CUDAGraph`. All graphs of a test are in `made`."""

    made: list[GraphOnCpu] = []

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.replays = 0
        GraphOnCpu.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, outputs in self.operations:
            results = func(*args, **kwargs)
            for output, result in zip(outputs, _tensors(results) if outputs else [], strict=True):
                output.copy_(result)


class _Capture(TorchDispatchMode):
    def __init__(self, graph: GraphOnCpu) -> None:
        super().__init__()
        self.graph = graph
        self.before: list[tuple[Tensor, Tensor]] = []  # what is written to, and what it held

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        writes = func._schema.is_mutable
        if writes:
            self.before += [(tensor, tensor.clone()) for tensor in inputs[:1]]
        result = func(*args, **kwargs)
        memory = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        new = [tensor for tensor in _tensors(result) if tensor.untyped_storage().data_ptr() not in memory]
        if writes or new:  # else a view, which is there at every replay
            self.graph.operations.append((func, args, kwargs, [] if writes else new))
        return result


@contextmanager
def _capture(graph: GraphOnCpu, **_: object) -> Iterator[None]:
    mode = _Capture(graph)
    with mode:
        yield
    for tensor, held in reversed(mode.before):
        tensor.copy_(held)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def graphs_on_cpu(capture: Callable[..., object] = _capture) -> Iterator[list[GraphOnCpu]]:
    """Inside, the decode loop captures and replays as it does on CUDA. `capture` stands for `torch.cuda.graph`."""
    GraphOnCpu.made = []
    with ExitStack() as stack:
        for name, stand_in in {
            "CUDAGraph": GraphOnCpu,
            "graph": capture,
            "graph_pool_handle": object,
            "stream": nullcontext,
            "current_stream": object,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(draw_next, "Replayed", _as_on_cuda))
        yield GraphOnCpu.made


def _as_on_cuda(_device: torch.device) -> cuda_graph.Replayed:
    return cuda_graph.Replayed(torch.device("cuda"))
