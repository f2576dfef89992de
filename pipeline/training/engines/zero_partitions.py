"""Where each ZeRO stage keeps a parameter's float32 weights and optimizer states.

DeepSpeed's optimizers work on flat tensors: 0 on each parameter itself; 1 and 2 on this process's slice of all
parameters of a group laid end to end; 3 on this process's slice of each parameter, those of a sub-group end to end.
A `Partition` is one such tensor and what lies where in it, in the names and offsets of the model. That is all that a
checkpoint needs to be independent of the stage and of the number of processes. (deepspeed.utils.safe_get_full_*
would gather full tensors, and know no state before the first step and none of Muon's.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any  # DeepSpeed has no types

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
class Partition:
    """One tensor of the optimizer on this process."""

    weights: Tensor  # float32, the key of its states in the optimizer
    spans: list[Span]
    own_spans: dict[str, list[Span]] = field(default_factory=dict)  # of states that lie otherwise than the weights
    written: bool = True  # False: another process writes it, all have the same

    def spans_of(self, state: str) -> list[Span]:
        """What lies where in the optimizer's state of that name."""
        return self.own_spans.get(state, self.spans)


def partitions(optimizer: Any, stage: int, module: nn.Module) -> list[Partition]:
    """The tensors of DeepSpeed's `optimizer` on this process, at ZeRO `stage`."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    if stage == 0:
        ranks, rank = distributed.world_size(), distributed.rank()
        return [
            Partition(parameter, [Span(name, 0, 0, parameter.numel())], written=i % ranks == rank)
            for i, (parameter, name) in enumerate(names.items())
            if parameter.requires_grad
        ]
    return _partitions_of_stage_3(optimizer, names) if stage == 3 else _partitions_of_stages_1_and_2(optimizer, names)


def _partitions_of_stages_1_and_2(optimizer: Any, names: dict[nn.Parameter, str]) -> list[Partition]:
    found = []
    for group, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        spans = []
        for parameter in optimizer.bit16_groups[group]:
            mapping = parameter._hp_mapping  # None: nothing of it is in this process's slice
            if mapping is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                spans.append(Span(names[parameter], there.start, here.start, here.numel))
        # Muon needs full matrices: its momentum has those that the slice touches, end to end.
        full, offset = [], 0
        for parameter in optimizer.params_in_partition[group]:
            full.append(Span(names[parameter], 0, offset, parameter.numel()))
            offset += parameter.numel()
        found.append(Partition(flat, spans, {"momentum_buffer": full}))
    return found


def _partitions_of_stage_3(optimizer: Any, names: dict[nn.Parameter, str]) -> list[Partition]:
    found = []
    for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        spans = []
        for parameter in optimizer.fp16_groups[group]:
            _, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, length = shard_of(parameter.ds_numel, length)
            if length > 0:
                spans.append(Span(names[parameter], start, offset, length))
        found.append(Partition(flat, spans))
    return found


def shard_of(numel: int, shard: int) -> tuple[int, int]:
    """First element and length of this process's shard of a ZeRO-3 parameter of `numel` elements.

    `shard` is its length with the padding that the last processes have.
    """
    start = distributed.rank() * shard
    return start, max(0, min(shard, numel - start))


def local_shards(partition: Partition, states: dict[str, object]) -> Iterator[TensorShard]:
    """The shards of a partition's weights and of its optimizer states."""
    yield from _shards(_WEIGHT, partition.weights, partition.spans)
    for state, value in states.items():
        if isinstance(value, Tensor) and value.ndim > 0:
            yield from _shards(f"state.{state}", value, partition.spans_of(state))
        else:  # AdamW's count of steps: written by the process with a parameter's first element
            scalar = torch.as_tensor(value, dtype=torch.float32).reshape(1)
            for span in partition.spans:
                if span.start == 0:
                    yield TensorShard(f"scalar.{state}:{span.name}", 0, scalar.clone())


def _shards(kind: str, values: Tensor, spans: list[Span]) -> Iterator[TensorShard]:
    flat = values.detach().flatten()
    for span in spans:
        yield TensorShard(f"{kind}:{span.name}", span.start, flat[span.offset : span.offset + span.length])


def read_shards(partition: Partition, states: dict[str, object], saved: ShardedState) -> None:
    """Read a partition's weights and its optimizer states, which need not exist yet, from a checkpoint.

    Raises:
        UserError: the checkpoint lacks some of them.
    """
    if not partition.spans:  # nothing but padding
        return
    flat = partition.weights.detach().view(-1)
    _read(_WEIGHT, flat, partition.spans, saved)
    first = partition.spans[0].name
    for kind, state in _recorded(saved, first):
        if kind == "scalar":
            scalar = flat.new_zeros(1)
            saved.read_into(f"scalar.{state}:{first}", 0, scalar)
            states[state] = scalar[0]
            continue
        spans = partition.spans_of(state)
        size = flat.numel() if spans is partition.spans else sum(span.length for span in spans)
        before = states.get(state)
        if isinstance(before, Tensor) and before.numel() == size:  # no second one
            values = before.view(-1).zero_()
        else:
            values = flat.new_zeros(size, dtype=before.dtype if isinstance(before, Tensor) else flat.dtype)
        _read(f"state.{state}", values, spans, saved)
        states[state] = values if spans is not partition.spans else values.view_as(partition.weights)


def _read(kind: str, flat: Tensor, spans: list[Span], saved: ShardedState) -> None:
    for span in spans:
        saved.read_into(f"{kind}:{span.name}", span.start, flat[span.offset : span.offset + span.length])


def _recorded(saved: ShardedState, name: str) -> list[tuple[str, str]]:
    """(`state` or `scalar`, the optimizer's name for it) of everything recorded for a parameter but its weights."""
    kinds = [recorded.removesuffix(f":{name}") for recorded in saved.names if recorded.endswith(f":{name}")]
    return [(kind.partition(".")[0], kind.partition(".")[2]) for kind in kinds if kind != _WEIGHT]
