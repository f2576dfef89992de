"""Seeds are the same in every process, today and tomorrow: data and trained models depend on their bits."""

from pipeline.core.seeds import hash64, random_of


def test_seeds_are_those_of_earlier_runs() -> None:
    assert hash64("split", "cat") == 0xEDF50E9C57C538B6
    assert hash64(0, 1, 2) == 0xF1900605D6333D88
    assert random_of("crop", 0, "cat").random() == 0.4690482378285863


def test_a_key_that_is_not_utf_8_has_a_seed() -> None:
    assert hash64("crop", "\udce9") != hash64("crop", "\udcea")
