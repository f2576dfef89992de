"""`kind: vit`: codes of patches that see the whole image, with any quantizer, through training and stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.config.image_tokenizer import ImageTokenizerConfig
from pipeline.core.errors import UserError
from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.training.activation_checkpointing import checkpoint_activations
from pipeline.training.optimizer import muon_matrices
from pipeline.training.tokenizer_plan import tokenizer_memory
from tests.conftest import NO_TRACKING
from tests.launch import launch

EMA = {"kind": "ema", "codebook_size": 32, "code_width": 8, "commitment_weight": 0.05}
MODEL = {"kind": "vit", "patch_size": 4, "width": 32, "layers": 2, "heads": 2, "quantizer": EMA}
QUANTIZERS: dict[str, dict[str, object]] = {
    "ema": EMA,
    "residual": EMA | {"depth": 2},
    "multiscale": {"kind": "multiscale", "scales": [1, 2, 4], "codebook": EMA},
    "lfq": {"kind": "lfq", "bits": 5},
    "gumbel": {"kind": "gumbel", "codebook_size": 32, "code_width": 8},
}


def built(image_size: int | tuple[int, int] = 16, **changes: object) -> ImageTokenizer:
    """With weights of a training: new blocks change nothing."""
    torch.manual_seed(0)
    tokenizer = build(MODEL | changes, image_size).eval()
    for name, parameter in tokenizer.named_parameters():
        if "blocks" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return tokenizer


def pixels(count: int, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randint(256, (count, 3, height, width), generator=torch.Generator().manual_seed(1)).byte()


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_codes_of_any_quantizer_make_images_and_every_weight_learns(quantizer: dict[str, object]) -> None:
    tokenizer = built(quantizer=quantizer)
    images = pixels(3).float() / 255
    codes = tokenizer.encode(images)
    assert [own.shape for own in codes] == [(3, level.positions) for level in tokenizer.levels]
    assert tokenizer.levels[-1][:2] == (4, 4)
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape
    assert 0 <= decoded.min() <= decoded.max() <= 1
    alone = tokenizer.encode(images[1:2])
    assert all(torch.equal(own, beside[1:2]) for own, beside in zip(alone, codes, strict=True))
    objective = tokenizer.objective().train()
    loss, _ = objective({"images": pixels(8)}, 0)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.parameters())


def test_each_code_and_pixel_depends_on_the_whole_of_an_image_that_is_no_square(tmp_path: Path) -> None:
    tokenizer = built((8, 24), reconstruction="logit_laplace")
    assert [tuple(level) for level in tokenizer.levels] == [(2, 6, 32)]
    images = (pixels(1, 8, 24).float() / 255).requires_grad_()
    [features] = tokenizer.get_submodule("encoder")(images)
    features[0, 0, 1, 5].backward()  # of the lower right
    assert images.grad is not None
    assert (images.grad.unflatten(3, (6, 4)).unflatten(2, (2, 4)).abs().amax((0, 1, 3, 5)) > 0).all()
    codes = tokenizer.encode(images.detach())
    other = [codes[0].clone()]
    other[0][0, -1] = (other[0][0, -1] + 1) % 32
    assert ((tokenizer.decode(codes) != tokenizer.decode(other))[0, :, :4, :4]).any()  # the upper left
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(images.detach())[0], codes[0])
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


def test_muon_trains_the_matrices_of_the_blocks_and_checkpointing_recomputes_them() -> None:
    objective = built().objective().train()
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    found = {names[id(matrix)] for matrix in muon_matrices(objective)}
    layers = ("qkv", "attention_out", "mlp_in", "mlp_out")
    halves = [f"tokenizer.{half}.resolutions.0.blocks.{i}" for half in ("encoder", "decoder") for i in range(2)]
    assert found == {f"{block}.{layer}.weight" for block in halves for layer in layers}

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(5)
        objective.zero_grad()
        objective({"images": pixels(4)}, 1)[0].backward()
        return [p.grad.clone() for p in objective.parameters() if p.grad is not None]

    expected, ran = gradients(), []
    inside = objective.get_submodule("tokenizer.encoder.resolutions.0.blocks.0.mlp_norm")
    inside.register_forward_hook(lambda *_: ran.append(1))
    checkpoint_activations(objective)
    assert all(torch.equal(own, other) for own, other in zip(gradients(), expected, strict=True))
    assert len(ran) == 2


def test_weight_decay_takes_no_positions() -> None:
    objective = built().objective()
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    undecayed = {names[id(table)] for group in objective.parameter_groups() for table in group.undecayed}
    assert undecayed == {f"tokenizer.{half}.resolutions.0.positions" for half in ("encoder", "decoder")}


def test_a_plan_counts_what_it_takes_with_and_without_checkpointing() -> None:
    training = {"steps": 10, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1}
    taken = []
    for kept in ("none", "block"):
        values = {"model": MODEL, "training": training | {"activation_checkpointing": kept}}
        taken.append(tokenizer_memory(ImageTokenizerConfig.model_validate(values), 64, 1))
    assert taken[0].training > taken[1].training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "width 32 is not a multiple of heads 3; choose heads that divide it"),
        ({"tile_size": 8}, "unknown key 'tile_size'"),
        ({"patch_size": 5}, "images of 16×16 cannot be cut into codes of 5×5 pixels"),
        (
            {"quantizer": {"kind": "multiscale", "scales": [1, 3], "codebook": EMA}},
            "expected the last of scales to be 4",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        build(MODEL | changes, 16)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_trains_one_by_muon_that_tokenize_takes(tiny_run: Path, tmp_path: Path) -> None:
    model = "{kind: vit, patch_size: 4, width: 32, layers: 1, heads: 2, quantizer: {kind: ema, codebook_size: 64}}"
    training = [f"image_tokenizer.training.{key}" for key in ("optimizer=muon", "activation_checkpointing=block")]
    changes = [f"runs={tmp_path}", f"image_tokenizer.model={model}", *training, NO_TRACKING]
    run = tmp_path / "tiny"
    launch("pipeline", "run", str(tiny_run), *changes, "--only", "image-tokenizer")
    launch("pipeline", "run", str(run), "--only", "tokenize")
    lines = map(json.loads, (run / "image-tokenizer" / "metrics.jsonl").read_text().splitlines())
    decibels = [line["val/psnr"] for line in lines if "val/psnr" in line]
    assert decibels[-1] > decibels[0]
    [level] = json.loads((run / "tokenize" / "index.json").read_text())["levels"]
    assert tuple(level.values()) == (4, 4, 64)
