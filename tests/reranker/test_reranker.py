"""The reranker learns which caption belongs to which image, and its stage chooses among candidates."""

from __future__ import annotations

import io
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.config.reranker import TowerConfig
from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.core.errors import UserError
from pipeline.data.shards import Sample, read_samples
from pipeline.reranker.model import ContrastiveObjective, TwoTowers
from pipeline.reranker.ranker import Ranker, retrieval
from pipeline.sampling.pipeline import Pipeline
from pipeline.text_tokenizer.bpe import TextTokenizer
from pipeline.training.activation_checkpointing import checkpoint_activations
from pipeline.training.consolidate import export_step
from tests.conftest import NO_TRACKING, TINY
from tests.launch import launch

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (120, 120, 120)}
SMALL = TowerConfig(width=32, layers=1, heads=2, patch_size=4, dimensions=16, dropout=0)


def samples() -> list[Sample]:
    """Squares of four colours on the left or right: eight captions."""
    found = []
    for name, colour in COLOURS.items():
        for side, left in (("left", 0), ("right", 4)):
            image = Image.new("RGB", (8, 8), "white")
            image.paste(colour, (left, 2, left + 4, 6))
            content = io.BytesIO()
            image.save(content, format="png")
            found.append(Sample(f"{name}-{side}", content.getvalue(), f"{name} square on the {side}", {}))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    captions = [sample.caption for sample in samples()]
    tokenizer = TextTokenizer.train(captions, TextTokenizerConfig(vocab_size=280, text_length=16))
    torch.manual_seed(0)
    towers = TwoTowers(SMALL, 8, tokenizer.text_length, tokenizer.vocab_size)
    ranker, objective = Ranker(towers, tokenizer), ContrastiveObjective(towers)
    pixels = [torch.tensor(list(sample.image.tobytes()), dtype=torch.uint8) for sample in samples()]
    images = torch.stack(pixels).view(-1, 8, 8, 3).permute(0, 3, 1, 2)
    optimizer = torch.optim.AdamW(towers.parameters(), lr=3e-3)
    for step in range(120):
        loss, _ = objective({"images": images, "text": tokenizer.encode(captions)}, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    towers.eval()
    return ranker


def test_it_learns_which_caption_belongs_to_which_image(trained: Ranker) -> None:
    metrics = retrieval(trained, samples(), 100)
    assert metrics == {
        "image to text R@1": 1, "image to text R@5": 1, "text to image R@1": 1, "text to image R@5": 1, "samples": 8,
    }  # fmt: skip
    red = samples()[0].image
    own, other = trained.scores([red, red], ["red square on the left", "blue square on the right"])
    assert own > other + 20


def test_retrieval_holds_two_batches_of_images_whatever_is_measured(
    trained: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = retrieval(trained, samples(), 7)
    monkeypatch.setattr("pipeline.reranker.ranker._BATCH", 2)
    taken: list[weakref.ref[Sample]] = []
    most = 0

    def one_by_one() -> Iterator[Sample]:
        nonlocal most
        for number in range(8):
            sample = samples()[number]
            taken.append(weakref.ref(sample))
            most = max(most, sum(one() is not None for one in taken))
            yield sample
            del sample

    assert retrieval(trained, one_by_one(), 7) == whole
    assert most <= 4


def test_a_pass_of_one_sample_has_nothing_to_tell_it_from_and_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny", copy_function=shutil.copy2))
    alone = ["reranker.enabled=true", "reranker.training.micro_batch_size=1", "reranker.training.steps=1", NO_TRACKING]
    alone += ["reranker.training.batch_size=2", "reranker.training.warmup_steps=0"]
    output = launch("stages.reranker", "--config", str(run / "config.yaml"), *alone, check=False)
    assert "reranker.training: expected at least 2 samples per process and pass" in output
    assert "Traceback" not in output


def test_saved_and_loaded_it_scores_the_same(trained: Ranker, tmp_path: Path) -> None:
    assert isinstance(trained.model, TwoTowers)
    trained.model.save_pretrained(tmp_path)
    loaded = Ranker.from_pretrained(tmp_path, trained.text_tokenizer, torch.device("cpu"))
    images, captions = [s.image for s in samples()], [s.caption for s in samples()]
    assert loaded.scores(images, captions) == trained.scores(images, captions)
    other = TextTokenizer.train(captions, TextTokenizerConfig(vocab_size=280, text_length=9))
    with pytest.raises(UserError, match="expected a text tokenizer of length and vocabulary"):
        Ranker.from_pretrained(tmp_path, other, torch.device("cpu"))


def test_equal_captions_are_both_right() -> None:
    torch.manual_seed(0)
    objective = ContrastiveObjective(TwoTowers(SMALL, 8, 4, 30)).eval()
    text = torch.tensor([[5, 6, 0, 0]] * 3)
    loss, metrics = objective({"images": torch.zeros(3, 3, 8, 8, dtype=torch.uint8), "text": text}, 0)
    assert float(loss.detach()) == pytest.approx(float(torch.tensor(3.0).log()), rel=1e-4)
    assert float(metrics["accuracy"]) == 1


def test_recomputed_activations_change_no_gradient() -> None:
    text = torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0]])
    batch = {"images": torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).byte(), "text": text}
    gradients = []
    calls: list[nn.Module] = []
    for recompute in (False, True):
        torch.manual_seed(0)
        objective = ContrastiveObjective(TwoTowers(SMALL.model_copy(update={"dropout": 0.3}), 8, 4, 30)).train()
        calls.clear()
        for block in objective.blocks():
            block.linear1.register_forward_hook(lambda module, *_: calls.append(module))
        if recompute:
            checkpoint_activations(objective)
        objective(batch, 0)[0].backward()
        assert len(calls) == (4 if recompute else 2)  # two towers of one layer
        gradients.append([parameter.grad for parameter in objective.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        assert kept is not None
        assert torch.equal(kept, recomputed)


def test_the_stage_trains_measures_and_chooses_for_generate(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny", copy_function=shutil.copy2))
    config = ["--config", str(run / "config.yaml"), "reranker.enabled=true", "generate.candidates=2", NO_TRACKING]
    config += ["reranker.model.width=32", "reranker.model.layers=1", "reranker.model.heads=2"]
    config += ["reranker.training.steps=8", "reranker.training.batch_size=32", "reranker.training.warmup_steps=2"]
    launch("stages.reranker", *config)
    metrics = json.loads((run / "reranker" / "retrieval.json").read_text())
    assert metrics["samples"] == len(list(read_samples(run / "prepare", "val")))
    assert 0 <= metrics["image to text R@1"] <= metrics["image to text R@5"] <= 1
    logged = (run / "reranker" / "metrics.jsonl").read_text()
    assert "val/text to image R@1" in logged
    exported, _ = export_step(run, "reranker", 8, tmp_path / "exported")
    for name in ("model.safetensors", "config.json"):
        assert (exported / name).read_bytes() == (run / "reranker" / "model" / name).read_bytes(), name
    launch("stages.generate", *config)
    pipeline = Pipeline.from_pretrained(run)
    generated = pipeline.generate(["joker"], 2, keep=2)
    listed = json.loads((run / "generate" / "prompts.json").read_text())
    assert listed[0]["score"] == pytest.approx(generated[0].score, abs=1e-3)


@pytest.mark.slow
def test_the_reranker_is_off_by_default_and_both_ends_say_so(tmp_path: Path) -> None:
    config = [str(TINY), f"runs={tmp_path}"]
    output = launch("pipeline", "run", *config, "generate.candidates=4", check=False)
    assert "generate.candidates=4 needs a reranker to choose: set reranker.enabled=true" in output
    output = launch("stages.reranker", "--config", *config, check=False)
    assert "reranker is not part of this pipeline: set reranker.enabled=true" in output
