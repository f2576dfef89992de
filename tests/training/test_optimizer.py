"""Which parameters the optimizers train and how, learning-rate schedules, and the moving average of weights."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.reranker import TowerConfig
from pipeline.config.training import TrainingConfig
from pipeline.config.transformer import TransformerConfig
from pipeline.core.objective import Objective, ParameterGroup
from pipeline.image_tokenizer.architecture import use_channels_last
from pipeline.image_tokenizer.base import build
from pipeline.reranker.model import ContrastiveObjective, TwoTowers
from pipeline.training.ema import Ema
from pipeline.training.optimizer import (
    build_adamw,
    build_optimizer,
    muon_matrices,
    skip_unless,
    spare_muons_compilation,
)
from pipeline.training.schedule import learning_rate_factor
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective
from tests.training.engine_worker import SmallObjective


class TwoBlocks(Objective):
    """Two blocks, an embedding, and a discriminator that learns against them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.discriminator = nn.Linear(3, 1)

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup([self.embedding.weight]),
            ParameterGroup(list(self.layers.parameters()), learning_rate_scale=0.5),
            ParameterGroup(list(self.discriminator.parameters()), betas=(0.1, 0.2), weight_decay=False, adversary=True),
        ]

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)


TRAINING = TrainingConfig(steps=10, batch_size=1, warmup_steps=1, learning_rate=0.4, weight_decay=0.2)


def _by_name(objective: Objective, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_adamw_takes_rates_betas_and_decay_from_the_groups_and_decays_matrices_alone() -> None:
    objective = TwoBlocks()
    found = _by_name(objective, build_adamw(objective.parameter_groups(), TRAINING))
    assert {name: (group["lr"], group["weight_decay"], group["betas"]) for name, group in found.items()} == {
        "embedding.weight": (0.4, 0.2, TRAINING.betas),
        # Decay per step is rate * weight_decay: the same at every scale.
        **{f"layers.{i}.weight": (0.2, 0.4, TRAINING.betas) for i in (0, 1)},
        **{f"layers.{i}.bias": (0.2, 0.0, TRAINING.betas) for i in (0, 1)},
        **{f"discriminator.{kind}": (0.4, 0.0, (0.1, 0.2)) for kind in ("weight", "bias")},
    }


def test_muon_trains_the_matrices_of_blocks_and_adamw_every_other_parameter_once() -> None:
    objective = TwoBlocks()
    optimizer = build_optimizer(objective, TRAINING.model_copy(update={"optimizer": "muon"}))
    found = _by_name(objective, optimizer)
    assert [name for name, group in found.items() if group["use_muon"]] == ["layers.0.weight", "layers.1.weight"]
    assert found.keys() == dict(objective.named_parameters()).keys()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    assert {group["weight_decay"] for group in found.values() if not group["use_muon"]} == {0.0}


class Convolutions(Objective):
    """Blocks of a tokenizer's kind, of one kernel and of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 12, 1)])

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.stem(batch["images"])
        for layer in self.layers:
            x = layer(x)
        return x.square().mean(), {}

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)


def _convolutions() -> Objective:
    torch.manual_seed(0)
    return Convolutions()


def _steps(objective: Objective, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        images = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(number))
        objective({"images": images}, number)[0].backward()
        optimizer.step()
        optimizer.zero_grad()


WITH_MUON = TRAINING.model_copy(update={"optimizer": "muon", "learning_rate": 0.01})


@pytest.mark.parametrize("channels_last", [False, True])
def test_muon_takes_kernels_as_the_matrices_that_torchs_muon_would_get(channels_last: bool) -> None:
    found, expected = _convolutions(), _convolutions()
    if channels_last:
        use_channels_last(found)
    _steps(found, build_optimizer(found, WITH_MUON, replicated=True), range(4))

    kernels = [layer.get_parameter("weight") for layer in expected.blocks()]
    matrices = [nn.Parameter(kernel.detach().flatten(1)) for kernel in kernels]
    muon = torch.optim.Muon(matrices, lr=WITH_MUON.muon_learning_rate, weight_decay=WITH_MUON.weight_decay)
    others = [p for p in expected.parameters() if all(p is not kernel for kernel in kernels)]
    adamw = torch.optim.AdamW(others, lr=WITH_MUON.learning_rate, betas=WITH_MUON.betas, weight_decay=0.0)
    for number in range(4):
        images = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(number))
        expected({"images": images}, number)[0].backward()
        for matrix, kernel in zip(matrices, kernels, strict=True):
            assert kernel.grad is not None
            matrix.grad = kernel.grad.flatten(1)
        muon.step()
        adamw.step()
        for matrix, kernel in zip(matrices, kernels, strict=True):
            kernel.data.copy_(matrix.detach().view(kernel.shape))
        expected.zero_grad()
    for name, weight in expected.named_parameters():
        difference = (found.get_parameter(name) - weight).norm() / weight.norm()
        assert difference < 0.01, name  # torch's orthogonalises in bfloat16


def test_a_step_of_replicated_muon_that_is_not_applied_changes_no_bit_of_weights_or_states() -> None:
    some, all_applied = _convolutions(), _convolutions()
    optimizer = build_optimizer(some, WITH_MUON, replicated=True)
    _steps(some, optimizer, range(2))
    for parameter in some.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    skip_unless(torch.tensor(False), optimizer)
    optimizer.step()
    optimizer.zero_grad()
    skip_unless(torch.tensor(True), optimizer)
    _steps(some, optimizer, range(2, 4))
    _steps(all_applied, build_optimizer(all_applied, WITH_MUON, replicated=True), range(4))
    for name, weight in all_applied.named_parameters():
        assert torch.equal(some.get_parameter(name), weight), name


@pytest.mark.parametrize("rank", [8, 3])
def test_on_a_cpu_wide_matrices_get_the_singular_values_that_newton_schulz_leads_to(rank: int) -> None:
    spare_muons_compilation()
    from pipeline.training.muon import WIDE, gram_in_float32

    torch.manual_seed(rank)
    falling = torch.logspace(0, -2, rank)
    updates_BNM = (torch.randn(2, 8, rank) * falling) @ torch.randn(2, rank, 8 * WIDE)
    left, values, right = torch.linalg.svd(updates_BNM.double(), full_matrices=False)
    values[:, rank:] = 0
    values /= values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = left @ values.diag_embed() @ right
    assert (gram_in_float32(updates_BNM, steps=5) - expected).norm() < 1e-3 * expected.norm()


def test_muon_leaves_what_is_frozen_alone() -> None:
    objective = _convolutions()
    frozen = objective.blocks()[0].requires_grad_(False)
    assert {id(matrix) for matrix in muon_matrices(objective)}.isdisjoint(map(id, frozen.parameters()))
    before = {name: parameter.clone() for name, parameter in frozen.named_parameters()}
    _steps(objective, build_optimizer(objective, WITH_MUON, replicated=True), range(2))
    assert all(torch.equal(frozen.get_parameter(name), value) for name, value in before.items())


def _schedule(kind: str, **settings: float) -> list[float]:
    config = TrainingConfig.model_validate(
        {"steps": 100, "batch_size": 1, "warmup_steps": 10, "schedule": kind, **settings}
    )
    return [learning_rate_factor(config, step) for step in range(config.steps)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_every_schedule_warms_up_linearly_to_its_peak(kind: str) -> None:
    assert _schedule(kind)[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_its_ratio() -> None:
    factors = _schedule("cosine", final_learning_rate_ratio=0.2)
    assert factors[55] == pytest.approx(0.6)
    assert factors[99] == pytest.approx(0.2, abs=1e-3)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_wsd_is_stable_then_decays_over_its_fraction() -> None:
    factors = _schedule("wsd", decay_fraction=0.2)
    assert factors[10:81] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)


def test_constant_stays() -> None:
    assert set(_schedule("constant")[10:]) == {1.0}


def test_the_average_forgets_the_first_weights_and_is_swapped_in_and_out() -> None:
    weights = {"w": torch.zeros(3)}
    ema = Ema(lambda: weights, decay=0.5)
    weights["w"].fill_(1.0)
    for _ in range(20):
        ema.update()
    assert ema.average["w"].tolist() == pytest.approx([1.0] * 3, abs=1e-4)
    weights["w"].fill_(5.0)
    ema.swap()
    assert weights["w"].tolist() == pytest.approx([1.0] * 3, abs=1e-4)
    ema.swap()
    assert weights["w"].tolist() == [5.0] * 3


def test_a_step_that_was_not_applied_moves_no_average_and_counts_for_nothing() -> None:
    weights = {"w": torch.rand(3)}
    some, all_applied = Ema(lambda: weights, decay=0.9), Ema(lambda: weights, decay=0.9)
    for step in range(6):
        weights["w"] = torch.rand(3)
        some.update(torch.tensor(step % 2 == 0))
        if step % 2 == 0:
            all_applied.update()
    assert torch.equal(some.average["w"], all_applied.average["w"])
    assert some.updates == all_applied.updates == 3


def _objectives() -> dict[str, Objective]:
    sides = {"widths": (8,), "patch_size": 4, "bottleneck": 1}
    codes = {"codebook_size": 8, "code_width": 4}
    layout = Layout.of(4, 10, [(2, 2, 8)])
    shape = TransformerConfig.model_validate({"layers": 1, "width": 8, "heads": 1, "positions": "learned"})
    return {
        "gradient": build({"kind": "vqvae", "quantizer": {"kind": "gradient", **codes}, **sides}, 8).objective(),
        "gumbel": build({"kind": "vqvae", "quantizer": {"kind": "gumbel", **codes}, **sides}, 8).objective(),
        "dvae": build({"kind": "dvae", **codes, **sides}, 8).objective(),
        "transformer": JointObjective(Transformer(layout, shape), shape),
        "reranker": ContrastiveObjective(TwoTowers(TowerConfig(width=8, layers=1, heads=1, patch_size=4), 8, 4, 10)),
    }


@pytest.mark.parametrize("name", ["gradient", "gumbel", "dvae", "transformer", "reranker"])
def test_weight_decay_leaves_codebooks_and_tables_of_positions_alone(name: str) -> None:
    objective = _objectives()[name]
    found = _by_name(objective, build_adamw(objective.parameter_groups(), TRAINING))
    assert set(found) == {parameter for parameter, _ in objective.named_parameters()}  # each once
    tables = [parameter for parameter in found if re.search("codebook|position|rows|columns", parameter)]
    assert tables
    assert {found[parameter]["weight_decay"] for parameter in tables} == {0.0}
    matrices = {parameter for parameter, p in objective.named_parameters() if p.ndim >= 2} - {*tables}
    assert {found[parameter]["weight_decay"] for parameter in matrices} == {0.2}


def test_muon_orthogonalises_in_float32_on_a_cpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.muon.original_muon import ns_compute_dtype

    for name in ("bf16", "fp16"):  # no x86 has the second without the first
        monkeypatch.setattr(f"torch.ops.mkldnn._is_mkldnn_{name}_supported", lambda: False)
    muon, *_ = build_optimizer(SmallObjective(), WITH_MUON).param_groups
    assert muon["use_muon"]
    assert ns_compute_dtype(muon["ns_method"]) == torch.float32
