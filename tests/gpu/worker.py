"""Run by tests/gpu/test_gpu.py on the device that it sees: what trainings of small models on it do, as JSON."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.config.training import DeepSpeedConfig, TrainingConfig
from pipeline.config.transformer import TransformerConfig
from pipeline.core import distributed
from pipeline.core.objective import Objective
from pipeline.image_tokenizer.base import build
from pipeline.training.engines import build_engine
from pipeline.training.engines.base import Engine
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective
from tests.no_sync import _Operations as Operations

STEPS, BATCH = 6, 4
LAYOUT = Layout.of(8, 40, [(4, 4, 16)])
TOKENIZER = {"kind": "vqvae", "patch_size": 2, "widths": (16, 32), "blocks": 1, "stem_kernel": 1}


def transformer(style: str = "classic") -> JointObjective:
    """Three layers: row, column and convolution in the classic style."""
    config = TransformerConfig.model_validate(
        {"style": style, "layers": 3, "width": 64, "heads": 2, "conv_kernel": 3, "caption_dropout": 0.0}
        | {"training": {"steps": STEPS, "batch_size": BATCH, "warmup_steps": 0}}
    )
    torch.manual_seed(0)
    return JointObjective(Transformer(LAYOUT, config), config)


def batch(step: int) -> dict[str, Tensor]:
    """Two batches in turn, so that a loss can fall."""
    generator = torch.Generator().manual_seed(step % 2)
    text = torch.randint(1, 40, (BATCH, 8), generator=generator)
    codes = torch.randint(0, 16, (BATCH, 16), generator=generator)
    return {name: tensor.to(distributed.device()) for name, tensor in (("text", text), ("codes", codes))}


def engine_of(
    objective: Objective, kind: Literal["accelerate", "deepspeed"], precision: str, zero: int | None, **changes: Any
) -> Engine:
    values = {"steps": STEPS, "batch_size": BATCH, "warmup_steps": 0, "learning_rate": 1e-2, "precision": precision}
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingConfig.model_validate(values | changes)
        return build_engine(kind, objective, training, DeepSpeedConfig(zero_stage=zero), Path(folder))


def step(engine: Engine, number: int, data: dict[str, Tensor]) -> Tensor:
    engine.objective.train()
    loss = engine.accumulate(data, number, 1.0, True)["loss"]
    engine.objective.after_update(engine.update(1.0).applied)
    return loss


def losses(precision: str, zero: int | None, **changes: Any) -> dict[str, Any]:
    """The losses of a short training, and the dtypes that it computes in."""
    objective = transformer()
    engine = engine_of(objective, "deepspeed", precision, zero, **changes)
    found: dict[str, str] = {}
    for name, module in _places(objective.transformer):
        module.register_forward_hook(_note(found, name))
    values = [float(step(engine, number, batch(number))) for number in range(STEPS)]
    weights = {str(parameter.dtype) for parameter in objective.transformer.blocks.parameters()}
    masters = {str(tensor.dtype) for tensor in engine.local_parameters().values()}
    device = {parameter.device.type for parameter in objective.parameters()}
    dtypes = {name: dtype.removeprefix("torch.") for name, dtype in found.items()}
    return {"losses": values, "dtypes": dtypes, "weights": [*weights], "masters": [*masters], "device": [*device]}


def _places(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    yield "residual stream", model.blocks[-1]
    yield "normed", model.blocks[0].get_submodule("attention_norm")
    yield "queries, keys and values", model.blocks[0].get_submodule("attention.qkv")
    yield "hidden states", model.norm


def _note(found: dict[str, str], name: str) -> Any:
    def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        found[name] = str(output.dtype)

    return hook


def waits(kind: Literal["accelerate", "deepspeed"], precision: str, zero: int | None) -> str:
    """ "" if training steps never make the host wait for the device, else where they do."""
    objective: Objective = transformer() if kind == "deepspeed" else build(TOKENIZER, image_size=16).objective()
    images = torch.zeros(BATCH, 3, 16, 16, dtype=torch.uint8, device=distributed.device())
    engine = engine_of(objective, kind, precision, zero)

    def run(number: int) -> None:
        step(engine, number, data if kind == "deepspeed" else {"images": images})

    data = batch(0)
    for number in range(3):  # optimizers, tables and codebooks are set up in the first ones
        run(number)
    try:
        with _no_waiting():
            for number in range(3, 6):
                run(number)
    except (RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@contextmanager
def _no_waiting() -> Iterator[None]:
    """On a GPU torch's own check, on a CPU ours of the same operations (without what it knows by the name "cpu")."""
    if not torch.cuda.is_available():
        with Operations("cpu"):
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def main(cases: str, output: str) -> None:
    distributed.init(without_launcher=True)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    found: list[Any] = []
    for what, arguments in json.loads(cases):
        found.append({"losses": losses, "waits": waits}[what](**arguments))
    Path(output).write_text(json.dumps(found))
    distributed.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
