"""The `.npz` of guided-diffusion's evaluator: images out and in, statistics as the real side, nothing damaged."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline.cli.main import cli
from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.core.errors import UserError
from pipeline.data.shards import Sample, write_shard
from pipeline.evaluation.evaluator_npz import image_layout, read_statistics, write_images
from pipeline.evaluation.image_sets import images_at
from pipeline.evaluation.set_metrics import AUTHENTICITY, METRICS, PERTURBED
from pipeline.text_tokenizer.bpe import TextTokenizer
from tests.data.sample_images import encoded, image
from tests.metrics import seeded

D, SPATIAL = 12, 9


def pixels(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 6, 8, 3), dtype=np.uint8)


def inception_set(path: Path, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A feature file as if of Inception: its features and its spatial ones."""
    features, spatial = seeded.features(n, D, seed), seeded.features(n, SPATIAL, seed + 1)
    about = {"name": "inception-v3", "label": "Inception-v3"}
    np.savez(path, features=features, spatial=spatial, logits=seeded.logits(n, 5), **about)  # type: ignore[arg-type]
    return features, spatial


def statistics(features: np.ndarray, spatial: np.ndarray) -> dict[str, np.ndarray]:
    both = (("", features), ("_s", spatial))
    found = {f"mu{end}": values.mean(axis=0) for end, values in both}
    return found | {f"sigma{end}": np.cov(values, rowvar=False) for end, values in both}


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """The reference's formula, by the eigenvalues of the product of covariances."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    return float(((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root)


def evaluate(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])
    return done.exit_code, done.output + (str(done.exception) if isinstance(done.exception, UserError) else "")


def values(path: Path) -> dict[str, Any]:
    return {row["metric"]: row["value"] for row in json.loads(path.read_text())["rows"]}


def test_images_that_numpy_saved_are_read_one_by_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", pixels(5))
    found = images_at(tmp_path / "samples.npz")
    assert [np.asarray(one.image).tolist() for one in found] == pixels(5).tolist()
    assert {one.size(one.content()) for one in found} == {(8, 6)}


def test_what_is_written_numpy_reads(tmp_path: Path) -> None:
    write_images(tmp_path / "out.npz", map(Image.fromarray, pixels(5)), 5)
    with np.load(tmp_path / "out.npz", allow_pickle=False) as content:
        assert content.files == ["arr_0"]
        assert np.array_equal(content["arr_0"], pixels(5))
    with pytest.raises(UserError, match="images of one size"):
        write_images(tmp_path / "mixed.npz", [Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], 2)
    assert not (tmp_path / "mixed.npz").exists()


def test_a_runs_samples_become_the_evaluators_file(tmp_path: Path) -> None:
    samples = [Sample(f"{i}", encoded(image(i)), "a caption", {}) for i in range(3)]
    write_shard(tmp_path / "run" / "generate" / "samples" / "000000.tar", samples)
    text = TextTokenizer.train(["a caption"], TextTokenizerConfig())
    text.save_pretrained(tmp_path / "run" / "text-tokenizer")
    done = CliRunner().invoke(cli, ["generate", str(tmp_path / "run"), "--npz", str(tmp_path / "out.npz")])
    assert (done.exit_code, done.output) == (0, f"3 images in {tmp_path / 'out.npz'}\n")
    found = [np.asarray(one.image) for one in images_at(tmp_path / "out.npz")]
    assert np.array_equal(found, [np.asarray(image(i)) for i in range(3)])


def test_samples_of_classes_have_the_class_of_each_beside_them(tmp_path: Path) -> None:
    names = ["n02", "n01", "n03", "n01"]
    samples = [Sample(f"{i}", encoded(image(i)), name, {}) for i, name in enumerate(names)]
    write_shard(tmp_path / "run" / "generate" / "samples" / "000000.tar", samples)
    TextTokenizer.of_classes(names, TextTokenizerConfig()).save_pretrained(tmp_path / "run" / "text-tokenizer")
    done = CliRunner().invoke(cli, ["generate", str(tmp_path / "run"), "--npz", str(tmp_path / "out.npz")])
    assert done.exit_code == 0, done.output
    with np.load(tmp_path / "out.npz", allow_pickle=False) as content:
        assert content["arr_0"].shape[0] == 4
        assert content["arr_1"].dtype == np.int64
        assert content["arr_1"].tolist() == [1, 0, 2, 0]


def test_fake_images_that_are_measured_become_the_evaluators_file(tmp_path: Path) -> None:
    (tmp_path / "fake").mkdir()
    for number in range(3):
        image(number).save(tmp_path / "fake" / f"{number}.png")
    measured = ["--real", tmp_path / "fake", "--fake", tmp_path / "fake", "--cache", tmp_path / "cache"]
    code, output = evaluate(*measured, "--npz", tmp_path / "out.npz", "--neighbours", 1)
    assert code == 0, output
    found = [np.asarray(one.image) for one in images_at(tmp_path / "out.npz")]
    assert np.array_equal(found, [np.asarray(image(i)) for i in range(3)])
    inception_set(tmp_path / "features.npz", 9, 1)
    both = ["--real", tmp_path / "features.npz", "--fake", tmp_path / "features.npz"]
    assert "expected images as --fake, found features" in evaluate(*both, "--npz", tmp_path / "out.npz")[1]


def test_each_row_says_whose_protocol_it_follows(tmp_path: Path) -> None:
    for seed in (1, 5):
        inception_set(tmp_path / f"{seed}.npz", 60, seed)
    both = ["--real", tmp_path / "1.npz", "--fake", tmp_path / "5.npz", "-o", tmp_path / "m.json"]
    for neighbours in (5, 3):
        _, output = evaluate(*both, "--neighbours", neighbours)
        rows = {row["metric"]: row for row in json.loads((tmp_path / "m.json").read_text())["rows"]}
        told = {metric.removesuffix(" (Inception-v3)") for metric in rows if rows[metric]["protocol"] != "smalti"}
        assert told == {"FID", "sFID", "precision k=3", "recall k=3"}
        assert {rows[f"{metric} (Inception-v3)"]["protocol"] for metric in told} == {"guided-diffusion"}
        assert "guided-diffusion, n = 60\n" in output
    protocols = {
        (metric.name, of): name for metric in (*METRICS, AUTHENTICITY) for of, name in metric.protocols.items()
    }
    assert protocols["{fd}", "dinov2"] == protocols[AUTHENTICITY.name, "dinov2"] == "dgm-eval"
    assert protocols["{cmmd}", "clip"] == "CMMD"
    assert PERTURBED.protocols == {"inception-v3": "pFID"}


def test_fid_and_sfid_against_statistics_are_the_references(tmp_path: Path) -> None:
    real = seeded.features(90, D, 5), seeded.features(90, SPATIAL, 6)
    np.savez(tmp_path / "reference.npz", **statistics(*real))  # type: ignore[arg-type]
    fake = inception_set(tmp_path / "fake.npz", 60, 1)
    code, output = evaluate(
        *("--real", tmp_path / "reference.npz", "--fake", tmp_path / "fake.npz", "-o", tmp_path / "m.json")
    )
    assert code == 0, output
    found = values(tmp_path / "m.json")
    assert list(found) == ["FID (Inception-v3)", "sFID (Inception-v3)", "IS (Inception-v3)"]
    assert found["FID (Inception-v3)"] == pytest.approx(frechet(real[0], fake[0]), rel=1e-4)
    assert found["sFID (Inception-v3)"] == pytest.approx(frechet(real[1], fake[1]), rel=1e-4)
    assert "has statistics, no images: KID, precision and all else that needs these is left out" in output
    assert "generated, statistics of the reference" in output


def test_sfid_of_two_sets_is_the_references(tmp_path: Path) -> None:
    real, fake = (inception_set(tmp_path / f"{seed}.npz", 60, seed) for seed in (1, 5))
    evaluate("--real", tmp_path / "1.npz", "--fake", tmp_path / "5.npz", "-o", tmp_path / "m.json")
    found = values(tmp_path / "m.json")
    assert found["sFID (Inception-v3)"] == pytest.approx(frechet(real[1], fake[1]), rel=1e-4)
    assert {"precision k=3 (Inception-v3)", "recall k=3 (Inception-v3)"} <= set(found)


def test_statistics_of_another_network_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "fake.npz", features=np.random.default_rng(0).random((8, 3)))
    code, output = evaluate("--real", tmp_path / "reference.npz", "--fake", tmp_path / "fake.npz")
    assert code != 0
    assert "add --extractor inception-v3" in output
    inception_set(tmp_path / "fake.npz", 20, 1)
    _, output = evaluate("--real", tmp_path / "reference.npz", "--fake", tmp_path / "fake.npz")
    assert f"expected statistics of {D} dimensions, found 3" in output
    code, output = evaluate("--real", tmp_path / "fake.npz", "--fake", tmp_path / "reference.npz")
    assert "expected images or features as the fake side, found statistics" in output


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "expected arr_0 as uint8"),
        ({"arr_0": np.zeros((2, 4, 4, 4), np.uint8)}, "expected arr_0 as uint8"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "expected images in arr_0"),
        ({"arr_0": np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))}, "in C order"),
        ({"arr_0": np.array([{}], dtype=object)}, "arr_0"),
    ],
)
def test_other_arrays_are_no_images(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        image_layout(tmp_path / "x.npz")


def test_what_a_header_promises_is_held_against_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, pixels(3))
    with pytest.raises(UserError, match="found it compressed"):
        image_layout(path)
    np.savez(path, pixels(3))
    path.write_bytes(path.read_bytes().replace(b"(3, 6, 8, 3)", b"(9, 6, 8, 3)"))  # and so another checksum
    with pytest.raises(UserError, match="damaged"):
        image_layout(path)
    for name, descr, shape in (("arr_0", "|u1", (9**9, 6, 8, 3)), ("mu", "<f8", (10_000,))):
        with zipfile.ZipFile(path, "w") as archive, archive.open(f"{name}.npy", "w") as file:
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
            file.write(b"few bytes")
        with pytest.raises(UserError, match=f"bytes of {name} .*, found 137"):
            image_layout(path) if name == "arr_0" else read_statistics(path)
    np.savez(path, pixels(3))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="x.npz: expected"):
        images_at(path)


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (np.zeros(3), np.zeros((2, 2)), r"expected sigma as floats \[3, 3\], found float64 \[2, 2\]"),
        (np.zeros(3, np.int64), np.zeros((3, 3)), "expected mu as floats"),
        (np.full(3, np.nan), np.eye(3), "expected finite numbers in mu"),
        (np.zeros(20_000), np.eye(3), "expected 1 to 16,384 dimensions"),
        (np.zeros(3), np.array([{}], dtype=object), "sigma"),
    ],
)
def test_other_statistics_are_refused(tmp_path: Path, mean: np.ndarray, covariance: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "x.npz", mu=mean, sigma=covariance)
    with pytest.raises(UserError, match=message):
        read_statistics(tmp_path / "x.npz")
