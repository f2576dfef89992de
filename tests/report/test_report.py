"""evaluate and report over a small real run: what is measured, and a page that is one file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from mlflow import MlflowClient
from PIL import Image

from pipeline.config.base import flatten
from pipeline.config.evaluate import SweepConfig
from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core.errors import UserError
from pipeline.data.shards import Sample, read_samples, write_shard
from pipeline.evaluation import feature_store
from pipeline.evaluation.results import read_results
from pipeline.orchestration.graph import inputs_of, stage_named, stages_of
from pipeline.orchestration.mlflow_store import default_uri
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.orchestration.stage_run import StageRun
from pipeline.orchestration.tracking import Tracker
from pipeline.report.build import build_report
from pipeline.sampling.pipeline import Pipeline
from pipeline.slurm.supervisor.record import progress
from stages import evaluate, report
from tests.extractors.tiny_clip import save_clip
from tests.launch import launch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The thread count of the tiny run's processes: another number sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config(tiny_run: Path) -> PipelineConfig:
    return load_pipeline(tiny_run / "config.yaml")


@pytest.fixture(scope="module")
def metrics(tiny_run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tiny_run / "evaluate" / "metrics.json").read_text())
    return content


@pytest.fixture(scope="module")
def page(tiny_run: Path) -> str:
    return (tiny_run / "report" / "index.html").read_text()


def again(
    tiny_run: Path,
    tmp_path: Path,
    config: PipelineConfig,
    name: str,
    *but: str,
    array_task: tuple[int, int] | None = None,
) -> StageRun:
    """The stage `name` of the tiny run once more, in a run directory of its own; inputs in `but` are left out."""
    run = RunDirectory(tmp_path / "again")
    run.path.mkdir(exist_ok=True)
    for other in ("config.yaml", *inputs_of(config, stage_named(name))):
        if other not in but and not (run.path / other).exists():
            (run.path / other).symlink_to(tiny_run / other)
    run.stage(name).mkdir(exist_ok=True)
    return StageRun(config, stage_named(name), run, Tracker(run.stage(name), None), array_task)


def inputs_of_report(run: Path, config: PipelineConfig) -> dict[str, Path]:
    return {name: run / name for name in inputs_of(config, stage_named("report"))}


def generated(directory: Path, samples: list[Sample]) -> None:
    """What the stage generate leaves, with these samples as what it generated."""
    write_shard(directory / "samples" / "000000.tar", samples)
    (directory / "prompts.json").write_text("[]")


def changed(config: PipelineConfig, **evaluate: Any) -> PipelineConfig:
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=evaluate)})


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


def test_every_row_names_extractor_weights_resize_and_counts(metrics: dict[str, Any]) -> None:
    for row in metrics["rows"]:
        assert row["n_generated"] > 0
        assert row["value"] is not None or row["warning"]
        if "Lite0" in row["metric"]:
            assert row["extractor"] == "efficientnet-lite0"
            assert len(row["weights_sha256"]) == 64
            assert "128 × 128" in row["resize"]


def test_nothing_is_called_fid_without_inception(metrics: dict[str, Any], page: str) -> None:
    assert not [row["metric"] for row in metrics["rows"] if "FID" in row["metric"]]
    assert "FD (Lite0)" in page


def test_sets_are_compared_at_equal_n(metrics: dict[str, Any]) -> None:
    rows = [row for row in metrics["rows"] if row["metric"] == "FD (Lite0)"]
    assert len(rows) == 3  # own, other, floor
    assert {(row["n_real"], row["n_generated"]) for row in rows} == {(32, 32)}
    assert all("32 samples for 1280 feature dimensions" in row["warning"] for row in rows)


def test_measuring_again_gives_the_same_bytes(tiny_run: Path, tmp_path: Path, config: PipelineConfig) -> None:
    evaluate.main(again(tiny_run, tmp_path, changed(config, feature_cache=tmp_path / "cache"), "evaluate"))
    measured = tmp_path / "again" / "evaluate" / "metrics.json"
    assert measured.read_bytes() == (tiny_run / "evaluate" / "metrics.json").read_bytes()


def test_reconstructions_carry_intervals(metrics: dict[str, Any]) -> None:
    rows = [row for row in metrics["rows"] if row["compares"].endswith("their reconstructions")]
    assert {row["metric"] for row in rows} == {"PSNR (dB)", "SSIM", "rFD (Lite0)"}
    assert all(row["interval"][0] <= row["value"] <= row["interval"][1] for row in rows)
    assert all("bootstraps" in row["interval_of"] for row in rows)


def test_copies_of_training_images_show_as_copies(tiny_run: Path, tmp_path: Path, config: PipelineConfig) -> None:
    samples = list(read_samples(tiny_run / "prepare", "train"))[:24]
    run = again(tiny_run, tmp_path, config, "evaluate", "generate")
    generated(run.input("generate"), samples)
    evaluate.main(run)
    rows = json.loads((run.directory / "metrics.json").read_text())["rows"]
    own, other, floor = [row["value"] for row in rows if row["metric"] == "FD (Lite0)"]
    assert own == pytest.approx(0, abs=1e-4)
    assert other == pytest.approx(floor)
    assert floor > 1
    copied, unseen = [row["value"] for row in rows if "nearest training image" in row["metric"]]
    assert copied < 1e-3 * unseen


def test_page_loads_nothing_from_anywhere(page: str) -> None:
    references = References(page)
    assert {"figure", "figcaption", "table"} <= references.tags
    assert len(references.loaded) > 20
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in references.loaded)
    assert references.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert "@import" not in page
    assert "url(http" not in page
    assert all("creativecommons.org" in link or "openmoji.org" in link for link in references.links)


def test_page_tells_the_run(metrics: dict[str, Any], page: str) -> None:
    text = " ".join("".join(References(page).text).split())
    for entry in (*metrics["nearest"], *metrics["samples"]):
        assert entry["prompt"] in text
        assert f"nearest: {entry['caption']}" in text
    for expected in ("CC BY-SA 4.0", "mostly reproduces them", "codebook_size: 64", "New prompts", "PSNR", "At random"):
        assert expected in text


def test_page_is_a_function_of_its_inputs(
    tiny_run: Path, tmp_path: Path, config: PipelineConfig, page: str, metrics: dict[str, Any]
) -> None:
    run = again(tiny_run, tmp_path, config, "report")
    report.main(run)
    assert (run.directory / "index.html").read_text() == page
    plots = sorted((run.directory / "plots").iterdir())
    grids = sorted((run.directory / "grids").iterdir())
    assert [path.stem for path in grids] == ["prompts-new", "prompts-training", "random"]
    assert len((run.directory / "metrics.csv").read_text().splitlines()) == 1 + len(metrics["rows"])
    assert json.loads((run.directory / "costs.json").read_text())["stages"]["transformer"]["wall_time_s"] > 0
    assert [path.name for path in plots if path.name.startswith("transformer-loss")]
    for path in plots:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    manifest = json.loads((tiny_run / "report" / "manifest.json").read_text())
    shown = {str(path.relative_to(run.directory)) for path in (*plots, *grids)}
    assert shown | {"index.html", "metrics.csv", "costs.json"} == set(manifest["outputs"])


def test_every_stage_that_trains_has_its_curves_the_reranker_too(
    tiny_run: Path, tmp_path: Path, config: PipelineConfig
) -> None:
    with_reranker = config.model_copy(update={"reranker": config.reranker.model_copy(update={"enabled": True})})
    reranker = tmp_path / "reranker"
    reranker.mkdir()
    logged = [{"step": step, "time": 0.0, "loss": 2.8 / step, "accuracy": 0.1 * step} for step in (1, 2, 3)]
    logged.append(
        {"step": 3, "time": 1.0, "val/image to text R@1": 0.5, "val/text to image R@1": 0.25, "val/samples": 8.0}
    )
    (reranker / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    report = build_report(inputs_of_report(tiny_run, with_reranker) | {"reranker": reranker}, with_reranker)
    for stage in stages_of(with_reranker):
        assert (f"plots/{stage.name}-loss.svg" in report.files) == stage.trains
    assert "plots/reranker-retrieval-on-the-validation-split.svg" in report.files
    assert "<h3>Reranker</h3>" in report.page
    assert "reranker" in json.loads(report.files["costs.json"])["stages"]


def test_a_stage_that_is_not_part_of_the_pipeline_is_not_on_the_page(
    tiny_run: Path, tmp_path: Path, config: PipelineConfig, page: str
) -> None:
    """Even where its directory is left over from another config."""
    run = again(tiny_run, tmp_path, config, "report")
    (tmp_path / "again" / "reranker").mkdir()
    (tmp_path / "again" / "reranker" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    report.main(run)
    assert (run.directory / "index.html").read_text() == page
    assert "<h3>Reranker</h3>" not in page


def test_results_that_an_earlier_version_wrote_are_shown(
    tiny_run: Path, tmp_path: Path, config: PipelineConfig
) -> None:
    results = json.loads((tiny_run / "evaluate" / "metrics.json").read_text())
    del results["scored_by"]
    (tmp_path / "metrics.json").write_text(json.dumps(results | {"judge": "CLIP score"}))
    assert read_results(tmp_path)["scored_by"] == "CLIP score"


def test_ids_of_plots_do_not_clash(page: str) -> None:
    class Ids(HTMLParser):
        found: list[str] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.found += [value for name, value in attributes if name == "id" and value and tag == "clippath"]

    Ids().feed(page)
    assert len(Ids.found) == len(set(Ids.found)) > 1


def test_samples_of_another_run_are_found(tiny_run: Path, tmp_path: Path, config: PipelineConfig) -> None:
    run = again(tiny_run, tmp_path, config, "evaluate", "generate")
    known = next(read_samples(tiny_run / "prepare", "train"))
    generated(run.input("generate"), [Sample(f"stranger-{known.key}", known.png, "caption", {})])
    with pytest.raises(UserError, match=r"expected keys of prepared images, found 'stranger-"):
        evaluate.main(run)


def test_array_tasks_share_the_features_and_the_stage_measures_the_same(
    tiny_run: Path, tmp_path: Path, config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "PART", 64)  # the batches, and so the bits, of the tiny run's own evaluation
    cached = changed(config, feature_cache=tmp_path / "cache")
    for task in ((0, 2), (1, 2)):
        evaluate.main(again(tiny_run, tmp_path, cached, "evaluate", array_task=task))
    sets = sorted(path for path in (tmp_path / "cache").iterdir())
    assert sorted(len(list(path.glob("part-*.npz"))) for path in sets) == [1, 1, 3]  # 179 training images
    run = again(tiny_run, tmp_path, cached, "evaluate")
    assert not (run.directory / "metrics.json").exists()
    evaluate.main(run)
    whole, shared = (
        flatten(json.loads((folder / "metrics.json").read_text())) for folder in (tiny_run / "evaluate", run.directory)
    )
    # BLAS adds in an order that depends on where in memory a process happens to have its arrays.
    assert shared.keys() == whole.keys()
    for key, value in whole.items():
        assert shared[key] == (pytest.approx(value, rel=1e-9) if isinstance(value, float | list) else value), key


def test_best_and_worst_by_clip_are_shown(tiny_run: Path, tmp_path: Path, config: PipelineConfig) -> None:
    captions = [sample.caption for sample in read_samples(tiny_run / "prepare", "train")]
    clip = save_clip(tmp_path / "clip", captions)
    scored = changed(config, clip=str(clip), samples_shown=4, feature_cache=tmp_path / "cache")
    evaluate.main(again(tiny_run, tmp_path, scored, "evaluate", array_task=(0, 1)))
    sets = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/part-*.npz")}
    assert len(sets) == 5  # three for the metrics, two for CLIP
    run = again(tiny_run, tmp_path, scored, "evaluate")
    evaluate.main(run)
    measured = json.loads((run.directory / "metrics.json").read_text())
    scores = {group: [e["score"] for e in measured["samples"] if e["group"] == group] for group in ("best", "worst")}
    assert min(scores["best"]) >= max(scores["worst"])
    assert {"CLIP score (CLIP)", "R@5 (CLIP)"} <= {row["metric"] for row in measured["rows"]}
    report = build_report(inputs_of_report(tiny_run, scored) | {"evaluate": run.directory}, scored)
    text = " ".join("".join(References(report.page).text).split())
    assert "the best and the worst of those by CLIP score" in text
    assert "Lite0: features of efficientnet-lite0" in text
    assert "CLIP: features of clip" in text
    assert {"grids/best.png", "grids/worst.png"} <= report.files.keys()


def test_best_and_worst_by_the_reranker_are_shown(tiny_run: Path, tmp_path: Path, config: PipelineConfig) -> None:
    samples = list(read_samples(tiny_run / "prepare", "train"))[:12]
    run = again(tiny_run, tmp_path, changed(config, samples_shown=4), "evaluate", "generate")
    scored = [Sample(s.key, s.png, s.caption, {"score": float(i)}) for i, s in enumerate(samples)]
    generated(run.input("generate"), scored)
    evaluate.main(run)
    measured = json.loads((run.directory / "metrics.json").read_text())
    assert measured["scored_by"] == "the reranker"
    groups = {group: [e["score"] for e in measured["samples"] if e["group"] == group] for group in ("best", "worst")}
    assert groups == {"best": [11.0, 10.0], "worst": [0.0, 1.0]}


def test_what_the_page_shows_is_an_artifact(tiny_run: Path) -> None:
    def artifacts(stage: str) -> set[str]:
        record = json.loads((tiny_run / stage / "mlflow.json").read_text())
        client, found, folders = MlflowClient(record["uri"] or default_uri(tiny_run)), set[str](), [""]
        for folder in folders:
            for entry in client.list_artifacts(record["run_id"], folder or None):
                (folders.append if entry.is_dir else found.add)(entry.path)
        return found

    for stage in ("evaluate", "report"):
        outputs = json.loads((tiny_run / stage / "manifest.json").read_text())["outputs"]
        assert artifacts(stage) >= {*outputs, "config.yaml", "manifest.json"}
    assert {"prompts.png", "prompts/00.png"} <= artifacts("generate")


def test_best_setting_generates(tiny_run: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "run.json", "text-tokenizer", "image-tokenizer", "transformer"):
        (tmp_path / name).symlink_to(tiny_run / name)
    arguments = ("pipeline", "generate", str(tmp_path), "red joker", "--best", "-o", str(tmp_path / "out"))
    assert "expected the result of a sweep at" in launch(*arguments, check=False)
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "best.yaml").write_text(
        "generate: {sampling: {temperature: 0.0, top_k: 3, guidance: 1.0}}"
    )
    launch(*arguments)
    (generated,) = (path for path in (tmp_path / "out").glob("*.png") if path.name != "grid.png")
    recorded = "".join(Image.open(generated).text.values())  # type: ignore[attr-defined]
    assert '"temperature": 0.0' in recorded
    assert '"top_k": 3' in recorded


def test_sweep_tries_every_setting_and_writes_the_best(tiny_run: Path, tmp_path: Path, config: PipelineConfig) -> None:
    wanted = SweepConfig(temperature=[0.7, 1.0], top_k=[1, None], samples=16)
    swept = changed(config, sweep=wanted, feature_cache=tmp_path / "cache")
    evaluate.main(again(tiny_run, tmp_path, swept, "evaluate", array_task=(1, 2)))
    run = again(tiny_run, tmp_path, swept, "evaluate")
    shared = {path.name for path in (run.directory / "sweep").glob("*.tar")}
    assert shared == {f"guidance-1.0-temperature-{t}-top_k-all.tar" for t in (0.7, 1.0)}
    evaluate.main(run)
    sweep = json.loads((run.directory / "metrics.json").read_text())["sweep"]
    tried = [(setting["temperature"], setting["top_k"]) for setting in sweep["settings"]]
    assert tried == [(0.7, 1), (0.7, None), (1.0, 1), (1.0, None)]
    distances = [setting["metrics"]["FD (Lite0)"] for setting in sweep["settings"]]
    assert distances[0] == distances[2]  # of one code, temperature changes nothing
    assert len(set(distances)) == 3
    best = yaml.safe_load((run.directory / "best.yaml").read_text())["generate"]["sampling"]
    assert (best["temperature"], best["top_k"]) == tried[distances.index(min(distances))]
    tars = {path: path.stat().st_mtime_ns for path in (run.directory / "sweep").glob("*.tar")}
    assert len(tars) == 4
    evaluate.main(run)
    assert {path: path.stat().st_mtime_ns for path in tars} == tars  # generated once
    content = (first := min(tars)).read_bytes()
    write_shard(first, list(read_samples(tiny_run / "prepare", "val"))[:16])  # as of other captions
    evaluate.main(run)
    assert first.read_bytes() == content
    report = build_report(inputs_of_report(tiny_run, swept) | {"evaluate": run.directory}, swept)
    assert "Sampling settings" in report.page
    assert [name for name in report.files if name.startswith("plots/sweep-fd-against-is")]


def test_a_task_whose_sweep_is_cut_off_in_every_life_gets_on_by_a_setting_each(
    tiny_run: Path, tmp_path: Path, config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = SweepConfig(temperature=[0.7, 1.0, 1.3], samples=8)
    swept = changed(config, sweep=wanted, feature_cache=tmp_path / "cache")
    draw, seen = Pipeline.generate, []
    for _ in range(2):
        limit = iter([draw])  # the second setting meets the time limit
        monkeypatch.setattr(Pipeline, "generate", lambda *given, limit=limit, **more: next(limit)(*given, **more))
        run = again(tiny_run, tmp_path, swept, "evaluate", array_task=(0, 1))
        with pytest.raises(StopIteration):
            evaluate.main(run)
        seen.append(progress(run.directory, False, (0, 1)))
    assert seen == [3 + 2, 3 + 4]  # features of three sets; of each setting, its images and their features


def test_sweep_of_guidance_needs_caption_dropout(tiny_run: Path, tmp_path: Path, config: PipelineConfig) -> None:
    without = config.model_copy(update={"transformer": config.transformer.model_copy(update={"caption_dropout": 0.0})})
    run = again(tiny_run, tmp_path, changed(without, sweep=SweepConfig(guidance=[1, 3], samples=8)), "evaluate")
    with pytest.raises(UserError, match="guidance other than 1 needs a transformer trained with caption_dropout"):
        evaluate.main(run)
    run = again(tiny_run, tmp_path, changed(config, sweep=SweepConfig(samples=100)), "evaluate")
    with pytest.raises(UserError, match="at most half of the 179 training images"):
        evaluate.main(run)
