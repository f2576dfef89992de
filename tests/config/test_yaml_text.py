"""What YAML text and overrides mean: nothing is lost, and what is no number stays text."""

from pathlib import Path

import pytest

from pipeline.config.base import Config, load_config
from pipeline.config.yaml_text import read_value, read_yaml
from pipeline.core.errors import UserError


class Section(Config):
    layers: int = 4
    rate: float = 1.0
    title: str | None = None


class Whole(Config):
    name: str = "demo"
    transformer: Section = Section()
    prompts: list[str] = []


def load(folder: Path, text: str, *overrides: str) -> Whole:
    file = folder / "config.yaml"
    file.write_bytes(text.encode())
    return load_config(Whole, file, overrides)


def test_a_section_that_stands_twice_is_an_error_with_both_lines(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'transformer' stands twice, in lines 2 and 5; keep one"):
        load(tmp_path, "name: a\ntransformer:\n  layers: 2\nprompts: []\ntransformer:\n  rate: 1\n")


def test_a_key_that_stands_twice_within_a_section_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'layers' stands twice, in lines 2 and 3"):
        load(tmp_path, "transformer:\n  layers: 2\n  layers: 3\n")
    with pytest.raises(UserError, match=r"'layers' stands twice, in line 1"):
        load(tmp_path, "transformer: {layers: 2, layers: 3}\n")


def test_a_merged_section_may_be_overridden(tmp_path: Path) -> None:
    assert read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n", "here") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 3, "y": 2},
    }


@pytest.mark.parametrize(
    "title",
    ["Run #5 of May", "a: b", "it's", "'Tis", "*stars*", "&co", "!bang", "%x", "@home", "- dash", "2024_01_05",
     "12:30:00", "2024-01-05", "infinity", "a=b", "…", "!", "=", "<<", "&", "*"],
)  # fmt: skip
def test_an_overrides_text_is_taken_as_it_is(tmp_path: Path, title: str) -> None:
    assert load(tmp_path, "", f"transformer.title={title}").transformer.title == title


def test_an_overrides_values_are_those_of_yaml() -> None:
    found = [
        read_value(text, "it") for text in ("8", "-1.5", "2e-3", "1e5", "true", "null", "", "~", "[a, 2]", "{a: 1}")
    ]
    assert found == [8, -1.5, 0.002, 1e5, True, None, None, None, ["a", 2], {"a": 1}]
    assert read_value("'8'", "it") == "8"
    assert read_value('"a b"', "it") == "a b"


def test_a_name_that_looks_like_a_date_is_text(tmp_path: Path) -> None:
    assert load(tmp_path, "name: 2024_01_05\n").name == "2024_01_05"
    assert load(tmp_path, "name: 2024-01-05\n").name == "2024-01-05"
    assert load(tmp_path, "", "name=2024_01_05").name == "2024_01_05"
    assert load(tmp_path, "transformer: {layers: 1_000}\n").transformer.layers == 1000


@pytest.mark.parametrize(("written", "hint"), [("yes", "'yes'"), ("no", "'no'"), ("8", "'8'"), ("1.5", "'1.5'")])
def test_a_prompt_that_yaml_reads_as_a_value_says_that_it_needs_quotes(tmp_path: Path, written: str, hint: str) -> None:
    with pytest.raises(UserError, match=rf"'prompts.1': expected text, found .*: put it in quotes.*{hint}"):
        load(tmp_path, f"prompts:\n- red heart\n- {written}\n")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]\n",
        "[" * 5000,
        "a: 2024-99-99\nb: [\n",
        f"seed: {'9' * 5000}\n",
        "\n".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9) if i else 1}]" for i in range(12)),
        '"\\ud800": 1\n',
        "? [a]\n: 1\n",
        "!!python/object/apply:os.getcwd []\n",
        "a: \x00\n",
        "- a list\n",
        "1: 2\n",
    ],
)
def test_no_yaml_ends_in_a_traceback(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeffname: a\n").name == "a"


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", ".inf", "-.inf"])
def test_an_infinite_number_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match=r"'transformer.rate': .*finite number"):
        load(tmp_path, "", f"transformer.rate={value}")


def test_an_integer_that_no_computer_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'transformer.layers': expected integers below 2\*\*63"):
        load(tmp_path, "", f"transformer.layers={2**63}")
