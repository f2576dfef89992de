"""Typed config: what a mistake in a config file or on the command line gets."""

from pathlib import Path

import pytest

from pipeline.config.base import Config, differences, identity, load_config, operational
from pipeline.config.training import KeepBestConfig, TrainingConfig
from pipeline.core.errors import UserError


class Inner(Config):
    layers: int = 4
    learning_rate: float = 1e-3
    log_every: int = operational(10)


class Outer(Config):
    name: str
    transformer: Inner = Inner()
    prompts: list[str] = []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text("name: demo\ntransformer: {layers: 2}\nprompts: [a, b]\n")
    return file


def test_overrides_reach_sections_lists_and_scientific_notation(path: Path) -> None:
    config = load_config(Outer, path, ["transformer.layers=8", "prompts.1=red heart", "transformer.learning_rate=3e-4"])
    assert config.transformer == Inner(layers=8, learning_rate=3e-4)
    assert config.prompts == ["a", "red heart"]


def test_unknown_key_is_named_with_its_nearest_neighbour(path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key 'transformer.layer'; did you mean 'transformer.layers'\?"):
        load_config(Outer, path, ["transformer.layer=8"])


def test_unknown_section_lists_what_is_known(path: Path) -> None:
    with pytest.raises(UserError, match="unknown key 'zzz'; known here: name, prompts, transformer"):
        load_config(Outer, path, ["zzz.a=1"])


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("transformer.layers", "expected key=value"),
        ("name.deeper=1", "name is a value, not a section"),
        ("prompts.7=c", "expected an index below 2"),
        ("transformer.layers=many", "'transformer.layers': .* found 'many'"),
        ("name=[", "not valid YAML"),
    ],
)
def test_a_wrong_override_gets_one_line_that_names_it(path: Path, override: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        load_config(Outer, path, [override])
    assert "\n" not in str(caught.value)


def test_missing_file_and_broken_yaml_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config at"):
        load_config(Outer, tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    with pytest.raises(UserError, match="not valid YAML") as caught:
        load_config(Outer, broken)
    assert "\n" not in str(caught.value)


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Inner().layers = 3  # type: ignore[misc]


def test_operational_fields_are_no_part_of_a_stages_identity() -> None:
    assert identity(Inner(log_every=1)) == identity(Inner(log_every=99))
    assert identity(Inner(layers=1)) != identity(Inner(layers=2))


def test_operational_fields_that_decide_with_others_are_a_part_of_it() -> None:
    training = TrainingConfig(steps=6, batch_size=4, warmup_steps=0)
    keeping = training.model_copy(update={"keep_best": KeepBestConfig(metric="val/loss", mode="min")})
    for name in ("evaluate_every", "evaluate_batches"):
        assert name not in identity(training)
        assert identity(keeping) != identity(keeping.model_copy(update={name: 7}))


def test_differences_name_the_changed_keys() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c: 2 -> 3"]


class Two(Config):
    first: TrainingConfig
    second: TrainingConfig


def test_an_override_changes_its_own_section_alone_where_an_alias_names_one_in_two_places(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("first: &training {steps: 100, batch_size: 8, warmup_steps: 1}\nsecond: *training\n")
    config = load_config(Two, file, ["second.steps=500"])
    assert (config.first.steps, config.second.steps) == (100, 500)


def test_an_override_enters_a_section_that_is_null(tmp_path: Path) -> None:
    file = tmp_path / "training.yaml"
    file.write_text("{steps: 100, batch_size: 8, warmup_steps: 1, keep_best: null}\n")
    config = load_config(TrainingConfig, file, ["keep_best.metric=val/loss/image", "keep_best.mode=min"])
    assert config.keep_best == KeepBestConfig(metric="val/loss/image", mode="min")
