"""How a request ends that takes too long, and a server that is asked twice."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.serving.client import Answer, ask, metric, pngs
from tests.serving.conftest import serving


def test_a_body_that_never_ends_is_answered_with_408(tiny_run: Path) -> None:
    with serving(tiny_run, module="tests.serving.impatient") as (server, _):
        host, port = server.removeprefix("http://").strip("/").split(":")
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 99\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            slow.sendall(f"{head}{{".encode())
            answer = http.client.HTTPResponse(slow)
            answer.begin()
            assert (answer.status, answer.headers["connection"]) == (408, "close")
            assert json.load(answer)["error"]["message"] == "body: expected all of it within 0.2 s"
        assert metric(server, 'smalti_requests_total{path="other",status="408"} ') == 1
        assert len(pngs(ask(server, {"prompt": "joker"}))) == 1


def test_requests_over_their_time_get_503_whether_they_are_drawn_or_wait(long_images: Path) -> None:
    def asked(_: int) -> Answer:
        return ask(server, {"prompt": "joker", "n": 2, "guidance": 1})

    options = ("--slots", "2", "--timeout", "2")
    with serving(long_images, *options) as (server, process), ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(asked, number) for number in range(2)]
        while metric(server, "smalti_drawn_images ") < 2 or metric(server, "smalti_waiting_requests ") < 1:
            assert not any(answer.done() for answer in answers), answers
        process.send_signal(signal.SIGSTOP)  # as slow as it gets
        time.sleep(2.1)
        process.send_signal(signal.SIGCONT)
        for status, answer in (one.result() for one in answers):
            error = answer["error"]
            assert isinstance(error, dict)
            assert (status, error["code"]) == (503, "timeout")
            assert "expected to be done within 2 s" in error["message"]
        assert metric(server, "smalti_drawn_images ") == metric(server, "smalti_images_total ") == 0
        assert metric(server, "smalti_codes_total ") < 2 * 1024


def test_a_second_signal_ends_what_is_drawn(long_images: Path) -> None:
    def asked() -> Answer:
        return ask(server, {"prompt": "joker", "n": 10, "guidance": 1})

    with serving(long_images, "--slots", "10") as (server, process), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(asked)
        while metric(server, "smalti_drawn_images ") < 10:
            assert not answer.done(), answer
        process.send_signal(signal.SIGTERM)
        while _is_there(server):
            assert not answer.done(), answer
        process.send_signal(signal.SIGTERM)
        cut_off = (OSError, http.client.HTTPException, json.JSONDecodeError)  # uvicorn says it in plain text
        assert isinstance(answer.exception(60), cut_off)  # with the first signal alone it gets all ten images
        assert process.wait(30) == 0


def _is_there(server: str) -> bool:
    """Whether it takes connections, which ends with the first signal."""
    try:
        urllib.request.urlopen(server + "health", timeout=20)
    except (OSError, http.client.HTTPException):
        return False
    return True
