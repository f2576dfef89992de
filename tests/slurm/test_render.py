"""Cluster files and job files, as far as they go without a Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.pipeline import load_pipeline
from pipeline.core.errors import UserError
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.slurm import scheduler
from pipeline.slurm.cluster import load_cluster
from pipeline.slurm.render import JobFile, comment, render
from tests.conftest import STAGE_NAMES, TINY
from tests.launch import ROOT, launch
from tests.slurm.conftest import assert_clean

CLUSTERS = sorted((ROOT / "configs" / "cluster").glob("*.yaml"))


def _dry_run(folder: Path, cluster: Path, *more: str, check: bool = True) -> str:
    arguments = ["submit", str(TINY), f"runs={folder}", "--cluster", str(cluster), "--dry-run", *more]
    return launch("pipeline", *arguments, check=check)


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda path: path.stem)
def test_a_dry_run_writes_clean_scripts_and_submits_nothing(cluster: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with space & 'quote'"
    output = _dry_run(folder, cluster, "image_tokenizer.training.batch_size=64", "transformer.training.batch_size=64")
    scripts = sorted((folder / "tiny" / "slurm" / "dry-run").glob("*.sbatch"))
    assert {script.stem.removesuffix(".tasks") for script in scripts} == set(STAGE_NAMES)
    assert output.count("written: ") == len(scripts)
    assert_clean(scripts)
    assert not (folder / "tiny" / "slurm" / "jobs.json").exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("default: {tiem: '1'}", "unknown key 'default.tiem'; did you mean 'default.time'?"),
        ("default: {time: 40}", "in quotes"),
        ("default: {memory: 32 GB}", "expected a number with K, M, G or T"),
        ("default: {flags: ['exclusive']}", "expected options of sbatch such as --exclusive"),
        ("default: {flags: ['--output=mine.log']}", "--output is set by Smalti itself: leave it out"),
        ("default: {flags: ['-J mine']}", "--job-name is set by Smalti itself"),
        ("default: {flags: ['-a0-3']}", "--array is set by Smalti itself: set array instead"),
        ("default: {flags: ['--signal=USR1@60']}", "set stop_ahead_s instead"),
        ("default: {flags: ['--dependency=singleton']}", "--dependency is set by Smalti itself"),
        ("default: {flags: ['--no-requeue']}", "--no-requeue is set by Smalti itself"),
        ("default: {flags: ['--comment']}", "expected a comment as --comment=TEXT"),
        ("default: {flags: ['--time=1']}", "set time instead"),
        ('default: {flags: ["--exclusive\\nrm -rf /"]}', "expected text of one line"),
        ('default: {partition: "gpu\\nrm -rf /"}', "default.partition"),
        ('default: {account: "a b"}', "default.account"),
        ('python: "python\\nrm -rf /"', "expected text of one line"),
        ('launcher: [apptainer, "exec\\nrm"]', "expected text of one line"),
        ('stages: {prepare: {srun_flags: ["--a\\nb"]}}', "expected text of one line"),
        ("stages: {transfomer: {nodes: 2}}", "unknown stage 'transfomer'"),
        ("stages: {transformer: {array: 3}}", "transformer cannot be an array"),
    ],
)
def test_a_mistake_in_a_cluster_file_is_told_in_one_line(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=complaint.replace("?", r"\?")):
        load_cluster(tmp_path / "c.yaml")


def test_a_time_may_be_unlimited(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("default: {time: UNLIMITED}")
    assert load_cluster(tmp_path / "c.yaml").default.time == "UNLIMITED"


def test_a_comment_that_the_site_demands_stands_before_the_mark_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text("default: {flags: ['--comment=project:x y', --exclusive]}")
    cluster, stage, run = load_cluster(tmp_path / "c.yaml"), stage_named("prepare"), tmp_path / "a run"
    job = JobFile(stage, cluster.resources(stage))
    text = render(job, cluster, run, tmp_path, tmp_path)
    assert text.count("--comment=") == 1
    assert f'--comment="project:x y; smalti:prepare:{run}"' in text
    assert "#SBATCH --exclusive" in text
    answer = f"7|N/A|RUNNING|None|node1|1:00|{comment(job, run)}\n8|N/A|RUNNING|None|node1|1:00|smalti:prepare:/other\n"
    monkeypatch.setattr(scheduler, "call", lambda command: answer)
    assert [(found.id, found.script) for found in scheduler.jobs_of(run)] == [(7, "prepare")]


def test_a_dry_run_changes_nothing_that_is_read_as_truth(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{}")
    run = tmp_path / "tiny"
    config = load_pipeline(TINY, [f"runs={tmp_path}"])
    RunDirectory(run).open(config, "tiny.yaml")
    (run / "slurm").mkdir()
    (run / "slurm" / "cluster.yaml").write_text("{}")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    _dry_run(tmp_path, tmp_path / "c.yaml", "transformer.layers=3")
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path: content for path, content in after.items() if path.parent.name != "dry-run"} == before
    assert load_pipeline(run).transformer.layers == 2


def test_a_run_directory_may_have_spaces_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{}")
    cluster, stage = load_cluster(tmp_path / "c.yaml"), stage_named("prepare")
    text = render(JobFile(stage, cluster.resources(stage)), cluster, tmp_path / "a run", tmp_path, tmp_path)
    assert '#SBATCH --job-name="a run-prepare"' in text
    with pytest.raises(UserError, match="expected a path that an #SBATCH line can hold"):
        render(JobFile(stage, cluster.resources(stage)), cluster, tmp_path / "a\nrun", tmp_path, tmp_path)


def test_after_a_dry_run_the_directory_is_free_for_the_run(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{}")
    _dry_run(tmp_path, tmp_path / "c.yaml")
    RunDirectory(tmp_path / "tiny").check("tiny.yaml")


def test_stages_of_one_process_do_not_ask_for_several(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{default: {nodes: 4, gpus: 8}, stages: {evaluate: {nodes: 2}}}")
    cluster = load_cluster(tmp_path / "c.yaml")
    assert cluster.resources(stage_named("transformer")).world_size == 32
    assert cluster.resources(stage_named("prepare")).world_size == 1
    with pytest.raises(UserError, match=r"evaluate\.nodes is 2, expected 1"):
        cluster.resources(stage_named("evaluate"))


def test_a_stage_may_have_a_container_and_setup_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "{setup: [module load a], launcher: [apptainer, exec, a.sif], stages: {prepare: {setup: [module load b],"
        " launcher: [], srun_flags: [--container-image=b.sqsh]}}}"
    )
    cluster = load_cluster(tmp_path / "c.yaml")
    own, others = (
        render(JobFile(stage, cluster.resources(stage)), cluster, tmp_path, tmp_path, tmp_path)
        for stage in (stage_named("prepare"), stage_named("transformer"))
    )
    assert ("module load a" in own, "module load b" in own, "apptainer" in own) == (False, True, False)
    assert "--container-image=b.sqsh" in own
    assert ("module load a" in others, "apptainer exec a.sif" in others) == (True, True)
    assert "--container-image" not in others


def test_a_batch_that_the_processes_do_not_divide_is_told_before_the_queue(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("stages: {transformer: {nodes: 3}}")
    output = _dry_run(tmp_path, tmp_path / "c.yaml", check=False)
    assert "transformer: expected batch_size to be a multiple of 3 processes" in output


def test_a_stage_that_is_switched_off_is_no_job(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{}")
    assert "reranker" not in _dry_run(tmp_path, tmp_path / "c.yaml", "reranker.enabled=false")
    refused = _dry_run(tmp_path, tmp_path / "c.yaml", "reranker.enabled=false", "--only", "reranker", check=False)
    assert "reranker is not part of this pipeline: set reranker.enabled=true" in refused


def test_one_stage_alone_wants_its_inputs(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{}")
    output = _dry_run(tmp_path, tmp_path / "c.yaml", "--only", "transformer", check=False)
    assert "transformer needs text-tokenizer, which is neither finished nor queued (not run yet)" in output
