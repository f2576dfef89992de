"""RANK and its like, left in the environment by something else, change nothing of a stage."""

import logging

import pytest

from pipeline.core import distributed


@pytest.mark.parametrize("joins", [True, False])
def test_a_rank_left_in_the_environment_is_ignored_with_a_line(joins: bool, caplog: pytest.LogCaptureFixture) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    with caplog.at_level(logging.WARNING):
        distributed.forget_leftovers(environment, joins)
    assert environment == ({} if joins else {"LOCAL_RANK": "1"})  # tasks of an array choose their GPU by it
    assert "ignored" in caplog.text


def test_a_launchers_own_variables_stay() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "80"}
    distributed.forget_leftovers(environment, joins=True)
    assert environment["RANK"] == "1"
