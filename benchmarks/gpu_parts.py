"""The parts of benchmarks/gpu.py, each a function that gives rows of its table."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor.utils import run_fw_bw_and_get_code

from benchmarks.contestants import Contestant, DallePytorch, Ours, PlainVectorQuantize
from benchmarks.gpu_models import (
    FULL,
    TINY,
    LlamaObjective,
    Row,
    Run,
    Scale,
    bandwidth,
    batch_of,
    engine_of,
    flops_of_a_step,
    forget_peak,
    gigabytes,
    llama,
    objective_of,
    parameters_of,
    peak_bytes,
    peak_flops_per_s,
    seconds_of,
    step_of,
    training,
    transformer_config,
)
from pipeline.config.generate import SamplingConfig
from pipeline.config.pipeline import load_pipeline
from pipeline.config.transformer import TransformerShape
from pipeline.core import distributed
from pipeline.image_tokenizer.base import build
from pipeline.sampling.decode import candidate_uniforms, draw_codes
from pipeline.training.checkpoint_files import write_files
from pipeline.training.gpu_plan import memory
from pipeline.training.resource_plan import count
from pipeline.transformer.model import Transformer
from pipeline.transformer.tables import Tables
from tests.launches import Launches

ROOT = Path(__file__).resolve().parents[1]
# Calls in inductor's code: kernels that it made, and those of libraries and FlexAttention's templates.
_FUSED, _PRODUCTS = r"^\s+(?:cpp_\w+\(|triton_(?!tem)\w+\.run\()", r"extern_kernels\.\w+\(|triton_tem\w+\.run\("
_SAVED, _KILLED, _STEPS = 2, 3, 5  # of `resume`: optimizer updates


def row(what: str, figure: str, against: str = "", holds: bool | None = None) -> Row:
    """A row of the table; bars are for the real shapes on a GPU."""
    judged = holds is not None and torch.cuda.is_available()
    return what, figure, against, ("holds" if holds else "MISSED") if judged else ""


def train(scale: Scale, large: bool) -> list[Row]:
    """A training step of ours and of transformers' Llama on the same engine, compiled, in bf16."""
    shape = scale.large if large else scale.small
    objective, batch = objective_of(scale, shape), batch_of(scale, shape.batch)
    flops, millions = flops_of_a_step(objective, batch), parameters_of(objective) / 1e6
    own = seconds_of(step_of(engine_of(objective, training(shape.batch, compile=scale.compile)), batch), scale.rounds)
    llama_s = float(_child("llama", scale, "large" if large else "small"))
    tokens = shape.batch * scale.length
    mfu, gain = flops / own / peak_flops_per_s(), llama_s / own
    shown = f"training step, {millions:,.0f} M, batch {shape.batch} × {scale.length}"
    rate, peer = f"{tokens / own:,.0f} tokens/s", f"{tokens / llama_s:,.0f} tokens/s"
    bar, holds = ("bar 45 % on an H100", mfu >= 0.45) if large else ("", None)
    return [
        row(shown, rate),
        row("    model FLOPs utilization", f"{mfu:.1%}", bar, holds),
        row("    transformers' Llama", peer, f"ours {gain:.2f} × (bar 1.2)", gain >= 1.2),
    ]


def _llama_process(scale: Scale, which: str) -> str:
    """Seconds of its step; in a process of its own, because both models at once may not fit."""
    shape = scale.large if which == "large" else scale.small
    engine = engine_of(LlamaObjective(scale, shape), training(shape.batch, compile=scale.compile))
    return str(seconds_of(step_of(engine, batch_of(scale, shape.batch)), scale.rounds))


def _tokenizer(scale: Scale) -> dict[str, object]:
    quantizer = {"kind": "ema", "codebook_size": scale.codes, "code_width": 32}
    return {"kind": "vqvae", "patch_size": 2, "widths": scale.widths, "blocks": 2, "quantizer": quantizer}


def train_tokenizer(scale: Scale) -> list[Row]:
    """Training steps of tokenizers under bf16 autocast, all in one plain loop, none compiled."""
    layers = len(scale.widths)
    makers: dict[str, Callable[[], Contestant]] = {
        "ours": partial(Ours, _tokenizer(scale), scale.pixels),
        "dalle-pytorch DiscreteVAE": partial(DallePytorch, scale.pixels, scale.codes, layers, max(scale.widths) // 2),
        "vector-quantize-pytorch": PlainVectorQuantize,
    }
    rows: list[Row] = []
    for name, make in makers.items():
        try:
            contestant = make()
        except ModuleNotFoundError as error:
            rows.append(row(f"    {name}", "not installed", str(error)))
            continue
        size = f", {parameters_of(contestant.module) / 1e6:,.1f} M parameters"
        rate = scale.images / seconds_of(_tokenizer_step(contestant, scale), scale.rounds)
        shown = f"tokenizer's training step at {scale.pixels} px{size}" if name == "ours" else f"    {name}{size}"
        rows.append(row(shown, f"{rate:,.1f} images/s"))
    return rows


def _tokenizer_step(contestant: Contestant, scale: Scale) -> Run:
    device = distributed.device()
    contestant.module.to(device).train()
    optimizer = contestant.optimizer(training(scale.images))
    images = _images(scale).to(device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = contestant.loss(images, 0.5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        contestant.after_update(True)

    return step


def _images(scale: Scale) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (scale.images, 3, scale.pixels, scale.pixels), generator=generator).byte()


@torch.inference_mode()
def tokenize(scale: Scale) -> list[Row]:
    """Images from the host to codes on the host, beside the encoder alone on images that are on the device."""
    device = distributed.device()
    tokenizer = build(_tokenizer(scale), scale.pixels).to(device).eval()
    images = _images(scale)
    images = images.pin_memory() if torch.cuda.is_available() else images
    ready = images.to(device).float() / 255

    def whole() -> object:
        return [codes.cpu() for codes in tokenizer.encode(images.to(device, non_blocking=True).float() / 255)]

    encoder = tokenizer.get_submodule("encoder")
    own, bare = seconds_of(whole, scale.rounds), seconds_of(lambda: encoder(ready), scale.rounds)
    name = f"tokenize at {scale.pixels} px, without decoding files"
    against = f"{bare / own:.2f} × the bare encoder (bar 0.9)"
    return [row(name, f"{scale.images / own:,.1f} images/s", against, bare / own >= 0.9)]


def sample(scale: Scale, batch: int) -> list[Row]:
    """Codes drawn by the large model in bf16 (float32 on a CPU), and transformers' generate with its static cache."""
    device = distributed.device()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = Transformer(scale.layout, transformer_config(scale.large)).to(device, dtype).eval()
    torch.nn.init.normal_(model.head.weight, std=0.02)
    text = batch_of(scale, batch)["text"].to(device)
    uniforms = torch.stack([candidate_uniforms(0, i, 0, scale.side**2) for i in range(batch)]).to(device)
    rows = torch.arange(batch, device=device)
    own = seconds_of(partial(draw_codes, model, text, rows, uniforms, SamplingConfig()), scale.rounds, 1, 2)
    weights = parameters_of(model.blocks) + scale.codes * scale.large.width
    limit = bandwidth() / (weights * dtype.itemsize)  # steps/s
    peer = seconds_of(_generate(scale, text, dtype), scale.rounds, 1, 2)
    share, tokens = scale.side**2 / own / limit, batch * scale.side**2
    bar, holds = ("bar 50 %", share >= 0.5) if batch == 1 else ("", None)
    return [
        row(f"sampling, batch {batch}", f"{tokens / own:,.0f} tokens/s"),
        row("    of what reading the weights once a code allows", f"{share:.0%}", bar, holds),
        row("    transformers, static cache", f"{tokens / peer:,.0f} tokens/s", f"ours {peer / own:.2f} ×"),
    ]


def _generate(scale: Scale, text: Tensor, dtype: torch.dtype) -> Run:
    model, new = llama(scale, scale.large).to(text.device, dtype).eval(), scale.side**2

    @torch.inference_mode()
    def generate() -> object:
        return model.generate(
            text, attention_mask=torch.ones_like(text), max_new_tokens=new, min_new_tokens=new, do_sample=True,
            top_k=0, pad_token_id=0, cache_implementation="static",
        )  # fmt: skip

    return generate


def zero(scale: Scale, stage: int) -> list[Row]:
    """The small model's training step at one ZeRO stage; at 0, where weights cannot be bf16, under autocast."""
    precision = "bf16" if stage else "bf16-autocast"
    config = training(scale.small.batch, precision=precision, compile=scale.compile)
    batch = batch_of(scale, scale.small.batch)
    engine = engine_of(objective_of(scale, scale.small), config, stage)
    run = step_of(engine, batch)
    run()
    forget_peak()
    seconds = seconds_of(run, scale.rounds)
    rate = f"{scale.small.batch * scale.length / seconds:,.0f} tokens/s"
    return [row(f"ZeRO {stage} on one device, small model", rate, f"peak {gigabytes(peak_bytes())}")]


def plan(scale: Scale) -> list[Row]:
    """Peak memory of the small model's training beside what `smalti plan` says of it."""
    text = [f"text_tokenizer.vocab_size={max(scale.text_codes, 300)}", f"text_tokenizer.text_length={scale.text}"]
    image = [f"prepare.image_size={4 * scale.side}", f"image_tokenizer.model.codebook_size={scale.codes}"]
    shape = scale.small
    model = [
        f"transformer.{k}={v}" for k, v in (("layers", shape.layers), ("width", shape.width), ("heads", shape.heads))
    ]
    settings = [f"transformer.training.batch_size={shape.batch}", "transformer.training.precision=bf16"]
    config = load_pipeline(ROOT / "tests" / "configs" / "tiny.yaml", [*text, *image, *model, *settings])
    section = config.transformer
    stage = 1
    counted = replace(count(config, 1), image_tokenizer=0)  # which the stage has on the GPU, too, and this has not
    planned = memory(counted, section.training, section.deepspeed, stage, 1).step
    objective = objective_of(scale, shape)
    run = step_of(engine_of(objective, training(shape.batch), stage), batch_of(scale, shape.batch))
    forget_peak()
    for _ in range(3):
        run()
    found = peak_bytes()
    against = f"plan {gigabytes(int(planned))}" + (f", {planned / found:.2f} × (bar ± 5 %)" if found else "")
    holds = abs(planned / found - 1) <= 0.05 if found else None
    return [row("peak memory of the small model's training, ZeRO 1", gigabytes(found), against, holds)]


def resume(scale: Scale) -> list[Row]:
    """With `deterministic`, does a training that was killed after a checkpoint and resumed end with the same bits?"""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("undisturbed", "killed"):
            (Path(folder) / name).mkdir()
        whole = _child("resume", scale, f"{folder}/undisturbed", "whole")
        killed = _child("resume", scale, f"{folder}/killed", "killed")
        same = not killed and _child("resume", scale, f"{folder}/killed", "resumed") == whole
    return [row("killed and resumed, deterministic", "same bits" if same else "OTHER BITS", "bar: same bits", same)]


def _resume_process(scale: Scale, folder: str, how: str) -> str:
    """Trains on from the checkpoint, if there is one: SHA-256 of the weights."""
    objective, saved = objective_of(scale, scale.small), Path(folder)
    engine = engine_of(objective, training(scale.small.batch, deterministic=True), 1)
    first = 0
    if (saved / "engine.json").exists():
        engine.load(saved)
        first = _SAVED
    for step in range(first, _STEPS):
        if how == "killed" and step == _KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.manual_seed(step)
        step_of(engine, batch_of(scale, scale.small.batch))()
        if step + 1 == _SAVED:
            write_files(saved, engine.checkpoint_files())
    weights = b"".join(p.float().cpu().numpy().tobytes() for p in engine.local_parameters().values())
    return hashlib.sha256(weights).hexdigest()


def _child(what: str, scale: Scale, *arguments: str) -> str:
    """The last word that a process of `PROCESSES` prints; "" if it killed itself."""
    # cuBLAS reads it when it starts: without it, it has no deterministic products.
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-m", "benchmarks.gpu_parts", what, "tiny" if scale is TINY else "full", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout.split()[-1] if done.returncode == 0 else ""


def launches(scale: Scale) -> list[Row]:
    """Operations that a training step of one layer starts, forward and backward, as written and compiled."""
    rows, device = [], distributed.device()
    for style in ("modern", "classic"):
        model = Transformer(scale.layout, TransformerShape.model_validate({"style": style, "width": 64, "heads": 2}))
        block = model.to(device).train().blocks[1]  # in the classic style a column layer
        block.get_submodule("attention").make_tables(model.tables, torch.bfloat16)

        def forward(run: Callable[..., Tensor], tables: Tables) -> Tensor:
            x = torch.randn(2, scale.length, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
            with torch.autocast(device.type, torch.bfloat16):
                return run(x, tables)

        forward(block, model.tables).sum().backward()  # gradients are there
        model.zero_grad()
        with Launches() as written:
            forward(block, model.tables).sum().backward()
        compiled = torch.compile(block.forward, dynamic=False)
        _, code = run_fw_bw_and_get_code(partial(forward, compiled, model.tables))
        fused, products = (len(re.findall(calls, "".join(code), re.MULTILINE)) for calls in (_FUSED, _PRODUCTS))
        shown = f"{fused + products}: {products} products, {fused} fused"
        rows.append(
            row(f"operations of a {style} layer, forward and backward", str(written.total), f"compiled {shown}")
        )
    return rows


PARTS: dict[str, Callable[[Scale], list[Row]]] = {
    "launches": launches,
    "step-125m": partial(train, large=False),
    "step-1.3b": partial(train, large=True),
    "tokenizer": train_tokenizer,
    "tokenize": tokenize,
    "sample-1": lambda scale: sample(scale, scale.sampled[0]),
    "sample-64": lambda scale: sample(scale, scale.sampled[1]),
    **{f"zero-{stage}": partial(zero, stage=stage) for stage in range(4)},
    "resume": resume,
    "plan": plan,
}

PROCESSES: dict[str, Callable[..., str]] = {"llama": _llama_process, "resume": _resume_process}

if __name__ == "__main__":
    print(PROCESSES[sys.argv[1]]({"tiny": TINY, "full": FULL}[sys.argv[2]], *sys.argv[3:]))
    distributed.leave(0)
