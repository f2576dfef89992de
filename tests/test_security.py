"""Every promise of SECURITY.md has its tests: those of files that nobody trusts, and here those of the whole source."""

from __future__ import annotations

import ast
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.pipeline import load_pipeline
from pipeline.core.errors import UserError
from pipeline.core.pretrained import load_model
from pipeline.data.catalog_columns import saved_columns
from pipeline.data.duplicates import same_key
from pipeline.data.prepare_part import safe_key
from pipeline.evaluation.evaluator_npz import image_layout, read_statistics
from pipeline.evaluation.feature_store import FeatureStore, read_features
from pipeline.evaluation.image_sets import images_at
from pipeline.evaluation.reference_stats import reference_gaussian
from tests.conftest import TINY
from tests.evaluation.pixels import pixels
from tests.launch import ROOT

HERE = "tests/test_security.py"
PROMISES = {
    "Models.": (
        f"{HERE}::test_loading_a_model_runs_no_code_of_its_folder",
        f"{HERE}::test_no_loader_may_run_code",
        "tests/extractors/test_weights_of_others.py::test_inception_and_lpips_run_no_pickle",
        "tests/extractors/test_weights_of_others.py::test_a_folder_of_transformers_runs_no_pickle_and_no_code",
    ),
    "Images.": (
        "tests/test_image_files.py::test_of_each_format_that_pillow_knows_only_the_named_are_opened",
        "tests/test_image_files.py::test_an_eps_in_a_jpg_starts_no_ghostscript",
        "tests/test_image_files.py::test_too_many_pixels_are_refused_before_any_is_decoded",
    ),
    "Tars.": (
        f"{HERE}::test_no_tar_is_extracted",
        f"{HERE}::test_a_key_leads_into_no_folder",
        "tests/evaluation/test_image_sets.py::test_links_and_folders_above_in_a_tar_lead_nowhere",
        "tests/data/test_nothing_vanishes.py::test_a_member_of_any_size_takes_no_memory",
    ),
    "Tables and arrays.": (
        f"{HERE}::test_no_loader_may_run_code",
        f"{HERE}::test_an_array_that_is_a_pickle_is_refused",
        f"{HERE}::test_kept_statistics_that_are_a_pickle_are_made_anew",
        "tests/extractors/test_weights_of_others.py::test_a_feature_file_runs_no_pickle",
    ),
    "Captions and prompts": (
        f"{HERE}::test_the_report_escapes_and_nothing_reaches_a_shell",
        "tests/core/test_text.py::test_text_from_outside_keeps_what_can_be_seen_and_nothing_else",
    ),
    "YAML": (f"{HERE}::test_a_config_can_name_no_python_object",),
    "The current folder": (
        "tests/orchestration/test_current_folder.py::test_the_stage_of_a_local_run_is_ours",
        "tests/orchestration/test_current_folder.py::test_the_ranks_of_a_training_are_ours",
        "tests/orchestration/test_current_folder.py::test_the_worker_processes_of_a_command_are_ours",
        "tests/orchestration/test_current_folder.py::test_a_job_file_starts_our_stages",
    ),
    "Passwords.": (
        "tests/core/test_urls.py::test_a_run_from_a_guarded_source_has_the_password_nowhere_and_can_be_rerun",
        "tests/core/test_urls.py::test_a_run_from_a_signed_url_has_the_signature_nowhere_and_can_be_resumed",
    ),
    "Nothing is downloaded or sent": (f"{HERE}::test_no_loader_may_run_code", f"{HERE}::test_usage_reports_are_off"),
}


def test_each_promise_names_its_tests_and_they_are_there() -> None:
    text = (ROOT / "SECURITY.md").read_text().partition("## What is promised")[2].partition("## What is not")[0]
    assert re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE) == list(PROMISES)
    for tests in PROMISES.values():
        for test in tests:
            path, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / path).read_text(), test


def _calls() -> Iterator[tuple[str, str, dict[str, object]]]:
    """Every call in the source: where, the called name with dots, its keyword arguments (no constant: text)."""
    for path in sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                given = {k.arg: _value(k.value) for k in node.keywords if k.arg}
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), given


def _value(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else ast.unparse(node)


def test_no_loader_may_run_code() -> None:
    for where, name, given in _calls():
        if name == "torch.load":
            assert given.get("weights_only") is True, where
        if (
            name.endswith("from_pretrained")
            and not name.startswith(("self.", "cls."))
            and name.split(".")[0]
            in (
                "AutoConfig",
                "AutoModel",
                "backbone",
                "model_class",
                "processor_class",
            )
        ):
            assert given.get("local_files_only") is True, where
        assert not given.get("trust_remote_code"), where
        assert not given.get("allow_pickle"), where
        if where.startswith("pipeline/data/caption_workers.py") and name == "pickle.load":
            continue  # from the pipe of a process that it has started itself
        assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system", "yaml.unsafe_load"), where


def test_no_tar_is_extracted() -> None:
    methods = ("extractall", "unpack_archive", "makefile")
    for where, name, _ in _calls():
        if name == "self._connection.makefile":  # of a socket
            continue
        assert name.rpartition(".")[2] not in methods, where
        assert name not in ("tar.extract", "archive.extract"), where


def test_the_report_escapes_and_nothing_reaches_a_shell() -> None:
    for where, name, given in _calls():
        assert not given.get("shell"), where
        if where.startswith("pipeline/report/") and name.rpartition(".")[2] == "Environment":
            assert given.get("autoescape") is True, where
    template = next((ROOT / "pipeline" / "report").glob("*.html")).read_text()
    # What is marked as safe is made by the report itself: drawings and images.
    assert not re.findall(r"(?:caption|prompt|title|note)\w*\s*\|\s*safe", template)


def test_usage_reports_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    from pipeline.orchestration.mlflow_store import Store

    config = load_pipeline(TINY, ["tracking.uri=http://127.0.0.1:9"])
    Store(config).connect()
    assert os.environ.pop("MLFLOW_DISABLE_TELEMETRY") == "true"


class _Bomb:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_loading_a_model_runs_no_code_of_its_folder(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"size": 1}')
    (model / "model.safetensors").write_bytes(pickle.dumps(_Bomb(mark)))
    (model / "modeling.py").write_text(f"open({str(mark)!r}, 'w')")
    with pytest.raises(UserError, match="does not fit config.json"):
        load_model(model, "stage", ("size",), lambda config, where: torch.nn.Linear(1, 1))
    assert not mark.exists()


def _read_feature_npz(folder: Path, bombs: np.ndarray) -> None:
    np.savez(folder / "a.npz", features=bombs)
    read_features(folder / "a.npz")


def _read_feature_folder(folder: Path, bombs: np.ndarray) -> None:
    (folder / "about.json").write_text("{}")
    np.save(folder / "features.npy", bombs)
    read_features(folder)


def _read_parts_of_features(folder: Path, bombs: np.ndarray) -> None:
    Image.new("L", (16, 16)).save(folder / "a.png")
    images, store = images_at(folder), FeatureStore(folder / "store", pixels())
    np.savez(store.extract(images) / "part-00000.npz", features=bombs)
    store.features(images)


def _read_images(folder: Path, bombs: np.ndarray) -> None:
    np.savez(folder / "a.npz", arr_0=bombs)
    image_layout(folder / "a.npz")


def _read_statistics(folder: Path, bombs: np.ndarray) -> None:
    np.savez(folder / "a.npz", mu=bombs[0], sigma=bombs)
    read_statistics(folder / "a.npz")


def _read_columns(folder: Path, bombs: np.ndarray) -> None:
    np.savez(folder / "a.npz", allow_pickle=True, **{"train/keys": bombs})
    for columns in saved_columns([folder / "a.npz"], "train"):
        dict(columns)


def _read_hashes(folder: Path, bombs: np.ndarray) -> None:
    np.save(folder / "a.npy", bombs)
    same_key([folder / "a.npy"], [1])


@pytest.mark.parametrize(
    "read",
    [
        _read_feature_npz,
        _read_feature_folder,
        _read_parts_of_features,
        _read_images,
        _read_statistics,
        _read_columns,
        _read_hashes,
    ],
)
def test_an_array_that_is_a_pickle_is_refused(read: Callable[[Path, np.ndarray], None], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises((UserError, ValueError), match="pickle|object"):
        read(tmp_path, np.array([[_Bomb(mark)]], dtype=object))
    assert not mark.exists()


def test_kept_statistics_that_are_a_pickle_are_made_anew(tmp_path: Path) -> None:
    mark, features = tmp_path / "mark", torch.eye(3)[[0, 1, 2, 0, 1]]
    made = reference_gaussian(features, tmp_path)
    (kept,) = tmp_path.rglob("*.npz")
    bombs = np.array([[_Bomb(mark)]], dtype=object)
    np.savez(kept, mean=bombs, root=bombs, trace=bombs)
    assert torch.equal(reference_gaussian(features, tmp_path).mean, made.mean)
    assert not mark.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch {mark}']", "!!python/name:os.system"])
def test_a_config_can_name_no_python_object(tag: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "config.yaml").write_text(f"name: {tag.format(mark=mark)}\n")
    with pytest.raises(UserError):
        load_pipeline(tmp_path / "config.yaml")
    with pytest.raises(UserError):
        load_pipeline(TINY, [f"name={tag.format(mark=mark)}"])
    assert not mark.exists()


@pytest.mark.parametrize("key", ["../../etc/passwd", "/abs", "..", ".hidden", "__skipped", "a\x00b", "a/b"])
def test_a_key_leads_into_no_folder(key: str) -> None:
    made = safe_key(key)
    assert Path(made).name == made
    assert not made.startswith((".", "__"))
    assert "\x00" not in made
