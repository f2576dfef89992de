"""Where each ZeRO stage keeps a parameter's float32 weights and optimizer states.

DeepSpeed's optimizers work on flat tensors: 0 on each parameter itself; 1 and 2 on this process's slice of all
parameters of a group laid end to end; 3 on this process's slice of each parameter, of a sub-group's end to end.
A `Part` is one such tensor with what lies where in it, in the names and offsets of the model. That is all that a
checkpoint needs to be independent of the stage and of the number of processes. (deepspeed.utils.safe_get_full_*
would gather whole tensors, and know no state before the first step and none of Muon's.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core import distributed
from pipeline.training.sharded_state import ShardedState, TensorShard

_WEIGHT = "weight"


@dataclass(frozen=True)
class Span:
    """`length` elements of parameter `name`, from its element `start` on, that lie at `offset` of a flat tensor."""

    name: str
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class Part:
    """One tensor of the optimizer on this process."""

    weights: Tensor  # float32, the key of its states in the optimizer
    spans: list[Span]
    own_spans: dict[str, list[Span]] = field(default_factory=dict)  # of states that lie otherwise than the weights
    written: bool = True  # False: another process writes it, all hold the same

    def spans_of(self, state: str) -> list[Span]:
        return self.own_spans.get(state, self.spans)


def parts(optimizer: Any, stage: int, module: nn.Module) -> list[Part]:
    """The parts of DeepSpeed's `optimizer` on this process."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    if stage == 0:
        ranks, rank = distributed.world_size(), distributed.rank()
        return [
            Part(parameter, [Span(name, 0, 0, parameter.numel())], written=i % ranks == rank)
            for i, (parameter, name) in enumerate(names.items())
            if parameter.requires_grad
        ]
    return _parts_of_stage_3(optimizer, names) if stage == 3 else _parts_of_stages_1_and_2(optimizer, names)


def _parts_of_stages_1_and_2(optimizer: Any, names: dict[nn.Parameter, str]) -> list[Part]:
    found = []
    for group, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        spans = []
        for parameter in optimizer.bit16_groups[group]:
            mapping = parameter._hp_mapping  # None: nothing of it is in this process's slice
            if mapping is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                spans.append(Span(names[parameter], there.start, here.start, here.numel))
        # Muon needs whole matrices: its momentum holds those that the slice touches, end to end.
        whole, offset = [], 0
        for parameter in optimizer.params_in_partition[group]:
            whole.append(Span(names[parameter], 0, offset, parameter.numel()))
            offset += parameter.numel()
        found.append(Part(flat, spans, {"momentum_buffer": whole}))
    return found


def _parts_of_stage_3(optimizer: Any, names: dict[nn.Parameter, str]) -> list[Part]:
    found = []
    for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        spans = []
        for parameter in optimizer.fp16_groups[group]:
            _, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, length = shard_of(parameter.ds_numel, length)
            if length > 0:
                spans.append(Span(names[parameter], start, offset, length))
        found.append(Part(flat, spans))
    return found


def shard_of(numel: int, shard: int) -> tuple[int, int]:
    """First element and length of this process's `shard` of a ZeRO-3 parameter; the last ones are padded."""
    start = distributed.rank() * shard
    return start, max(0, min(shard, numel - start))


def local_shards(part: Part, states: dict[str, Any]) -> Iterator[TensorShard]:
    """The pieces of a part and its optimizer states."""
    yield from _pieces(_WEIGHT, part.weights, part.spans)
    for state, value in states.items():
        if isinstance(value, Tensor) and value.ndim > 0:
            yield from _pieces(f"state.{state}", value, part.spans_of(state))
        else:  # AdamW's count of steps: told by whoever holds a parameter's first element
            scalar = torch.as_tensor(value, dtype=torch.float32).reshape(1)
            yield from (
                TensorShard(f"scalar.{state}:{span.name}", 0, scalar.clone()) for span in part.spans if not span.start
            )


def _pieces(kind: str, values: Tensor, spans: list[Span]) -> Iterator[TensorShard]:
    flat = values.detach().flatten()
    for span in spans:
        yield TensorShard(f"{kind}:{span.name}", span.start, flat[span.offset : span.offset + span.length])


def fill(part: Part, states: dict[str, Any], pieces: ShardedState) -> None:
    """Read a part and its optimizer states, which need not exist yet, from a checkpoint."""
    if not part.spans:  # nothing but padding
        return
    flat = part.weights.detach().view(-1)
    _fill(_WEIGHT, flat, part.spans, pieces)
    first = part.spans[0].name
    for kind, state in _recorded(pieces, first):
        if kind == "scalar":
            scalar = flat.new_zeros(1)
            pieces.fill(f"scalar.{state}:{first}", 0, scalar)
            states[state] = scalar[0]
            continue
        spans = part.spans_of(state)
        size = flat.numel() if spans is part.spans else sum(span.length for span in spans)
        values = flat.new_zeros(size, dtype=getattr(states.get(state), "dtype", flat.dtype))
        _fill(f"state.{state}", values, spans, pieces)
        states[state] = values if spans is not part.spans else values.view_as(part.weights)


def _fill(kind: str, flat: Tensor, spans: list[Span], pieces: ShardedState) -> None:
    for span in spans:
        pieces.fill(f"{kind}:{span.name}", span.start, flat[span.offset : span.offset + span.length])


def _recorded(pieces: ShardedState, name: str) -> list[tuple[str, str]]:
    """(`state` or `scalar`, the optimizer's name for it) of everything recorded for a parameter but its weights."""
    kinds = [recorded.removesuffix(f":{name}") for recorded in pieces.names if recorded.endswith(f":{name}")]
    return [(kind.partition(".")[0], kind.partition(".")[2]) for kind in kinds if kind != _WEIGHT]
