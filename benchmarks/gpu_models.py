"""What benchmarks/gpu_parts.py measures and with what: shapes, models, peers, clocks. No GPU is needed to import it."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.training import DeepSpeedConfig, TrainingConfig
from pipeline.config.transformer import TransformerConfig
from pipeline.core import distributed
from pipeline.core.objective import Objective
from pipeline.training.engines import build_engine
from pipeline.training.engines.base import Engine
from pipeline.training.flops import flops_of, matmul_flops_per_s
from pipeline.training.resource_plan import GPUS
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective

Row = tuple[str, str, str, str]  # what, figure, bar or what it stands beside, whether the bar holds
Run = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A transformer and the batch of a training step."""

    layers: int
    width: int
    heads: int
    batch: int


@dataclass(frozen=True)
class Scale:
    """The sizes of a run of this benchmark."""

    small: Shape
    large: Shape
    text: int
    side: int  # codes on each side of the image
    text_codes: int
    codes: int
    pixels: int  # on each side of the tokenizer's images
    images: int  # in a batch of them
    widths: tuple[int, ...]  # of the tokenizer
    sampled: tuple[int, int]  # batches of sampling
    rounds: int
    compile: bool

    @property
    def length(self) -> int:
        return self.text + self.side**2

    @property
    def layout(self) -> Layout:
        return Layout.of(self.text, self.text_codes, [(self.side, self.side, self.codes)])


FULL = Scale(
    small=Shape(12, 768, 12, 32), large=Shape(24, 2048, 16, 8), text=256, side=32, text_codes=16_384, codes=8192,
    pixels=256, images=32, widths=(128, 256, 512), sampled=(1, 64), rounds=5, compile=True,
)  # fmt: skip
TINY = Scale(
    small=Shape(2, 32, 2, 2), large=Shape(2, 64, 2, 2), text=4, side=4, text_codes=40, codes=16,
    pixels=16, images=2, widths=(16, 32), sampled=(1, 2), rounds=1, compile=False,
)  # fmt: skip


def card_name() -> str:
    """The GPU's name, or CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def wait() -> None:
    """For all that the device has been given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(run: Run, rounds: int, repeats: int = 5, warm_up: int = 3) -> float:
    """Median seconds of `run` over `rounds` of `repeats`, with the device idle before and after each round."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(rounds):
        wait()
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        wait()
        times.append((time.perf_counter() - started) / repeats)
    return statistics.median(times)


def peak_bytes() -> int | None:
    """The most that tensors have had on the GPU since `forget_peak`; None on a CPU, whose allocator does not count."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def gigabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e9:.2f} GB"


def peak_flops_per_s() -> float:
    """The card's rate of dense bf16 products as its data sheet has it; of an unknown card and a CPU, measured."""
    name = card_name().replace(" ", "").upper()
    known = [gpu for short, gpu in GPUS.items() if short.partition("-")[0].upper() in name]
    return known[0].tflops * 1e12 if known else matmul_flops_per_s("bf16-weights", distributed.device())


def bandwidth() -> float:
    """Bytes that the device reads and writes in a second: a copy of half a gigabyte (32 MB on a CPU)."""
    size = 2**29 if torch.cuda.is_available() else 2**25
    source = torch.ones(size, dtype=torch.uint8, device=distributed.device())
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), rounds=3)


# --- training ----------------------------------------------------------------------------------------------------


def training(batch: int, **changes: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {"steps": 1000, "batch_size": batch, "warmup_steps": 0, "precision": "bf16"} | changes
    )


def transformer_config(shape: Shape) -> TransformerConfig:
    """Llama's block: RMSNorm, SwiGLU, rotary positions, full attention."""
    values = {"layers": shape.layers, "width": shape.width, "heads": shape.heads, "style": "modern", "qk_norm": False}
    return TransformerConfig.model_validate(values | {"training": {"steps": 1000, "batch_size": shape.batch}})


def objective_of(scale: Scale, shape: Shape) -> JointObjective:
    config = transformer_config(shape)
    torch.manual_seed(0)
    return JointObjective(Transformer(scale.layout, config), config).train()


def batch_of(scale: Scale, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, scale.text_codes, (size, scale.text), generator=generator)
    codes = torch.randint(0, scale.codes, (size, scale.side**2), generator=generator)
    return {"text": text, "codes": codes}


class LlamaObjective(Objective):
    """`transformers`' LlamaForCausalLM with its own loss: text and codes in one vocabulary."""

    def __init__(self, scale: Scale, shape: Shape) -> None:
        super().__init__()
        self.model, self.text_codes = llama(scale, shape).train(), scale.text_codes

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        ids = torch.cat([batch["text"], batch["codes"] + self.text_codes], dim=1)
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss, {}

    def blocks(self) -> list[nn.Module]:
        return list(self.model.model.layers)


def llama(scale: Scale, shape: Shape) -> Any:
    """A Llama of the same width, layers, heads, MLP and vocabulary, with SDPA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=scale.text_codes + scale.codes, hidden_size=shape.width, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, intermediate_size=transformer_config(shape).hidden,
            max_position_embeddings=scale.length, attn_implementation="sdpa", bos_token_id=0, eos_token_id=None,
        )
    )  # fmt: skip


def engine_of(objective: Objective, config: TrainingConfig, zero_stage: int | None = None) -> Engine:
    """DeepSpeed's engine, which trains the transformer, on one process."""
    distributed.init(without_launcher=True)
    zero = DeepSpeedConfig(zero_stage=zero_stage)
    with tempfile.TemporaryDirectory() as folder:
        return build_engine("deepspeed", objective, config, zero, Path(folder))


def step_of(engine: Engine, batch: dict[str, Tensor]) -> Run:
    """A whole training step: forward, backward, clipping, optimizer."""
    on_device = {name: tensor.to(distributed.device()) for name, tensor in batch.items()}

    def step() -> None:
        engine.objective.train()
        engine.accumulate(on_device, 0, 1.0, True)
        engine.update(1.0)

    return step


def flops_of_a_step(objective: Objective, batch: dict[str, Tensor]) -> float:
    """Of the model's products, forward and twice as many backward; before an engine has the objective."""
    flops = flops_of(objective, batch, "bf16-autocast")
    assert flops is not None
    return 3.0 * flops


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
