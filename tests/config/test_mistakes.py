"""What a wrong value or key of the pipeline's config gets: one line that names it as it stands in the file."""

from pathlib import Path

import pytest

from pipeline.config.pipeline import load_pipeline
from pipeline.core.errors import UserError

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


def complaint(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_pipeline(TINY, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_key_of_a_union_is_named_as_in_the_file_and_never_recommended_itself() -> None:
    found = complaint("image_tokenizer.model={kind: vqvae, quantizer: {kind: fsq, codebook_size: 8}}")
    assert "unknown key 'image_tokenizer.model.quantizer.codebook_size'; known here: channels, kind" in found


def test_a_misspelt_key_of_a_union_gets_its_neighbour_of_the_same_kind() -> None:
    assert "did you mean 'prepare.source.limit'?" in complaint("prepare.source={kind: openmoji, limits: 3}")
    assert "did you mean 'prepare.source.path'?" in complaint("prepare.source={kind: folder, paht: x, path: y}")


def test_a_section_without_its_kind_lists_the_kinds() -> None:
    assert "with a kind (folder, huggingface, openmoji, shapes, table" in complaint("prepare.source={path: x}")
    assert "'prepare.source': expected a section of keys, found 8" in complaint("prepare.source=8")


@pytest.mark.parametrize(
    "override",
    [
        "image_tokenizer.training.micro_batch_size=-8",
        "image_tokenizer.training.micro_batch_size=0",
        "transformer.training.betas=[0.9, 1.0]",
        "transformer.training.steps=-1",
        "seed=9223372036854775808",
        "prepare.shard_size=[]",
        "generate.new_prompts=[yes]",
    ],
)
def test_a_value_out_of_bounds_is_one_line_that_names_its_key(override: str) -> None:
    assert f"'{override.partition('=')[0]}" in complaint(override)


def test_a_long_wrong_value_is_cut() -> None:
    assert len(complaint(f"transformer.layers={'x' * 5000}")) < 500
