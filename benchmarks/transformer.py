"""The bars of training the transformer, as a table: a step beside other systems, in one run on this machine.

    python -m benchmarks.transformer             # 6 layers, width 256, 4 heads, 32 text + 256 image tokens, batch 8
    python -m benchmarks.transformer --no-peers  # ours alone

Peers: `dalle-pytorch` 1.6.6 (full attention), `transformers`' LlamaForCausalLM of the same shape. Every system takes a
whole step (forward, backward, AdamW) on the same numbers of tokens, in float32 and, where the CPU has it, under bf16
autocast, and its better one counts. They take turns; medians. `--patterns`: sparse attention on a CPU.
See benchmarks/peers.py.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.data import hollow_arrays
from benchmarks.peers import dalle_pytorch
from pipeline.config.transformer import TransformerConfig, TransformerShape
from pipeline.core.arithmetic import cpu_has_bf16
from pipeline.data.sampler import TokenSampler
from pipeline.training.engines import build_engine
from pipeline.training.flops import measure
from pipeline.training.optimizer import build_adamw
from pipeline.transformer.attention import attend
from pipeline.transformer.attention_patterns import Pattern
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective
from pipeline.transformer.tables import Tables

LAYERS, WIDTH, HEADS, TEXT, SIDE, BATCH = 6, 256, 4, 32, 16, 8
TEXT_CODES, IMAGE = 2048, SIDE * SIDE
TOKENS = BATCH * (TEXT + IMAGE)
Step = Callable[[], object]


def config_of(**shape: Any) -> TransformerConfig:
    training = {"steps": 1000, "batch_size": BATCH}
    return TransformerConfig.model_validate(
        {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "training": training, **shape}
    )


def batch_of(codes: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "text": torch.randint(1, TEXT_CODES, (BATCH, TEXT)),
        "codes": torch.randint(0, codes, (BATCH, IMAGE)),
    }


def objective_of(codes: int, **shape: Any) -> JointObjective:
    config = config_of(**shape)
    return JointObjective(Transformer(Layout.of(TEXT, TEXT_CODES, [(SIDE, SIDE, codes)]), config), config).train()


def stepper(module: nn.Module, loss_of: Callable[[], Tensor], bf16: bool, optimizer: Any = None) -> Step:
    """Forward, backward, AdamW."""
    optimizer = optimizer or torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(codes: int, bf16: bool, **shape: Any) -> Step:
    objective, batch = objective_of(codes, **shape), batch_of(codes)
    optimizer = build_adamw(objective.parameter_groups(), objective.config.training)
    return stepper(objective, lambda: objective(batch, 0)[0], bf16, optimizer)


def engine_step(codes: int, folder: Path) -> Step:
    objective, batch = objective_of(codes), batch_of(codes)
    engine = build_engine("deepspeed", objective, objective.config.training, objective.config.deepspeed, folder)

    def step() -> None:
        engine.accumulate(batch, 0, 1.0, True)
        engine.update(1.0)

    return step


def dalle(codes: int, bf16: bool) -> Step | None:
    module = dalle_pytorch()
    if module is None:
        return None
    vae = module.DiscreteVAE(image_size=4 * SIDE, num_layers=2, num_tokens=codes, codebook_dim=16, hidden_dim=8)
    model = module.DALLE(
        dim=WIDTH, vae=vae, num_text_tokens=TEXT_CODES, text_seq_len=TEXT, depth=LAYERS, heads=HEADS,
        dim_head=WIDTH // HEADS, attn_types=("full",),
    ).train()  # fmt: skip
    batch = batch_of(codes)
    return stepper(model, lambda: model(batch["text"], batch["codes"], return_loss=True), bf16)


def llama(codes: int, bf16: bool, attention: str) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TEXT_CODES + codes, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=config_of().hidden, max_position_embeddings=TEXT + IMAGE, attn_implementation=attention,
        use_cache=False,
    )  # fmt: skip
    model, batch = LlamaForCausalLM(config).train(), batch_of(codes)
    ids = torch.cat([batch["text"], batch["codes"] + TEXT_CODES], dim=1)
    return stepper(model, lambda: model(input_ids=ids, labels=ids).loss, bf16)


def products(codes: int, dtype: torch.dtype) -> tuple[Step, float]:
    """The matrix products of a step at these shapes, one after the other, and their FLOPs.

    Those of weights forward, and backward to inputs and weights; attention's two, and their four backward. Into tensors
    that are there already: what new memory costs is the step's own affair.
    """
    hidden, rows, head = config_of().hidden, TOKENS, WIDTH // HEADS
    length = TEXT + IMAGE
    weights = [
        (rows, WIDTH, 3 * WIDTH),
        (rows, WIDTH, WIDTH),
        (rows, WIDTH, 2 * hidden),
        (rows, hidden, WIDTH),
    ] * LAYERS
    weights += [(BATCH * TEXT, WIDTH, TEXT_CODES), (BATCH * IMAGE, WIDTH, codes)]
    shapes: list[tuple[int, ...]] = [s for m, k, n in weights for s in ((m, k, n), (m, n, k), (k, m, n))]
    each = [(length, head, length), (length, length, head)] * 3
    shapes += [(BATCH * HEADS, *shape) for shape in each] * LAYERS
    made: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}
    for shape in set(shapes):
        left, right = torch.randn(*shape[:-1]).to(dtype), torch.randn(*shape[:-3], *shape[-2:]).to(dtype)
        made[shape] = left, right, left @ right

    def run() -> None:
        for shape in shapes:
            left, right, product = made[shape]
            torch.matmul(left, right, out=product)

    return run, float(sum(2 * torch.Size(shape).numel() for shape in shapes))


def medians(work: dict[str, Step], rounds: int, steps: int) -> dict[str, float]:
    """Median seconds of each, in turns, so that a slow minute of the machine is everybody's.

    The first step of each turn is not counted: it pays for caches and memory that the system before left behind.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            run()
            for _ in range(steps):
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def row(name: str, value: str, against: str = "", holds: bool | None = None) -> None:
    print(f"{name:44} {value:>20}  {against:42} {'' if holds is None else 'holds' if holds else 'MISSED'}", flush=True)


def table(codes: int, rounds: int, steps: int, peers: bool) -> None:
    styles: dict[str, dict[str, Any]] = {
        "smalti": {},
        "smalti modern": {"style": "modern"},
        "smalti modern, 2 kv heads": {"style": "modern", "kv_heads": 2},
        "smalti classic": {"style": "classic"},
    }
    kinds = {"bf16": True, "fp32": False} if cpu_has_bf16() else {"fp32": False}
    own = next(iter(kinds))  # as trainings are by default
    work = {f"{name}, {own}": ours(codes, kinds[own], **shape) for name, shape in styles.items()}
    work["smalti, fp32"] = ours(codes, False)
    flops = 3 * measure(objective_of(codes), batch_of(codes), "bf16")
    work["products"], product_flops = products(codes, torch.bfloat16 if kinds[own] else torch.float32)
    if peers:
        for kind, bf16 in kinds.items():
            if step := dalle(codes, bf16):
                work[f"dalle-pytorch, {kind}"] = step
            for attention in ("sdpa", "eager"):
                work[f"transformers {attention}, {kind}"] = llama(codes, bf16, attention)
    with tempfile.TemporaryDirectory() as folder:
        work["engine"] = engine_step(codes, Path(folder))
        seconds = medians(work, rounds, steps)
    print(
        f"{torch.get_num_threads()} threads; {LAYERS} layers, width {WIDTH}, {HEADS} heads, {TEXT}+{IMAGE} tokens, ",
        end="",
    )
    print(f"batch {BATCH}, {TEXT_CODES} + {codes} ids; {rounds} rounds of {steps} steps")
    for name, taken in seconds.items():
        if name != "products":
            row(name, f"{TOKENS / taken:,.0f} tokens/s")
    bare, modern = seconds[f"smalti, {own}"], seconds[f"smalti modern, {own}"]
    for peer, bar in (("dalle-pytorch", 1.5), ("transformers", 1.2)):
        best = min((taken for name, taken in seconds.items() if name.startswith(peer)), default=None)
        if best is not None:
            row(f"over the better of {peer}", f"{best / bare:.2f} x", f"bar {bar}", best >= bar * bare)
            row("    modern", f"{best / modern:.2f} x", f"bar {bar}", best >= bar * modern)
    rate, reached = product_flops / seconds["products"], flops / bare
    row("matrix products at these shapes", f"{rate / 1e9:,.0f} GFLOP/s")
    row("the step's", f"{reached / 1e9:,.0f} GFLOP/s", f"{reached / rate:.0%} of it (bar 60 %)", reached >= 0.6 * rate)
    cost = seconds["engine"] / bare - 1
    row("DeepSpeed's engine over the bare step", f"{cost:+.1%}", "bar 10 %", cost <= 0.1)


def start_up() -> None:
    """A new process up to its first step: imports, arrays mapped, engine."""
    with tempfile.TemporaryDirectory() as folder:
        arrays = hollow_arrays(Path(folder) / "arrays", 64, 10_000, TEXT, SIDE)
        started = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.transformer", "--first-step", str(arrays)]
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - started
    row("start-up to the first step", f"{seconds:.1f} s", "bar 12 s", seconds < 12)


def first_step(arrays: Path) -> None:
    batch = next(TokenSampler(arrays, "train", 0).batches(0, BATCH))
    objective = objective_of(1024)
    training, settings = objective.config.training, objective.config.deepspeed
    with tempfile.TemporaryDirectory() as folder:
        engine = build_engine("deepspeed", objective, training, settings, Path(folder))
        engine.accumulate(batch, 0, 1.0, True)
        engine.update(1.0)


def patterns(rounds: int) -> None:
    """Attention alone, forward: a dense mask and FlexAttention, which on CPUs has no backward."""
    tables = Tables(Layout.of(256, 16_384, [(32, 32, 8192)]), TransformerShape(heads=4), torch.device("cpu"))
    query, key, value = (torch.randn(2, 4, tables.layout.length, 64) for _ in range(3))
    compiled = torch.compile(attend, dynamic=False)
    kinds: list[Pattern] = ["full", "row", "column", "convolution"]
    with torch.no_grad():
        for pattern in kinds:
            work: dict[str, Step] = {
                "dense": partial(attend, query, key, value, 0.125, pattern, tables, "sdpa"),
                "flex": partial(compiled, query, key, value, 0.125, pattern, tables, "flex"),
            }
            seconds = medians(work, rounds, 5)
            against = f"FlexAttention, compiled: {seconds['flex'] * 1e3:.1f} ms"
            row(f"{pattern}, 1280 positions, batch 2", f"{seconds['dense'] * 1e3:.1f} ms", against)


@click.command()
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=4, show_default=True)
@click.option("--steps", default=3, show_default=True, help="of each system in a round")
@click.option("--codes", default=8192, show_default=True, help="the image's codebook")
@click.option("--peers/--no-peers", default=True, show_default=True)
@click.option("--patterns", "only_patterns", is_flag=True, help="attention patterns alone")
@click.option("--first-step", "arrays", type=click.Path(path_type=Path), hidden=True)
def main(
    threads: int, rounds: int, steps: int, codes: int, peers: bool, only_patterns: bool, arrays: Path | None
) -> None:
    torch.set_num_threads(threads)
    if arrays:
        first_step(arrays)
    elif only_patterns:
        patterns(rounds)
    else:
        start_up()  # first: the engine of the table leaves the variables of a launcher behind
        table(codes, rounds, steps, peers)


if __name__ == "__main__":
    main()
