"""Promises that every quantizer keeps, and what each kind is known for."""

from __future__ import annotations

import copy
import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from pipeline.config.base import parse_config
from pipeline.config.image_tokenizer_model import VQVAE2Config, VQVAEConfig
from pipeline.config.quantizers import CodebookConfig, QuantizerConfig
from pipeline.core.errors import UserError
from pipeline.core.fake_cuda import fake_cuda
from pipeline.image_tokenizer.base import build
from pipeline.image_tokenizer.quantizers import QUANTIZERS, Quantizer, build_quantizer
from pipeline.image_tokenizer.quantizers.base import best_code, nearest_code
from pipeline.image_tokenizer.quantizers.codebook import Codebook, kmeans
from pipeline.image_tokenizer.vqvae import VQVAEObjective
from tests.launches import Launches
from tests.no_sync import no_sync

BOOK = {"codebook_size": 64, "code_width": 8}
KINDS: dict[str, dict[str, object]] = {
    "ema": {"kind": "ema", "codebook_size": 64, "code_width": 8},
    "gradient": {"kind": "gradient", "codebook_size": 64, "code_width": 8},
    "rotation": {"kind": "ema", "codebook_size": 64, "code_width": 8, "gradient": "rotation"},
    "normalized": {"kind": "gradient", "codebook_size": 64, "code_width": 4, "normalize": True},
    "residual": {"kind": "ema", "codebook_size": 64, "code_width": 8, "depth": 3},
    "multiscale": {"kind": "multiscale", "scales": (1, 2, 3), "codebook": {"kind": "ema", **BOOK}},
    "multiscale gradient": {"kind": "multiscale", "scales": (1, 3, 3), "codebook": {"kind": "gradient", **BOOK}},
    "multiscale books": {
        "kind": "multiscale",
        "scales": (1, 2, 3),
        "codebook": {"kind": "ema", **BOOK},
        "codebook_per_scale": True,
    },
    "fsq": {"kind": "fsq", "channels": (4, 4, 4)},
    "lfq": {"kind": "lfq", "bits": 6},
    "bsq": {"kind": "lfq", "bits": 6, "spherical": True},
    "gumbel": {"kind": "gumbel", "codebook_size": 64, "code_width": 8},
    "gumbel linear": {"kind": "gumbel", "codebook_size": 64, "code_width": 8, "logits": "linear"},
}


def quantizer(name: str, **changes: object) -> Quantizer:
    config = parse_config(VQVAEConfig, {"kind": "vqvae", "quantizer": KINDS[name] | changes}, "test").quantizer
    torch.manual_seed(0)
    return build_quantizer(config, 16, 48)


def features(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("gumbel")])  # there it sees mixtures
def test_vectors_of_codes_are_what_the_decoder_sees_in_training(name: str) -> None:
    made, x = quantizer(name).train(), features(4, 9)
    made(x, 0)  # codebooks start after the first step
    made.after_update(applied=True)
    seen = made(x, 1).vectors
    codes = made.eval().encode(x)
    assert [code.shape for code in codes] == [(4, height * width) for height, width in made.grids(3, 3)]
    assert all(code.min() >= 0 and code.max() < size for code, size in zip(codes, made.codebook_sizes, strict=True))
    torch.testing.assert_close(made.vectors(codes), seen, atol=1e-5, rtol=1e-4)
    assert made.vectors(codes).shape == (4, 9, made.code_width)


@pytest.mark.parametrize("name", KINDS)
def test_autocast_changes_no_code_and_no_bit(name: str) -> None:
    made, x = quantizer(name).train(), features(4, 9)
    torch.manual_seed(3)
    plain = made(x, 0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        cast = made(x, 0)
        codes = made.encode(x)
    assert torch.equal(plain.vectors, cast.vectors)
    assert cast.vectors.dtype == cast.loss.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(codes, made.encode(x), strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_and_the_features_get_a_gradient(name: str) -> None:
    made, x = quantizer(name).train(), features(4, 9).requires_grad_()
    found = made(x, 0)
    (found.vectors.square().sum() + found.loss).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in made.parameters())


@pytest.mark.parametrize("K", [7, 64, 1024, 8192])
def test_search_in_blocks_finds_the_first_best_code(K: int) -> None:
    codebook = torch.randint(-3, 4, (K, 3), generator=torch.Generator().manual_seed(0)).float()  # many ties
    z = torch.randint(-3, 4, (700, 3), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(best_code(z, codebook), (z @ codebook.T).argmax(-1))
    distance = (z[:, None] - codebook).square().sum(-1)
    assert torch.equal(nearest_code(z, codebook), distance.argmin(-1))


def test_ema_codebook_moves_as_the_library_moves_its_own() -> None:
    """Reference: vector-quantize-pytorch's codebook, from the same state, on the same batches."""
    from vector_quantize_pytorch.vector_quantize_pytorch import Codebook as Reference

    ours = codebook("ema", decay=0.9, dead_code_threshold=0.0)
    reference = Reference(8, 64, decay=0.9, threshold_ema_dead_code=0, eps=0.0).train()
    ours.ema_counts.fill_(1.0)
    ours.ema_sums.copy_(ours.embedding)
    ours.has_started = True
    reference.embed.copy_(ours.embedding[None])
    reference.embed_avg.copy_(ours.embedding[None])
    for step in range(5):
        z = torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(step))
        _, codes, _ = reference(z)
        assert torch.equal(ours.nearest(z), codes)
        ours(z)
        ours.after_update(applied=True)
        torch.testing.assert_close(ours.embedding, reference.embed[0], atol=1e-5, rtol=1e-4)


def codebook(kind: str, **changes: object) -> Codebook:
    made = quantizer("ema", kind=kind, **changes).train().codebooks[0]  # type: ignore[index, union-attr]
    assert isinstance(made, Codebook)
    return made


def test_codebook_learns_once_an_update_from_all_micro_batches_and_not_from_a_skipped_one() -> None:
    z = torch.randn(6, 16, 8, generator=torch.Generator().manual_seed(0))
    whole, parts = codebook("ema", dead_code_threshold=0.0), codebook("ema", dead_code_threshold=0.0)
    for made in (whole, parts):
        torch.manual_seed(1)
        made.start(z[:2].flatten(0, 1))
    before = whole.embedding.clone()
    whole(z)
    for part in z.split(2):
        parts(part)
    assert torch.equal(parts.embedding, before)
    whole.after_update(applied=True)
    parts.after_update(applied=True)
    torch.testing.assert_close(whole.embedding, parts.embedding)
    assert not torch.equal(whole.embedding, before)
    after = whole.embedding.clone()
    whole(torch.full_like(z, math.nan))
    whole.after_update(applied=False)
    whole.after_update(applied=True)
    assert torch.equal(whole.embedding, after)


def test_unused_codes_come_back_to_where_the_vectors_are() -> None:
    made = codebook("ema", codebook_size=32, decay=0.5, kmeans_iterations=0)
    made.start(torch.zeros(1, 8))  # random codes
    made.embedding[1:] += 100  # a collapse: all but one are far from everything
    made.ema_sums.copy_(made.embedding * made.ema_counts[:, None])
    for step in range(12):
        z = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(step))
        made(z)
        made.after_update(applied=True)
    assert len(made.nearest(z).unique()) > 24


def test_a_batch_that_is_not_finite_starts_no_codebook() -> None:
    made = quantizer("ema").train()
    [book] = made.codebooks  # type: ignore[union-attr, misc]
    made(features(1, 4) * math.nan, 0)
    made.after_update(applied=False)
    assert not book.started
    made(features(1, 4), 1)
    made.after_update(applied=True)
    assert book.started
    assert book.embedding.isfinite().all()
    loaded = quantizer("ema").train()
    loaded.load_state_dict(made.state_dict())
    assert loaded.codebooks[0].has_started  # type: ignore[index, union-attr]


def clusters(steps: int) -> tuple[Tensor, Tensor]:
    """64 clear clusters [64,8], and vectors around them for each step, [steps,16,1024,8]."""
    generator = torch.Generator().manual_seed(0)
    centers = 10 * torch.randn(64, 8, generator=generator)
    drawn = torch.randint(0, 64, (steps, 16, 1024), generator=generator)
    return centers, centers[drawn] + 0.1 * torch.randn(steps, 16, 1024, 8, generator=generator)


@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_into_how_many_micro_batches_a_step_is_cut_changes_neither_start_nor_revival(kind: str) -> None:
    """Of codes that start on 64 clear clusters as of codes that are revived: the same ones, and the same error."""
    _, steps = clusters(4)
    books = []
    for parts in (1, 4, 16):
        made = quantizer("ema", kind=kind, dead_code_threshold=0.3).train()
        made.project = torch.nn.Identity()
        [book] = made.codebooks  # type: ignore[union-attr, misc]
        for step, vectors in enumerate(steps):
            torch.manual_seed(step)
            started = book.embedding.detach().clone()
            for part in vectors.chunk(parts):
                made(part, step)
            made.after_update(applied=True)
            if step == 1:
                moved = ((book.embedding - started).norm(dim=1) > 1).sum()  # type: ignore[union-attr]
        error = (book(steps[-1]) - steps[-1]).square().mean()
        books.append((book.embedding.detach().clone(), moved, error.detach()))  # type: ignore[union-attr]
    for other in books[1:]:
        torch.testing.assert_close(other, books[0])
    if kind == "ema":
        assert 0 < moved < 16  # those that k-means put with others into one cluster, and no good ones


def test_codes_of_clear_clusters_are_all_kept_after_the_start() -> None:
    centers, steps = clusters(2)
    made = quantizer("ema").train()
    made.project = torch.nn.Identity()
    [book] = made.codebooks  # type: ignore[union-attr, misc]
    for vectors in steps:
        before = book.embedding.clone()  # type: ignore[union-attr, operator]
        for part in vectors:
            made(part[None], 0)
        made.after_update(applied=True)
    assert ((book.embedding - before).norm(dim=1) < 0.5).all()  # type: ignore[union-attr]
    assert torch.cdist(book.embedding, centers).amin(1).median() < 0.1  # type: ignore[arg-type]


def test_an_update_that_a_tensor_says_was_skipped_changes_no_codebook() -> None:
    for kind in ("ema", "gradient"):
        results = []
        for applied in (True, torch.tensor(True), torch.tensor(False)):
            made = codebook(kind)
            torch.manual_seed(1)
            made.start(torch.randn(100, 8))
            before = copy.deepcopy(made.state_dict())
            made(torch.randn(2, 64, 8) if applied else torch.full((2, 64, 8), math.nan))
            made.after_update(applied)
            results.append((before, made.state_dict()))
        assert not torch.equal(results[0][0]["ema_counts"], results[0][1]["ema_counts"])
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
        torch.testing.assert_close(results[2][1], results[2][0], rtol=0, atol=0)


def test_kmeans_finds_clusters_and_fills_up_where_vectors_are_few() -> None:
    torch.manual_seed(0)
    centres = 10 * torch.randn(8, 4)
    vectors = (centres[:, None] + 0.1 * torch.randn(8, 50, 4)).flatten(0, 1)
    means, counts = kmeans(vectors, 64, 10)
    assert counts.sum() == 400
    error = (vectors[:, None] - means).square().sum(-1).min(1).values.mean()
    assert error < 0.04
    means, counts = kmeans(vectors[:10], 64, 10)
    assert len(means.unique(dim=0)) == 64
    assert counts.sum() == 10  # more, and codes that nothing is near would for long not count as out of use


def test_each_further_codebook_of_a_residual_quantizer_brings_vectors_nearer() -> None:
    made = quantizer("residual").train()
    for step in range(20):
        made(features(8, 16, seed=step), step)
        made.after_update(applied=True)
    x = features(8, 16, seed=99)
    z, codes = made.project(x), made.eval().encode(x)  # type: ignore[operator]
    total, errors = torch.zeros_like(z), []
    for code, book in zip(codes, made.codebooks, strict=True):  # type: ignore[arg-type]
        total = total + book.vectors()[code]
        errors.append((z - total).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 3


def test_entropies_of_binary_codes_are_those_of_the_whole_table() -> None:
    """Against the definition with all 2^d codes written out, as the library computes it."""
    made = quantizer("bsq", bits=5)
    z = torch.nn.functional.normalize(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    table = made.vectors([torch.arange(32)])
    p = (2 * z @ table.T / made.config.entropy_temperature).softmax(-1)  # type: ignore[union-attr]
    position, batch = made._entropies(z)  # type: ignore[operator]
    torch.testing.assert_close(position, -(p * p.log()).sum(-1).mean())
    torch.testing.assert_close(batch, -(p.mean(0) * p.mean(0).log()).sum())


@pytest.mark.parametrize("name", ["lfq", "bsq", "gumbel"])
def test_even_use_is_that_of_the_whole_step_however_many_micro_batches_it_has(name: str) -> None:
    """From the first step on: its loss and the loss's gradient."""
    images = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = []
    for parts in (1, 4, 16):
        objective = objective_with(KINDS[name])
        micro_batches = [{"images": part} for part in images.chunk(parts)]
        if parts > 1:
            objective.look_ahead(micro_batches, 0)
        losses = [objective.tokenizer(part["images"] / 255, 0)[1][0].loss / parts for part in micro_batches]
        torch.stack(losses).sum().backward()
        found.append((sum(losses).detach(), objective.tokenizer.quantizers[0].project.weight.grad))  # type: ignore[union-attr]
    assert found[0][1].abs().sum() > 0
    torch.testing.assert_close(found[1:], [found[0]] * 2)


@pytest.mark.parametrize("quantizers", [("gumbel", "lfq"), ("ema", "gumbel"), ("multiscale", "lfq")])
def test_looking_ahead_leaves_no_trace_but_the_steps_mean(quantizers: tuple[str, str]) -> None:
    images = torch.randint(256, (4, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    states = []
    for looks in (False, True):
        objective = objective_with(*(KINDS[name] for name in quantizers), size=12)
        for step in range(2):
            torch.manual_seed(step)
            if looks:
                objective.look_ahead([{"images": part} for part in images.split(2)], step)
                for mean in objective._step_means:
                    mean.forget()
            loss, _ = objective({"images": images}, step)
            loss.backward()
            objective.after_update(applied=True)
        states.append((loss.detach(), objective.state_dict(), torch.get_rng_state()))
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


def objective_with(*quantizers: dict[str, object], size: int = 8) -> VQVAEObjective:
    """Of a VQ-VAE, or with several quantizers a VQ-VAE-2, of images of `size` pixels."""
    torch.manual_seed(0)
    model: dict[str, object] = {"bottleneck": 1, "blocks": 1, "patch_size": 4 // len(quantizers)}
    if len(quantizers) == 1:
        model |= {"kind": "vqvae", "widths": (16,), "quantizer": quantizers[0]}
    else:
        model |= {"kind": "vqvae2", "widths": (16, 16), "quantizers": quantizers}
    objective = build(model, size).objective().train()
    assert isinstance(objective, VQVAEObjective)
    return objective


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_the_default_entropy_loss_tells_a_collapse_from_even_use(name: str) -> None:
    """At equal certainty of each position, all on one code cost most of ln K more than all codes evenly."""
    made = quantizer(name, bits=8)
    codes = torch.arange(256)
    penalties = []
    for used in (codes * 0, codes):
        position, batch = made._entropies(made.vectors([used]))  # type: ignore[operator]
        penalties.append(position + 8 * math.log(2) - batch)
    assert penalties[0] - penalties[1] > 0.8 * 8 * math.log(2)


def test_a_temperature_that_is_given_stays() -> None:
    assert quantizer("bsq", entropy_temperature=1.0).config.entropy_temperature == 1  # type: ignore[union-attr]
    assert quantizer("bsq", bits=10).config.entropy_temperature == 0.1  # type: ignore[union-attr]
    assert quantizer("lfq", bits=10).config.entropy_temperature == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"kind": "vqvae", "quantizer": {"kind": "ema", "normalize": True, "depth": 2}}, "normalize needs depth 1"),
        ({"kind": "vqvae", "quantizer": {"kind": "fsq", "channels": [2, 8]}}, "channels must be at least 3"),
        ({"kind": "vqvae", "quantizer": {"kind": "ema", "codebook_size": 2**21}}, "less than or equal to 1048576"),
        ({"kind": "vqvae", "quantizer": {"kind": "emma"}}, "'ema', 'gradient'"),
        ({"kind": "vqvae", "quantizer": {"kind": "ema", "codebok_size": 8}}, "did you mean .*codebook_size"),
        ({"kind": "vqvae2", "quantizers": [KINDS["ema"]] * 3, "widths": [8, 8]}, "3 quantizers need as many"),
    ],
)
def test_config_says_what_to_change(model: dict[str, object], message: str) -> None:
    cls = VQVAE2Config if model["kind"] == "vqvae2" else VQVAEConfig
    with pytest.raises(UserError, match=message) as caught:
        parse_config(cls, model, "test")
    assert "\n" not in str(caught.value)


def test_every_kind_of_the_config_is_in_the_registry_and_no_kind_falls_silently_to_another() -> None:
    [union, _] = get_args(QuantizerConfig)
    kinds = [kind for config in get_args(union) for kind in get_args(config.model_fields["kind"].annotation)]
    assert sorted(kinds) == sorted(QUANTIZERS)
    assert {KINDS[name]["kind"] for name in KINDS} == set(QUANTIZERS)  # all are held to the promises above
    with pytest.raises(KeyError, match="new"):
        build_quantizer(CodebookConfig.model_construct(kind="new"), 16, 48)


def test_search_among_8192_codes_is_a_few_launches_on_a_gpu() -> None:
    with fake_cuda():
        z, book = torch.empty(32_768, 8, device="cuda"), torch.empty(8192, 8, device="cuda")
        with Launches() as launches, no_sync():
            assert nearest_code(z, book).shape == (32_768,)
    assert launches.total <= 16, launches
