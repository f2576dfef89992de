"""A stage is a node of the graph, a section of the config and a file in stages/: none without the others."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pipeline.config.base import Config, to_yaml
from pipeline.config.pipeline import PipelineConfig, Trained, load_pipeline
from pipeline.core.errors import UserError
from pipeline.orchestration.graph import (
    ARRAY_STAGES,
    STAGE_NAMES,
    STAGES,
    Stage,
    check_before_start,
    inputs_of,
    stages_of,
)
from tests.conftest import TINY
from tests.launch import ROOT


def test_every_stage_has_a_section_and_a_file_and_the_other_way_round() -> None:
    expected = {stage.section for stage in STAGES}
    sections = {name for name, info in PipelineConfig.model_fields.items() if _is_section(info.annotation)}
    assert sections - {"store", "tracking"} == expected
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"} == expected


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_the_file_of_a_stage_runs_it_and_says_what_it_does(stage: Stage) -> None:
    text = (ROOT / "stages" / f"{stage.section}.py").read_text()
    assert f'run_stage("{stage.name}", main)' in text
    assert stage.name in str(ast.get_docstring(ast.parse(text))).split(":")[0]


def test_stages_read_only_what_comes_before_them_and_the_report_reads_everything() -> None:
    for number, stage in enumerate(STAGES):
        assert set(stage.inputs + stage.looks_at) <= set(STAGE_NAMES[:number])
    assert STAGES[-1].name == "report"
    assert STAGES[-1].inputs == STAGE_NAMES[:-1]


def test_what_trains_is_what_has_training_in_its_section() -> None:
    config = load_pipeline(TINY)
    assert [s.name for s in STAGES if s.trains] == [
        s.name for s in STAGES if isinstance(config.section(s.section), Trained)
    ]
    assert set(ARRAY_STAGES).isdisjoint(s.name for s in STAGES if s.trains)


def test_a_stage_that_is_switched_off_is_no_stage_and_no_input() -> None:
    for enabled in (False, True):
        config = load_pipeline(TINY, [f"reranker.enabled={str(enabled).lower()}"])
        names = [stage.name for stage in stages_of(config)]
        assert ("reranker" in names) == enabled
        assert all(("reranker" in inputs_of(config, s)) == enabled for s in STAGES if "reranker" in s.inputs)


@pytest.mark.parametrize(
    ("settings", "processes", "refused"),
    [
        (["reranker.training.batch_size=8"], 4, False),
        (["reranker.training.batch_size=8"], 8, True),
        (["reranker.training.batch_size=8", "reranker.training.micro_batch_size=1"], 1, True),
        (["reranker.training.batch_size=8", "reranker.clip=clip"], 8, False),  # it is not trained
    ],
)
def test_a_reranker_that_would_see_single_samples_is_refused_before_anything_starts(
    settings: list[str], processes: int, refused: bool
) -> None:
    training = ["reranker.training.steps=10", "reranker.training.warmup_steps=1"]
    config = load_pipeline(TINY, ["reranker.enabled=true", *training, *settings])
    if not refused:
        check_before_start(config, lambda stage: processes)
        return
    with pytest.raises(UserError, match="at least 2 samples per process and pass, .* found 1: raise"):
        check_before_start(config, lambda stage: processes)


def test_tune_whose_processes_would_share_a_group_is_refused_before_anything_starts() -> None:
    training = "tune.training={steps: 9, batch_size: 32, warmup_steps: 1}"
    groups = ["tune.enabled=true", training, "tune.group_size=8", "tune.reward=clip", "tune.clip=x"]
    config = load_pipeline(TINY, groups)
    check_before_start(config, lambda stage: 4)
    with pytest.raises(UserError, match="expected a multiple of 8 processes × group_size 8, .* found 32"):
        check_before_start(config, lambda stage: 8)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("image_tokenizer.training.precision=bf16-weights", "image-tokenizer: expected training.precision bf16, "),
        ("transformer.training.precision=fp16", "transformer: expected deepspeed.zero_stage 1, 2 or 3 "),
    ],
)
def test_precisions_that_a_stage_cannot_train_in_are_refused_before_anything_starts(
    override: str, complaint: str
) -> None:
    config = load_pipeline(TINY, ["transformer.deepspeed.zero_stage=0", override])
    with pytest.raises(UserError, match=f"^{complaint}.* found "):
        check_before_start(config, lambda stage: 1)


def test_scales_that_do_not_fit_the_image_size_are_refused_when_the_config_is_read() -> None:
    scales = ["image_tokenizer.model={kind: vqvae, widths: [8, 8], quantizer: {kind: multiscale, scales: [1, 2, 8]}}"]
    assert load_pipeline(TINY, [*scales, "prepare.image_size=16"]).prepare.image_size == 16
    with pytest.raises(UserError, match=r"quantizer.scales: expected the last one to be 16, .* of 32 pixels, found 8"):
        load_pipeline(TINY, [*scales, "prepare.image_size=32"])


def test_the_image_size_of_a_pretrained_tokenizer_is_not_held_against_ours() -> None:
    pretrained = "image_tokenizer.pretrained={library: diffusers, path: x}"
    assert load_pipeline(TINY, ["image_tokenizer.model=null", pretrained, "prepare.image_size=36"])


def test_a_run_that_branches_off_with_another_style_or_condition_has_what_follows_from_it(tmp_path: Path) -> None:
    modern = load_pipeline(TINY, ["transformer.style=modern", "transformer.mlp=gelu"])
    (tmp_path / "config.yaml").write_text(to_yaml(modern))
    (tmp_path / "run.json").write_text("{}")
    same = load_pipeline(tmp_path, ["name=b", "transformer.layers=1"]).transformer
    assert (same.style, same.norm, same.mlp, same.positions) == ("modern", "rmsnorm", "gelu", "rotary")
    classic = load_pipeline(tmp_path, ["name=b", "transformer.style=classic", "transformer.attention=full"]).transformer
    assert (classic.norm, classic.mlp, classic.positions, classic.qk_norm) == ("layernorm", "gelu", "learned", False)
    assert classic.attention == "full"
    of_classes = ["name=b", "generate.new_prompts=[]", "transformer.condition=class"]
    classes = load_pipeline(tmp_path, of_classes).transformer
    assert (classes.text_loss_weight, modern.transformer.text_loss_weight) == (0.0, 0.125)
    weighted = load_pipeline(TINY, ["transformer.text_loss_weight=0.5"])
    (tmp_path / "config.yaml").write_text(to_yaml(weighted))
    assert load_pipeline(tmp_path, of_classes).transformer.text_loss_weight == 0.5
