"""The bars of sampling, as a table: image tokens per second beside other systems, in one run on this machine.

    python -m benchmarks.sampling            # 6 layers, width 256, 4 heads, 32 text + 256 image tokens, 8,192 codes
    python -m benchmarks.sampling --no-peers # ours alone
    python -m benchmarks.sampling --no-peers --compile   # and at batch 1 through torch.compile
    python -m benchmarks.sampling --device cuda          # on a GPU: no bars, and without dalle-pytorch

Peers: `dalle-pytorch` 1.6.6 `generate_images` with its cache on, and `transformers` `generate()` on a Llama of the same
shape (its dynamic cache, multinomial sampling), in float32 and bf16. All weights are random, and the work is the same:
all codes of each image, each drawn from all logits, and no pixels. Each system draws once before it is measured, and
has as many turns as the others; 8 images of dalle-pytorch take a minute and more. See benchmarks/peers.py.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from types import ModuleType

import click
import torch
from torch import Tensor

from benchmarks.peers import dalle_pytorch
from pipeline.config.generate import SamplingConfig
from pipeline.config.transformer import TransformerShape
from pipeline.sampling.decode import StepKind, candidate_uniforms, draw_codes
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer

LAYERS, WIDTH, HEADS, TEXT, SIDE, TEXT_CODES, CODES = 6, 256, 4, 32, 16, 2048, 8192
IMAGE = SIDE * SIDE
_TURN_S = 2.0
Work = Callable[[], object]
BARS = {"dalle-pytorch": {1: 20, 8: 25}, "transformers": {1: 3, 8: 2}}


@click.command()
@click.option("--threads", default=2, show_default=True)
@click.option("--repeats", default=5, show_default=True, help="turns; the median counts")
@click.option("--peers/--no-peers", default=True, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="at batch 1 also through torch.compile, which takes minutes")
@click.option("--device", default="cpu", show_default=True)
def main(threads: int, repeats: int, peers: bool, compiled: bool, device: str) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = _model().to(device)
    half = deepcopy(model).bfloat16()
    others = _peers(device) if peers else {}
    print(f"{threads} threads; {LAYERS} layers, width {WIDTH}, {HEADS} heads, {TEXT}+{IMAGE} tokens, {CODES} codes")
    for batch in (1, 8):
        work: dict[str, Work] = {
            "smalti fp32": partial(_ours, model, batch),
            "smalti guided": partial(_ours, model, batch, guidance=3.0),
            "smalti bf16": partial(_ours, half, batch),
            "smalti reference step": partial(_ours, model, batch, step="model"),
            "smalti static step": partial(_ours, model, batch, step="static"),
            **{name: partial(generate, batch) for name, generate in others.items()},
        }
        if compiled and batch == 1:
            work["smalti compiled"] = partial(_ours, model, batch, compiled=True)
            started = time.perf_counter()
            work["smalti compiled"]()
            print(f"the first image through torch.compile: {time.perf_counter() - started:.1f} s")
        seconds = _medians(work, repeats)
        _print_rates(seconds, batch)
        first, last = _quarters(model, batch, repeats)
        _row(f"smalti last quarter, batch {batch}", batch / last, _bar(last / first, 1.3), last <= 1.3 * first)


def _print_rates(seconds: dict[str, float], batch: int) -> None:
    ours = seconds["smalti fp32"]
    for name, own in seconds.items():
        against, holds = "", None
        if name in BARS:
            against, holds = f"smalti {own / ours:.1f} x (bar {BARS[name][batch]})", own / ours >= BARS[name][batch]
        elif name == "smalti guided":
            against, holds = _bar(own / ours, 1.9), own <= 1.9 * ours
        elif name == "transformers bf16":
            against = f"smalti bf16 {own / seconds['smalti bf16']:.1f} x"
        elif name in ("smalti reference step", "smalti static step"):
            against = f"smalti {own / ours:.1f} x"
        _row(f"{name}, batch {batch}", batch * IMAGE / own, against, holds)


def _model() -> Transformer:
    layout = Layout.of(TEXT, TEXT_CODES, [(SIDE, SIDE, CODES)])
    model = Transformer(layout, TransformerShape(layers=LAYERS, width=WIDTH, heads=HEADS))
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model.eval()


def _ours(
    model: Transformer,
    batch: int,
    on_code: Callable[[int, Tensor], object] | None = None,
    compiled: bool = False,
    guidance: float = 1.0,
    step: StepKind | None = None,
) -> Tensor:
    device = model.head.weight.device
    text = torch.randint(1, TEXT_CODES, (batch, TEXT), generator=torch.Generator().manual_seed(0)).to(device)
    uniforms = torch.stack([candidate_uniforms(0, i, 0, IMAGE) for i in range(batch)]).to(device)
    rows, sampling = torch.arange(batch, device=device), SamplingConfig(guidance=guidance)
    codes = draw_codes(model, text, rows, uniforms, sampling, on_code=on_code, compiled=compiled, step=step)
    return codes.cpu()  # waits for a GPU


def _quarters(model: Transformer, batch: int, repeats: int) -> tuple[float, float]:
    """Median seconds per code in the first and in the last quarter of the image."""
    first: list[float] = []
    last: list[float] = []
    for _ in range(repeats):
        times = _times(model, batch)
        first.append(statistics.median(_differences(times[: IMAGE // 4])))
        last.append(statistics.median(_differences(times[-IMAGE // 4 :])))
    return statistics.median(first), statistics.median(last)


def _times(model: Transformer, batch: int) -> list[float]:
    times: list[float] = []
    _ours(model, batch, on_code=lambda *_: times.append(time.perf_counter()))
    return times


def _differences(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def _peers(device: str) -> dict[str, Callable[[int], object]]:
    """The other systems: each draws the codes of a batch of the size that it is called with."""
    llamas = {"transformers": torch.float32, "transformers bf16": torch.bfloat16}
    found = {name: _llama(device, dtype) for name, dtype in llamas.items()}
    if device == "cpu" and (module := dalle_pytorch()) is not None:
        found["dalle-pytorch"] = _dalle(module)
    return found


def _dalle(module: ModuleType) -> Callable[[int], object]:
    """Without what the others do not do: it would sort half of the logits of each code, and make pixels at the end."""
    module.dalle_pytorch.top_k = lambda logits, thres: logits
    vae = module.DiscreteVAE(image_size=4 * SIDE, num_layers=2, num_tokens=CODES, codebook_dim=16, hidden_dim=8)
    dalle = module.DALLE(
        dim=WIDTH, vae=vae, num_text_tokens=TEXT_CODES, text_seq_len=TEXT, depth=LAYERS, heads=HEADS,
        dim_head=WIDTH // HEADS, attn_types=("full",),
    ).eval()  # fmt: skip
    vae.decode = lambda codes: codes

    def generate(batch: int) -> object:
        return dalle.generate_images(torch.randint(1, TEXT_CODES, (batch, TEXT)), use_cache=True)

    return generate


def _llama(device: str, dtype: torch.dtype) -> Callable[[int], object]:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = TransformerShape(layers=LAYERS, width=WIDTH, heads=HEADS).hidden
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TEXT_CODES + CODES, hidden_size=WIDTH, intermediate_size=hidden, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, max_position_embeddings=TEXT + IMAGE, bos_token_id=0, eos_token_id=None,
        )
    ).eval().to(device, dtype)  # fmt: skip

    @torch.inference_mode()
    def generate(batch: int) -> object:
        text = torch.randint(1, TEXT_CODES, (batch, TEXT), device=device)
        mask = torch.ones_like(text)
        return llama.generate(
            text, attention_mask=mask, max_new_tokens=IMAGE, do_sample=True, top_k=0, pad_token_id=0
        ).cpu()

    return generate


def _medians(work: dict[str, Work], repeats: int) -> dict[str, float]:
    """Median seconds of each, in turns, so that a slow minute of the machine is everybody's.

    Each works once unmeasured, and in its turns for `_TURN_S` or longer, so that no median hangs on a few short runs.
    """
    for run in work.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, run in work.items():
            turn_started = time.perf_counter()
            while time.perf_counter() - turn_started < _TURN_S:
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _bar(value: float, limit: float) -> str:
    return f"{value:.2f} x (bar {limit})"


def _row(name: str, rate: float, against: str = "", holds: bool | None = None) -> None:
    verdict = "" if holds is None else ("holds" if holds else "MISSED")
    print(f"{name:32} {rate:8.1f} tokens/s  {against:28} {verdict}", flush=True)


if __name__ == "__main__":
    main()
