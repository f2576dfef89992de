"""evaluate and report over a small real run: what is measured, and a page that is one file."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.graph import PipelineConfig
from pipeline.runs import RunDirectory
from stages import evaluate, report
from tests import miniature_run

Finished = tuple[RunDirectory, PipelineConfig]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    runs = tmp_path_factory.mktemp("runs")
    config = miniature_run.config(runs, pictures=70, image_size=32, samples=24, inception_splits=4, kid_subsets=5)
    run = miniature_run.make(config, steps=12)
    evaluate.main(miniature_run.stage_run(run, config, "evaluate"))
    (run.stage("evaluate") / "timing.json").write_text('{"wall_time_s": 3.25}')
    report.main(miniature_run.stage_run(run, config, "report"))
    return run, config


@pytest.fixture(scope="module")
def figures(finished: Finished) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((finished[0].stage("evaluate") / "metrics.json").read_text())
    return content


@pytest.fixture(scope="module")
def page(finished: Finished) -> str:
    return (finished[0].stage("report") / "index.html").read_text()


class References(HTMLParser):
    """Everything that a browser would load, and every link."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            if name in {"href", "src", "xlink:href", "srcset", "data"} and value:
                (self.links if tag == "a" else self.loaded).append(value)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_every_row_names_extractor_weights_resize_and_counts(figures: dict[str, Any]) -> None:
    for row in figures["rows"]:
        assert row["n_generated"] > 0
        assert row["value"] is not None or row["warning"]
        if "Lite0" in row["metric"]:
            assert row["extractor"] == "efficientnet-lite0"
            assert len(row["weights_sha256"]) == 64
            assert "128 × 128" in row["resize"]


def test_nothing_is_called_fid_without_inception(figures: dict[str, Any], page: str) -> None:
    assert not [row["metric"] for row in figures["rows"] if "FID" in row["metric"]]
    assert "FD (Lite0)" in page


def test_sets_are_compared_at_equal_n(figures: dict[str, Any]) -> None:
    rows = [row for row in figures["rows"] if row["metric"] == "FD (Lite0)"]
    assert len(rows) == 3  # own, other, floor
    assert {(row["n_real"], row["n_generated"]) for row in rows} == {(24, 24)}
    assert all("24 samples for 1280 feature dimensions" in row["warning"] for row in rows)


def test_pictures_of_the_same_captions_are_nearer_than_others(figures: dict[str, Any]) -> None:
    own, other, floor = [row["value"] for row in figures["rows"] if row["metric"] == "FD (Lite0)"]
    assert own < other
    assert floor > 0


def test_measuring_again_gives_the_same_bytes(finished: Finished) -> None:
    run, config = finished
    path = run.stage("evaluate") / "metrics.json"
    before = path.read_bytes()
    evaluate.main(miniature_run.stage_run(run, config, "evaluate"))
    assert path.read_bytes() == before


def test_page_loads_nothing_from_anywhere(page: str) -> None:
    references = References(page)
    assert len(references.loaded) > 20
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in references.loaded)
    assert references.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert "@import" not in page
    assert "url(http" not in page
    assert all("creativecommons.org" in link or "openmoji.org" in link for link in references.links)


def test_page_tells_the_run(finished: Finished, figures: dict[str, Any], page: str) -> None:
    text = " ".join("".join(References(page).text).split())
    for entry in figures["nearest"]:
        assert entry["prompt"] in text
        assert f"nearest: {entry['caption']}" in text
    for expected in ("CC BY-SA 4.0", "mostly reproduces them", "3.2 s", "codebook_size: 256", "New prompts", "PSNR"):
        assert expected in text


def test_page_is_a_function_of_its_inputs(finished: Finished) -> None:
    run, config = finished
    pages = set()
    for _ in range(2):
        report.main(miniature_run.stage_run(run, config, "report"))
        pages.add((run.stage("report") / "index.html").read_text())
    assert len(pages) == 1


def test_ids_of_plots_do_not_clash(page: str) -> None:
    class Ids(HTMLParser):
        found: list[str] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.found += [value for name, value in attributes if name == "id" and value and tag == "clippath"]

    Ids().feed(page)
    assert len(Ids.found) == len(set(Ids.found)) > 1


def test_samples_of_another_run_are_found(finished: Finished, tmp_path: Path) -> None:
    from pipeline.data.shards import Sample, write_shard
    from pipeline.metrics.pictures import named_pictures

    run, config = finished
    key, picture = next(named_pictures(run.stage("generate") / "samples"))
    picture.save(tmp_path / "a.png")
    other = RunDirectory(tmp_path / "other")
    other.path.mkdir()
    for name in ("prepare", "image-tokenizer"):
        other.stage(name).symlink_to(run.stage(name))
    samples = [Sample(f"stranger-{key}", (tmp_path / "a.png").read_bytes(), "caption", {})]
    write_shard(other.stage("generate") / "samples" / "000000.tar", samples)
    with pytest.raises(UserError, match=r"expected keys of prepared pictures, found 'stranger-"):
        evaluate.main(miniature_run.stage_run(other, config, "evaluate"))
