"""Models of order any and scale are served as raster ones are: the images of `smalti generate`, whoever else asks."""

from __future__ import annotations

import io
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import torch
from PIL import Image

from pipeline.config.generate import SamplingConfig
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.sampling.image_prompt import ImagePrompt, known_codes
from pipeline.sampling.pipeline import Pipeline
from tests.serving.client import Answer, ask, multipart, pngs
from tests.serving.conftest import serving


def pixels(answer: Answer) -> list[bytes]:
    return [Image.open(io.BytesIO(png)).tobytes() for png in pngs(answer)]


def changed(server: str, **fields: bytes) -> Answer:
    return ask(server, multipart(**fields), "v1/images/edits", "multipart/form-data; boundary=b")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def test_a_model_of_order_any_draws_in_the_passes_that_are_asked_for(any_order: Path) -> None:
    sampling = SamplingConfig(passes=4, pass_order="halton", guidance=2.0)
    expected = Pipeline.from_pretrained(any_order).generate(["joker"], candidates=2, sampling=sampling)
    asked = {"prompt": "joker", "seed": 0, "n": 2, "passes": 4, "pass_order": "halton", "guidance": 2.0}
    with serving(any_order, "--slots", "8") as (server, _), ThreadPoolExecutor(6) as pool:
        bodies = [asked, asked | {"passes": 16}, {"prompt": "cat", "seed": 3, "schedule": "linear"}] * 2
        alone = [pngs(ask(server, body)) for body in bodies]
        assert list(pool.map(lambda body: pngs(ask(server, body)), bodies)) == alone
        assert [Image.open(io.BytesIO(png)).tobytes() for png in alone[0]] == [one.image.tobytes() for one in expected]
        assert alone[0] != alone[1]
        client = openai.OpenAI(base_url=f"{server}v1", api_key="none", max_retries=0, timeout=60)
        stream = client.images.generate(prompt="joker", stream=True, partial_images=2, extra_body={"passes": 16})
        kinds = [event.type.rpartition(".")[2] for event in stream]
        assert kinds[-1] == "completed"
        assert "partial_image" in kinds
        for passes in (0, 17, 2**40, "4 or so", True):
            status, answer = ask(server, asked | {"passes": passes})
            assert (status, "passes" in json.dumps(answer)) == (400, True)


def test_a_hole_of_a_model_of_order_any_is_filled_as_by_smalti_generate_and_the_rest_stays(any_order: Path) -> None:
    pipeline = Pipeline.from_pretrained(any_order)
    image = pipeline.generate(["cat"], seed=1)[0].image
    mask = Image.new("L", image.size)
    mask.paste(255, (4, 4, 12, 12))  # in the middle
    prompt, sampling = ImagePrompt(image, mask=mask), SamplingConfig(passes=3, guidance=2.0)
    (expected,) = pipeline.generate(["joker"], seed=3, sampling=sampling, image_prompt=prompt)
    fields = {"prompt": b"joker", "seed": b"3", "passes": b"3", "guidance": b"2", "codes": b"true"}
    with serving(any_order) as (server, _):
        answer = changed(server, image=png(image), mask=png(mask), **fields)
        assert pixels(answer) == [expected.image.tobytes()]
        assert changed(server, image=png(image), mask=png(mask), prompt=b"joker", passes=b"99")[0] == 400
    data = answer[1]["data"]
    assert isinstance(data, list)
    known = known_codes(pipeline.image_tokenizer, prompt, torch.device("cpu"))
    (codes,) = data[0]["codes"]
    assert 0 < int((known == UNKNOWN).sum()) < len(codes)
    assert all(code == own for code, own in zip(codes, known.tolist(), strict=True) if own != UNKNOWN)


def test_a_model_of_order_scale_draws_level_by_level(scale_order: Path) -> None:
    pipeline = Pipeline.from_pretrained(scale_order)
    sampling = SamplingConfig(guidance=2.0, temperature=1.5, temperature_end=0.5)
    expected = pipeline.generate(["joker"], candidates=2, sampling=sampling)
    asked = {"prompt": "joker", "seed": 0, "n": 2, "guidance": 2.0, "temperature": 1.5, "temperature_end": 0.5}
    with serving(scale_order, "--slots", "8") as (server, _), ThreadPoolExecutor(6) as pool:
        (model,) = json.load(urllib.request.urlopen(server + "v1/models"))["data"]
        assert model["smalti"]["order"] == "scale"
        bodies = [asked, asked | {"temperature_end": 1.5}, {"prompt": "cat", "seed": 3}] * 2
        alone = [pngs(ask(server, body)) for body in bodies]
        assert list(pool.map(lambda body: pngs(ask(server, body)), bodies)) == alone
        assert pixels(ask(server, asked)) == [one.image.tobytes() for one in expected]
        assert alone[0] != alone[1]
        finer = changed(server, image=png(expected[0].image), prompt=b"joker", keep_levels=b"1", seed=b"4")
        kept = ImagePrompt(expected[0].image, keep_levels=1)
        (varied,) = pipeline.generate(["joker"], seed=4, image_prompt=kept)
        assert pixels(finer) == [varied.image.tobytes()]
        status, answer = ask(server, asked | {"passes": 2})
        assert (status, "passes" in json.dumps(answer)) == (400, True)
