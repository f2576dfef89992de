"""Extractors by path: CLIP, DINOv2 and Inception-v3 as saved on disk, tiny or of seeded weights; the real code path."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, Dinov2Config, Dinov2Model

from pipeline.config.base import parse_config
from pipeline.config.evaluate import EvaluateConfig
from pipeline.core.errors import UserError
from pipeline.evaluation.comparison import caption_rows, compare_images
from pipeline.extractors.base import resized
from pipeline.extractors.clip_scorer import ClipScorer
from pipeline.extractors.inception_v3 import InceptionV3
from pipeline.extractors.lpips_vgg16 import Lpips
from pipeline.extractors.registry import load_extractor
from pipeline.metrics.clip_score import clip_scores, own_caption_ranks
from tests.extractors.tiny_clip import PROCESSOR, save_clip
from tests.launch import environment
from tests.metrics import seeded

CPU = torch.device("cpu")
CAPTIONS = ["a red heart", "a blue cat", "a green tree", "a yellow sun"]


def images(n: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), CAPTIONS)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"crop_size": {"height": 28, "width": 28}}))
    return folder


def test_clip_features_are_the_models_own(clip: Path) -> None:
    extractor = load_extractor("clip", CPU, weights=str(clip))
    found = extractor(images(3))
    assert found.features.shape == (3, 12)
    assert found.logits is None
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.inference_mode():
        pooled = model.vision_model(pixel_values=extractor.input(images(3))).pooler_output
        torch.testing.assert_close(found.features, model.visual_projection(pooled))


def test_mean_and_deviation_are_the_processors(dinov2: Path) -> None:
    extractor = load_extractor("dinov2", CPU, weights=str(dinov2))
    white = extractor.input([Image.new("RGB", (28, 28), "white")])
    expected = (1 - torch.tensor(PROCESSOR["image_mean"])) / torch.tensor(PROCESSOR["image_std"])
    torch.testing.assert_close(white[0, :, 0, 0], expected)
    assert extractor.info.resize.startswith("28 × 28")
    assert extractor(images(3)).features.shape == (3, 16)


def test_metrics_are_named_after_the_extractor_and_without_classes_there_is_no_inception_score(dinov2: Path) -> None:
    config = EvaluateConfig(extractor="dinov2", weights=str(dinov2), neighbours=2, kid_subsets=2, bootstraps=3)
    rows = compare_images(images(8), images(8, seed=1), config, seed=0)
    assert {"FD (DINOv2)", "FD∞ (DINOv2)", "KID (DINOv2)", "precision k=2 (DINOv2)"} <= {row.metric for row in rows}
    assert not [row.metric for row in rows if row.metric.startswith("IS")]
    assert all(len(row.weights_sha256 or "") == 64 for row in rows)


def test_images_are_scored_by_their_captions(clip: Path) -> None:
    scorer = ClipScorer(str(clip), CPU, batch_size=3)
    captions = scorer.captions(CAPTIONS)
    assert captions.shape == (4, 12)
    torch.testing.assert_close(scorer.captions(CAPTIONS[1:2]), captions[1:2])
    rows = caption_rows(scorer.images(images(4)), captions, "", EvaluateConfig(), seed=0)
    assert [row.metric for row in rows] == ["CLIP score (CLIP)", "R@1 (CLIP)"]


def test_clip_score_and_retrieval_of_known_embeddings() -> None:
    captions = torch.eye(4)
    images = torch.tensor([[2.0, 0, 0, 0], [0, 1, 1, 0], [0, 0, -1, 0], [1, 0, 0, 0.5]])
    assert clip_scores(images, captions).tolist() == pytest.approx([100, 100 / 2**0.5, 0, 100 * 0.5 / 1.25**0.5])
    assert own_caption_ranks(images, captions).tolist() == [0, 0, 3, 1]
    same = torch.tensor([[1.0, 0], [1, 0]])
    assert own_caption_ranks(same, same).tolist() == [0, 0]  # two images of one caption are both right


@pytest.mark.slow
def test_fid_is_inceptions(tmp_path: Path) -> None:
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(seeded.weights(InceptionV3().state_dict()), path)
    config = EvaluateConfig(
        extractor="inception-v3", weights=str(path), neighbours=2, kid_subsets=2, bootstraps=0, inception_splits=2
    )
    rows = compare_images(images(4), images(4, seed=1), config, seed=0)
    names = {"FID", "sFID", "FID∞", "IS", "precision k=2", "precision k=3", "recall k=3"}
    assert {f"{name} (Inception-v3)" for name in names} <= {row.metric for row in rows}
    assert rows[0].resize == "299 × 299, bicubic, antialiased, float"


def test_missing_or_other_weights_say_where_to_put_them(
    tmp_path: Path, clip: Path, dinov2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"no weights at .*checkpoints.*pt_inception.*evaluate.weights"):
        load_extractor("inception-v3", CPU)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="expected the state dict pt_inception"):
        load_extractor("inception-v3", CPU, weights=str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match="no model at .*nothing is downloaded"):
        load_extractor("dinov2", CPU, weights=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="expected a model of type clip in .*, found dinov2"):
        ClipScorer(str(dinov2), CPU)
    with pytest.raises(UserError, match=r"expected vgg16-397923af.pth .* in the folder .*put it there"):
        Lpips.from_folder(tmp_path)
    with pytest.raises(UserError, match=r"clip needs evaluate.weights"):
        parse_config(EvaluateConfig, {"extractor": "clip"}, where="evaluate")


def test_photos_are_held_one_at_a_time_whatever_the_batch() -> None:
    program = """
import resource, torch
from PIL import Image
from pipeline.extractors.registry import load_extractor

extractor = load_extractor("efficientnet-lite0", torch.device("cpu"), batch_size=16)
extractor(Image.new("RGB", (128, 128)) for _ in range(16))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(extractor(Image.new("RGB", (2000, 1500), (i, 3, 4)) for i in range(20))) == 20
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 16 * 2000 * 1500 * 3, "more than the pixels of a batch"


def test_resizing_in_groups_has_the_bits_of_one_stack() -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (70, 256, 256, 3), dtype=np.uint8)  # more than are resized at once
    pictures = [Image.fromarray(one) for one in pixels]
    stack = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float()
    expected = F.interpolate(stack, (128, 128), mode="bicubic", antialias=True).clamp(0, 255)
    assert resized(pictures, 128).equal(expected)
    other = Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    assert resized([*pictures[:2], other, *pictures[2:4]], 128)[[0, 1, 3, 4]].equal(expected[:4])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_photo_that_is_too_large_for_a_gpus_resizing_is_resized() -> None:
    photo = Image.effect_noise((8064, 6048), 50).convert("RGB")
    assert resized([photo], 128, torch.device("cuda")).cpu().equal(resized([photo], 128))
