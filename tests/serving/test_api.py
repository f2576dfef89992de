"""Promises of pipeline/serving/: OpenAI's clients work, the same request gets the same bytes, nothing breaks."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from PIL import Image

from pipeline.sampling.model_source import newest_step
from pipeline.serving.nearest import NearestImages
from tests.conftest import NO_TRACKING
from tests.launch import command, environment, launch
from tests.serving.client import Answer, ask, metric, multipart, pngs
from tests.serving.conftest import serving


@pytest.fixture(scope="session")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}v1", api_key="none", max_retries=0, timeout=60)


def test_images_are_the_files_of_smalti_generate(server: str, tiny_run: Path, tmp_path: Path) -> None:
    launch("pipeline", "generate", str(tiny_run), "red joker", "-n", "3", "--seed", "7", "-o", str(tmp_path / "images"))
    expected = [(tmp_path / "images" / f"000000-{j:02d}.png").read_bytes() for j in range(3)]
    assert pngs(ask(server, {"prompt": "red joker", "n": 3, "seed": 7})) == expected


def test_bytes_are_the_same_at_any_concurrency(server: str) -> None:
    asked = [
        {"prompt": prompt, "seed": seed, "n": 1 + seed % 2, "guidance": guidance, "top_k": 5 + seed}
        for seed, prompt in enumerate(["joker", "a red cat with a very long name", "Brazil"])
        for guidance in (1.0, 2.0)
    ]
    alone = [pngs(ask(server, one)) for one in asked]
    with ThreadPoolExecutor(len(asked) * 2) as pool:
        together = list(pool.map(lambda one: pngs(ask(server, one)), asked * 2))
    assert together == alone * 2


def test_openais_client_generates_streams_and_edits(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    whole = client.images.generate(model=model.id, prompt="joker", n=2, size="16x16", extra_body={"seed": 1})
    assert whole.data is not None
    assert whole.usage is not None
    content = [base64.b64decode(one.b64_json or "") for one in whole.data]
    assert [Image.open(io.BytesIO(png)).size for png in content] == [(16, 16)] * 2

    stream = client.images.generate(
        model=model.id, prompt="joker", stream=True, partial_images=2, extra_body={"seed": 1}
    )
    last = list(stream)[-1]
    assert last.type == "image_generation.completed"
    assert base64.b64decode(last.b64_json) != content[0]  # its metadata says one candidate, not two
    pixels = [Image.open(io.BytesIO(png)).tobytes() for png in (base64.b64decode(last.b64_json), content[0])]
    assert pixels[0] == pixels[1]

    mask = Image.new("RGBA", (16, 16), "black")
    mask.paste((0, 0, 0, 0), (0, 8, 16, 16))
    file = io.BytesIO()
    mask.save(file, "png")
    edited = client.images.edit(
        image=("a.png", content[0]),
        mask=("m.png", file.getvalue()),
        prompt="joker",
        extra_body={"seed": 4, "codes": True},
    )
    again = client.images.edit(
        image=("a.png", content[0]), prompt="joker", extra_body={"seed": 4, "codes": True, "keep_rows": 2}
    )
    assert edited.data is not None
    assert again.data is not None
    codes = [one.model_dump()["codes"] for one in (edited.data[0], again.data[0])]
    assert codes[0] == codes[1]  # a mask of the lower half is to keep the upper half
    url = client.images.generate(prompt="joker", response_format="url", extra_body={"seed": 1}).data
    assert url is not None
    assert url[0].url is not None
    assert urllib.request.urlopen(url[0].url).read() == base64.b64decode(last.b64_json)


def test_nearest_training_images_are_those_of_the_run(tiny_run: Path, server: str, any_order: Path) -> None:
    def nearest(content: bytes) -> list[dict[str, Any]]:
        form = multipart(image=content), "v1/images/nearest", "multipart/form-data; boundary=b"
        status, answer = ask(server, *form)
        assert status == 200, answer
        found = answer["data"]
        assert isinstance(found, list)
        assert [one["distance"] for one in found] == sorted(one["distance"] for one in found)
        return found

    first, *others = nearest(next((tiny_run / "generate").glob("prompts/*.png")).read_bytes())
    itself, *_ = nearest(base64.b64decode(first["b64_json"]))
    assert (itself["caption"], itself["b64_json"]) == (first["caption"], first["b64_json"])
    assert itself["distance"] < 0.1 < first["distance"] <= others[0]["distance"]
    assert ask(server, multipart(image=b"no image"), "v1/images/nearest", "multipart/form-data; boundary=b")[0] == 400
    assert NearestImages.of_run(any_order, torch.device("cpu")) is None  # an export tells nothing of its data


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "png")
    return file.getvalue()


BAD_FIELDS: list[dict[str, object]] = [
    {"prompt": ""}, {"prompt": "\u200b"}, {"prompt": "x" * 4001}, {"prompt": 3}, {"prompt": "\ud800"}, {},
    {"n": 0}, {"n": 11}, {"n": True}, {"n": 1e300}, {"size": "1024x1024"}, {"seed": -1}, {"seed": 2**63},
    {"temperature": -1}, {"temperature": float("nan")}, {"top_k": 65}, {"top_p": 0}, {"min_p": 2}, {"guidance": 101},
    {"guidance_interval": [1, 0]}, {"rank": True}, {"unknown": 1}, {"partial_images": 999}, {"output_format": "jpeg"},
    {"n": 3, "guidance": 2.0}, {"passes": 4}, {"pass_order": "halton"},
]  # fmt: skip


def test_malformed_requests_are_answered_in_one_line(server: str) -> None:
    asked = [{"prompt": "joker"} | fields if fields else {} for fields in BAD_FIELDS]
    answers = [ask(server, one) for one in asked]
    answers += [ask(server, body) for body in (b"", b"{", b"[]", b'{"prompt": "\xff"}', b"null", b"[" * 100_000)]
    for fields in (
        {"prompt": b"joker"}, {"prompt": b"joker", "image": b"no image", "keep_rows": b"1"},
        {"prompt": b"joker", "image": bomb(), "keep_rows": b"1"}, {"prompt": b"joker", "image": b"", "mask": b""},
        {"prompt": b"joker", "image": b"/etc/passwd"}, {"image": b"x"}, {"prompt": b"\xff", "image": b"x"},
    ):  # fmt: skip
        answers.append(ask(server, multipart(**fields), "v1/images/edits", "multipart/form-data; boundary=b"))
    answers.append(ask(server, b"--", "v1/images/edits", "multipart/form-data; boundary=b"))
    answers.append(ask(server, b"{}", "v1/images/edits"))
    for status, answer in answers:
        assert 400 <= status < 500, answer
        error = answer["error"]
        assert isinstance(error, dict)
        assert not {"\n", "/"} & set(error["message"]), error
    assert ask(server, b" " * (2**23 + 1))[0] == 413
    assert ask(server, {"prompt": "joker", "model": "gpt"})[0] == 404
    assert ask(server, {"prompt": "joker"}, origin="http://elsewhere.example")[0] == 403
    assert ask(server, {"prompt": "joker"}, host="elsewhere.example")[0] == 403


def test_a_client_that_is_gone_frees_its_place(long_images: Path) -> None:
    body = json.dumps({"prompt": "joker", "n": 2, "guidance": 1}).encode()
    path = "/v1/images/generations"
    with serving(long_images, "--slots", "2") as (server, _):
        host, port = server.removeprefix("http://").strip("/").split(":")
        head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        with ExitStack() as clients:
            for _ in range(4):
                client = clients.enter_context(socket.create_connection((host, int(port))))
                client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            while metric(server, "smalti_drawn_images ") < 2 or metric(server, "smalti_waiting_requests ") < 3:
                time.sleep(0.01)
        while metric(server, f'smalti_request_seconds_count{{path="{path}"}} ') < 4:
            time.sleep(0.01)
        assert metric(server, f'smalti_requests_total{{path="{path}",status="499"}} ') == 4
        while metric(server, "smalti_drawn_images ") or metric(server, "smalti_waiting_requests "):
            time.sleep(0.01)
        assert metric(server, "smalti_images_total ") == 0
        assert 0 < metric(server, "smalti_codes_total ") < 2 * 1024  # the first, which was not drawn to its end
        assert len(pngs(ask(server, {"prompt": "joker"}))) == 1


def test_a_stream_that_is_closed_in_the_middle_is_not_drawn_to_its_end(long_images: Path) -> None:
    with serving(long_images, "--slots", "2") as (server, _):
        client = openai.OpenAI(base_url=f"{server}v1", api_key="none", max_retries=0, timeout=60)
        stream = client.images.generate(prompt="joker", n=2, stream=True, partial_images=64)
        assert next(iter(stream)).type == "image_generation.partial_image"
        stream.close()
        while metric(server, "smalti_drawn_images "):
            time.sleep(0.01)
        assert 0 < metric(server, "smalti_codes_total ") < 2 * 1024
        assert metric(server, "smalti_images_total ") == 0


def test_a_full_queue_says_when_to_come_back(tiny_run: Path) -> None:
    with serving(tiny_run, "--slots", "1", "--waiting", "1") as (server, _), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: ask(server, {"prompt": "joker", "seed": seed}), range(24)))
        statuses = {status for status, _ in answers}
        assert statuses == {200, 429}, statuses
        metrics = urllib.request.urlopen(server + "metrics").read().decode()
        assert 'smalti_requests_total{path="/v1/images/generations",status="429"}' in metrics
        assert f"smalti_images_total {sum(status == 200 for status, _ in answers):.1f}" in metrics


def test_sigterm_finishes_what_runs_and_exits_with_0(tiny_run: Path) -> None:
    with serving(tiny_run, "--slots", "10", "--waiting", "8") as (server, process):
        assert ask(server, {"prompt": "joker"})[0] == 200
        answers: list[Answer] = []
        asking = [
            threading.Thread(target=lambda: answers.append(ask(server, {"prompt": "joker", "n": 10}))) for _ in range(3)
        ]
        for thread in asking:
            thread.start()
        while "smalti_drawn_images 10.0" not in urllib.request.urlopen(server + "metrics").read().decode():
            assert any(thread.is_alive() for thread in asking), answers
        process.send_signal(signal.SIGTERM)
        for thread in asking:
            thread.join()
        assert process.wait(30) == 0
        assert {status for status, _ in answers} <= {200, 503}
        assert 200 in {status for status, _ in answers}


def test_other_machines_need_a_token(tiny_run: Path, tmp_path: Path) -> None:
    said = launch("pipeline", "serve", str(tiny_run), "--host", "0.0.0.0", check=False)
    assert "--token-file" in said
    assert "Traceback" not in said
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    with serving(tiny_run, "--token-file", str(token)) as (server, _):
        assert ask(server, {"prompt": "joker"})[0] == 401
        assert ask(server, {"prompt": "joker"}, authorization="Bearer 0123456789abcdef")[0] == 200
        for path in ("", "app.js", "style.css", "health", "ready"):
            assert urllib.request.urlopen(server + path).status == 200


def test_the_first_view_of_the_page_is_small_and_names_nothing_that_lies_elsewhere(server: str) -> None:
    page = urllib.request.urlopen(server).read().decode()
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    own = [name for name in named if not name.startswith("data:")]
    assert sorted(own) == ["app.js", "style.css"]
    parts = [page.encode(), *(urllib.request.urlopen(server + name).read() for name in (*own, "v1/models"))]
    assert sum(map(len, parts)) < 200_000  # bytes
    for part in parts:
        assert not re.search(rb"https?://(?!www\.w3\.org)|url\(|@import", part)


def test_a_client_that_hangs_up_in_its_body_harms_nobody(server: str) -> None:
    host, port = server.removeprefix("http://").strip("/").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(
            f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 99\r\n\r\n{{".encode()
        )
        slow.shutdown(socket.SHUT_WR)  # half closed
        time.sleep(0.1)
    assert ask(server, {"prompt": "joker"})[0] == 200


def test_a_run_in_training_is_served_from_its_newest_checkpoint(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("transformer", "generate", "evaluate", "report"))
    assert newest_step(run) is None
    training = ["--config", str(run / "config.yaml"), NO_TRACKING, "transformer.training.steps=1000000"]
    trainer = subprocess.Popen(command("stages.transformer", training), env=environment(), stderr=subprocess.DEVNULL)
    try:
        while not list(run.glob("transformer/checkpoints/step-????????/manifest.json")):
            assert trainer.poll() is None
            time.sleep(0.05)
        with serving(run) as (server, _):
            assert trainer.poll() is None
            (model,) = json.load(urllib.request.urlopen(server + "v1/models"))["data"]
            step = model["smalti"]["training_step"]
            assert (run / f"transformer/exported/step-{step:08d}").is_dir()
            assert len(pngs(ask(server, {"prompt": "joker"}))) == 1
    finally:
        trainer.kill()
        trainer.wait()
    *_, newest = sorted(run.glob("transformer/checkpoints/step-????????/manifest.json"))
    (newest.parent / "trainer.json").write_text("damaged")
    older = newest_step(run)
    assert older is not None
    assert step <= older < int(newest.parent.name[5:])


def test_after_kill_9_in_the_middle_of_requests_the_same_port_serves_at_once(tiny_run: Path) -> None:
    with serving(tiny_run) as (server, killed), ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, server, {"prompt": "joker", "n": 10}) for _ in range(4)]
        while metric(server, "smalti_drawn_images") == 0:
            assert not all(one.done() for one in asking)
        killed.kill()
        assert any(isinstance(one.exception(60), (OSError, http.client.HTTPException)) for one in asking)
        port = server.rstrip("/").rpartition(":")[2]
        with serving(tiny_run, "--port", port) as (again, _):
            assert again == server
            assert len(pngs(ask(again, {"prompt": "joker"}))) == 1
