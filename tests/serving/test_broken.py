"""What a server does when drawing fails: `short_of_memory.py` says how it fails here."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.serving.client import Answer, ask, metric, pngs
from tests.serving.conftest import serving

_SHORT = "tests.serving.short_of_memory"


def test_a_step_that_runs_out_of_memory_costs_its_own_requests_alone(tiny_run: Path, server: str) -> None:
    with serving(tiny_run, module=_SHORT) as (short, process):
        process.send_signal(signal.SIGUSR1)
        assert ask(short, {"prompt": "joker", "seed": 1})[0] == 500
        assert metric(short, "smalti_drawn_images ") == 0
        assert pngs(ask(short, {"prompt": "joker", "seed": 1})) == pngs(ask(server, {"prompt": "joker", "seed": 1}))


def test_a_server_that_cannot_draw_any_more_answers_everybody_and_ends_with_1(tiny_run: Path) -> None:
    def asked(server: str) -> Answer:
        return ask(server, {"prompt": "joker", "n": 2, "guidance": 1})

    options = ("--slots", "2", "--timeout", "20")
    with serving(tiny_run, *options, module=_SHORT, BATCHES="1") as (server, process), ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(asked, server) for _ in range(3)]
        while metric(server, "smalti_drawn_images ") < 2 or metric(server, "smalti_waiting_requests ") < 2:
            assert not any(answer.done() for answer in answers), answers
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 1
        assert sorted(answer.result()[0] for answer in answers) == [500, 503, 503]
        assert process.stderr is not None
        assert "drawing cannot go on" in process.stderr.read().splitlines()[-1]
