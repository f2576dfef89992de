"""Promises of the adversarial loss: what learns from what, the ramp, LeCam, and the guard of good reconstructions."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.base import parse_config
from pipeline.config.image_losses import AdversarialConfig, PerceptualConfig
from pipeline.config.image_tokenizer import ImageTokenizerConfig
from pipeline.config.training import TrainingConfig
from pipeline.core.errors import UserError
from pipeline.core.metric_names import CLOCK_METRICS
from pipeline.image_tokenizer.base import ImageTokenizer, TokenizerObjective, build
from pipeline.image_tokenizer.discriminator import Adversary, Guard, PatchDiscriminator
from pipeline.image_tokenizer.image_losses import ImageLosses, add_image_losses
from pipeline.training.optimizer import build_adamw
from tests.conftest import NO_TRACKING, TINY
from tests.launch import launch

SIDE = 16
SMALL = {
    "kind": "dvae",
    "codebook_size": 32,
    "code_width": 8,
    "patch_size": 2,
    "widths": (16, 16),
    "blocks": 1,
    "block_kernels": (3, 1),
    "bottleneck": 1,
    "reconstruction": "l2",
    "temperature": {"start": 0.3, "end": 0.3, "steps": 0},
    "kl_weight": {"start": 0.0, "end": 0.0, "steps": 0},
}


def adversarial(**changes: object) -> AdversarialConfig:
    return AdversarialConfig.model_validate({"start_step": 0, "ramp_steps": 1, "width": 8, "layers": 2} | changes)


def adversary(**changes: object) -> Adversary:
    torch.manual_seed(0)
    return Adversary(adversarial(**changes), SIDE)


def shapes(count: int, seed: int) -> Tensor:
    """Coloured rectangles on a coloured ground, uint8 [count, 3, 16, 16]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 1, 1), generator=generator).expand(-1, -1, SIDE, SIDE).clone()
    for image in images:
        top, left = torch.randint(1, SIDE // 2, (2,), generator=generator).tolist()
        height, width = torch.randint(3, SIDE // 2, (2,), generator=generator).tolist()
        image[:, top : top + height, left : left + width] = torch.randint(256, (3, 1, 1), generator=generator)
    return images.byte()


def batch() -> tuple[Tensor, Tensor]:
    """Images, and a decoder's output for them."""
    images = shapes(4, 0).float() / 255
    output = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    return images, output


def added(module: Adversary, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    images, output = batch()
    loss = (output - images).square().mean()
    extra, metrics = module(images, output.clamp(0, 1), output, loss, step)
    return extra, output, metrics


def test_a_score_belongs_to_a_patch_of_its_own_image_alone() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(adversarial(layers=1), 32)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    scores = discriminator(images)
    assert scores.shape == (2, 1, 14, 14)
    scores[0, 0, 7, 7].backward()
    assert images.grad is not None
    assert images.grad[1].abs().sum() == 0
    torch.testing.assert_close(discriminator(images[:1]), scores[:1])


def test_before_its_start_the_discriminator_does_not_learn_and_the_tokenizer_does_not_see_it() -> None:
    module = adversary(start_step=10)
    extra, output, _ = added(module, step=9)
    assert extra == 0
    extra.backward()
    assert output.grad is None or output.grad.abs().sum() == 0
    gradients = [p.grad for p in module.parameters()]
    assert all(g is not None and g.abs().sum() == 0 for g in gradients)  # zero, not absent: DDP waits for them


def test_the_hinge_teaches_the_discriminator_and_nobody_else_and_the_ramp_lets_the_tokenizer_see_it() -> None:
    module = adversary(start_step=10, ramp_steps=4)
    extra, output, metrics = added(module, step=10)
    assert metrics["adversarial_weight"] == 0
    extra.backward()
    assert output.grad is None or output.grad.abs().sum() == 0
    # A bias of the last layer moves real and rebuilt scores alike, so its two halves of the hinge cancel at the start.
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters() if p.ndim > 1)
    weights = [added(module, step)[2]["adversarial_weight"].item() for step in (11, 12, 14, 100)]
    assert weights == pytest.approx([weights[3] * share for share in (0.25, 0.5, 1, 1)])


def test_the_tokenizers_gradient_leaves_the_discriminator_alone() -> None:
    """What the discriminator gets must be the hinge's gradient, with or without the adversarial term."""
    gradients = []
    for weight in (1e-9, 10.0):
        module = adversary(weight=weight, weighting="fixed")
        extra, output, _ = added(module, step=5)
        extra.backward()
        gradients.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(*gradients)
    assert output.grad is not None
    assert output.grad.abs().sum() > 0


def test_adaptive_weight_is_the_ratio_of_the_two_gradients() -> None:
    module = adversary(weight=0.5, guard=None)
    extra, output, _ = added(module, step=5)
    [ours] = torch.autograd.grad(extra, output)
    images, output = batch()
    [of_pixels] = torch.autograd.grad((output - images).square().mean(), output)
    assert ours.norm().item() == pytest.approx(0.5 * of_pixels.norm().item(), rel=1e-4)


def test_lecam_pulls_scores_to_the_running_means_of_the_other_kind() -> None:
    module = adversary(lecam_weight=1.0)
    for _ in range(3):
        _, _, metrics = added(module, step=0)
    assert module.score_real.item() == pytest.approx(metrics["score_real"].item(), rel=1e-4)
    real, rebuilt = torch.full((5,), 3.0), torch.full((5,), -2.0)
    module.eval()  # the means stay
    module.score_real.fill_(2.0)
    module.score_rebuilt.fill_(-1.0)
    assert module._lecam(real, rebuilt).item() == pytest.approx((3 + 1) ** 2 + (-2 - 2) ** 2)


def test_patch_too_large_for_the_image_is_one_line() -> None:
    with pytest.raises(UserError, match="layers 3 needs images of at least 24×24 pixels, found 16×16") as caught:
        PatchDiscriminator(adversarial(layers=3), 16)
    assert "\n" not in str(caught.value)


def test_config_says_what_it_takes() -> None:
    with pytest.raises(UserError, match="start_step.* is missing"):
        parse_config(AdversarialConfig, {}, "test")
    training = {"steps": 100, "batch_size": 8, "warmup_steps": 1}
    with pytest.raises(UserError, match=r"adversarial\.start_step must be below training\.steps \(100\)"):
        parse_config(ImageTokenizerConfig, {"training": training, "adversarial": {"start_step": 100}}, "test")


def test_the_discriminator_has_a_group_of_its_own_without_weight_decay() -> None:
    objective = build(SMALL, SIDE).objective()
    add_image_losses(objective, SIDE, None, adversarial(learning_rate_ratio=0.25, betas=(0.1, 0.2)))
    assert isinstance(objective.reconstruction, ImageLosses)
    assert objective.reconstruction.adversary
    training = TrainingConfig(steps=10, batch_size=2, warmup_steps=1, learning_rate=0.4, weight_decay=0.5)
    groups = build_adamw(objective.parameter_groups(), training).param_groups
    own = {id(p) for p in objective.reconstruction.adversary.parameters()}
    assert [(g["lr"], g["initial_lr"], g["betas"], g["weight_decay"]) for g in groups] == [
        (0.4, 0.4, training.betas, 0.5),
        (0.4, 0.4, training.betas, 0.0),
        (0.1, 0.1, (0.1, 0.2), 0.0),
    ]
    assert {id(p) for p in groups[2]["params"]} == own
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in objective.parameters()}
    assert sum(len(g["params"]) for g in groups) == len(list(objective.parameters()))


def test_guard_halves_while_the_error_is_high_grows_back_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(0.25)

    def strength(error: float, step: int, watching: bool = True) -> float:
        found = guard(torch.tensor(error), watching).item()
        guard.report(step)
        return found

    with caplog.at_level(logging.WARNING):
        for step in range(50):
            assert strength(1.0, step, watching=step >= 20) == 1
        high = [strength(1.6, 50 + i) for i in range(20)]
        assert high[-1] < 1e-3
        back = [strength(1.0, 70 + i) for i in range(1500)]
    assert back[0] > high[-1]
    assert back[-1] == 1
    assert len(caplog.records) == 1
    assert "adversarial weight is lowered" in caplog.text


def test_guard_leaves_noise_and_what_is_not_finite_alone() -> None:
    guard = Guard(0.25)
    generator = torch.Generator().manual_seed(0)
    for step in range(2000):  # batches that scatter by a fifth
        value = 1 + 0.2 * torch.randn((), generator=generator)
        assert guard(torch.tensor(float("nan")) if step % 10 == 0 else value, watching=True) == 1


def test_guard_goes_on_with_the_same_bits_from_a_state_dict() -> None:
    def errors(guard: Guard, steps: range) -> list[float]:
        return [guard(torch.tensor(1 + 0.9 * (step > 25)), watching=step > 20).item() for step in steps]

    whole = Guard(0.25)
    expected = errors(whole, range(60))
    assert expected[0] == 1 > expected[-1]
    first, second = Guard(0.25), Guard(0.25)
    before = errors(first, range(30))
    second.load_state_dict(first.state_dict())
    assert before + errors(second, range(30, 60)) == expected


@pytest.mark.parametrize("value", [-0.2, 1.2])
@pytest.mark.parametrize("term", ["perceptual", "adversarial"])
def test_every_loss_pulls_at_pixels_beyond_black_and_white(term: str, value: float) -> None:
    """On white a third of the decoder's output lies there: clamped before the loss, it would have no gradient."""
    perceptual = PerceptualConfig(weight=1.0, resize=32) if term == "perceptual" else None
    losses = ImageLosses("l2", SIDE, perceptual, None if perceptual else adversarial(weighting="fixed"))
    images, output = batch()
    output = (0 * output + value + 0.1 * (output - images)).detach().requires_grad_()
    [of_all] = torch.autograd.grad(losses(images, output, 5)[0], output)
    [of_pixels] = torch.autograd.grad((output - images).square().mean(), output)
    assert ((of_all - of_pixels).abs() > 1e-6 * of_pixels.abs()).float().mean() > 0.9


@pytest.fixture(scope="module")
def trained() -> ImageTokenizer:
    """A small tokenizer that rebuilds its images well."""
    torch.manual_seed(0)
    tokenizer = build(SMALL, SIDE)
    train(tokenizer.objective(), range(200))
    return tokenizer


def train(objective: TokenizerObjective, steps: range, learning_rate: float = 3e-3) -> None:
    training = TrainingConfig(steps=1000, batch_size=16, learning_rate=learning_rate, warmup_steps=1)
    optimizer = build_adamw(objective.train().parameter_groups(), training)
    images = shapes(256, seed=1)
    for step in steps:
        torch.manual_seed(step)
        loss, _ = objective({"images": images[torch.randint(256, (16,))]}, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        objective.report(step)


def validation_error(tokenizer: ImageTokenizer) -> float:
    images = shapes(64, seed=2).float() / 255
    return (tokenizer.decode(tokenizer.encode(images)) - images).square().mean().item()


@pytest.mark.parametrize("guard", [0.25, None])
@pytest.mark.slow
def test_a_far_too_strong_discriminator_does_not_wreck_a_good_reconstruction(
    trained: ImageTokenizer, guard: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Guarded, the squared error on unseen images ends at most 1.5 times as high; unguarded, over twice as high."""
    tokenizer = copy.deepcopy(trained)
    before = validation_error(tokenizer)
    objective = tokenizer.objective()
    strong = adversarial(start_step=230, ramp_steps=20, weighting="fixed", weight=1e3, guard=guard)
    add_image_losses(objective, SIDE, None, strong)
    train(objective, range(200, 360))
    after = validation_error(tokenizer)
    if guard:
        assert after < 1.5 * before
        assert "adversarial weight is lowered" in caplog.text
    else:
        assert after > 2 * before


@pytest.mark.slow
def test_only_the_tokenizer_is_exported(trained: ImageTokenizer, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = copy.deepcopy(trained)
    add_image_losses(tokenizer.objective(), SIDE, None, adversarial())
    assert tokenizer.state_dict().keys() == trained.state_dict().keys()


def test_with_every_extra_two_processes_resume_to_the_same_bits_and_export_the_tokenizer_alone(
    tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    run.mkdir()
    for name in ("run.json", "config.yaml"):
        shutil.copy(tiny_run / name, run)
    shutil.copytree(tiny_run / "prepare", run / "prepare")
    settings = {
        "runs": tmp_path,
        "image_tokenizer.model.block": "ode",
        "image_tokenizer.model.ode.adjoint": "true",
        "image_tokenizer.perceptual.weight": 0.1,
        "image_tokenizer.adversarial.start_step": 4,
        "image_tokenizer.adversarial.ramp_steps": 3,
        "image_tokenizer.adversarial.layers": 2,
        "image_tokenizer.adversarial.width": 8,
        "image_tokenizer.training.steps": 16,
        "image_tokenizer.training.micro_batch_size": 4,
        "image_tokenizer.training.checkpoint_every": 8,
    }
    arguments = ["--config", str(TINY), NO_TRACKING, *(f"{key}={value}" for key, value in settings.items())]
    stage = run / "image-tokenizer"

    def train_to_the_end() -> tuple[bytes, list[dict[str, float]]]:
        launch("stages.image_tokenizer", *arguments, processes=2)
        lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
        clock = ("time", "system/", *CLOCK_METRICS)
        metrics = [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines]
        return (stage / "model" / "model.safetensors").read_bytes(), metrics

    weights, metrics = train_to_the_end()
    assert b"discriminator" not in weights
    logged = {key for line in metrics for key in line}
    assert {"perceptual", "adversarial_weight", "adversarial_guard", "discriminator_loss", "lecam"} <= logged
    for done in ("_SUCCESS", "manifest.json", "model", "checkpoints/step-00000016"):
        shutil.rmtree(stage / done) if (stage / done).is_dir() else (stage / done).unlink()
    again, metrics_again = train_to_the_end()
    assert metrics_again == metrics
    assert again == weights
