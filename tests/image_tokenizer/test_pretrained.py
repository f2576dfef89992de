"""Promises of image tokenizers of other libraries: the same codes and pixels, and nothing but tensors is read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config.base import parse_config
from pipeline.config.image_tokenizer import ImageTokenizerConfig, PretrainedTokenizerConfig
from pipeline.config.image_tokenizer_model import VQGANConfig
from pipeline.core.errors import UserError
from pipeline.image_tokenizer import ImageTokenizer
from pipeline.image_tokenizer.base import build
from pipeline.image_tokenizer.losses import output_to_images, output_to_pixels
from pipeline.image_tokenizer.pretrained import load_pretrained, new_tokenizer
from pipeline.image_tokenizer.pretrained.names import LLAMAGEN, TAMING, their_names
from pipeline.image_tokenizer.vqvae import VQVAE
from tests.image_tokenizer.golden_vqgan import CASES, EVERY, GOLDEN, SIDE, images, images_for, seeded

SMALL: dict[str, Any] = {"kind": "vqgan", "channels": 32, "multipliers": [1, 2], "blocks": 1, "latent_width": 8}
BOOK = {"kind": "gradient", "codebook_size": 48, "code_width": 4}


def loaded(library: str, path: Path, side: int = SIDE, **more: Any) -> ImageTokenizer:
    config = PretrainedTokenizerConfig.model_validate({"library": library, "path": str(path), **more})
    return load_pretrained(config, side)


def theirs(library: str, **changes: Any) -> dict[str, Tensor]:
    """Seeded weights as `library` names them."""
    config = parse_config(VQGANConfig, SMALL | {"quantizer": BOOK, "attention": [1], **changes}, "test")
    own, names_there = build(config, SIDE).state_dict(), {"taming": TAMING, "llamagen": LLAMAGEN}[library]
    names = dict(their_names(config, names_there)) | {"quantizers.0.codebooks.0.embedding": names_there.codebook}
    return seeded({names[name]: list(value.shape) for name, value in own.items() if name in names})


@pytest.mark.parametrize(("library", "size"), CASES)
def test_weights_give_the_codes_and_pixels_of_their_library(library: str, size: str, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())[f"{library}, {size}"]
    save_file(seeded(golden["shapes"]), tmp_path / "diffusion_pytorch_model.safetensors")
    tokenizer = loaded(library.split(",")[0], tmp_path)
    [codes] = tokenizer.encode(images_for(library))
    assert codes.tolist() == golden["codes"]
    assert len(codes.unique()) > (4 if library == "openai" else 8)
    [vectors] = [tokenizer.quantizers[0].vectors([codes])]
    assert isinstance(vectors, Tensor)
    pixels = output_to_pixels(tokenizer.config.reconstruction, tokenizer._decoded(lambda grid, context: vectors))
    torch.testing.assert_close(pixels.detach().flatten()[::EVERY], torch.tensor(golden["pixels"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("library", "wrapped"), [("taming", "state_dict"), ("llamagen", "model")])
def test_a_checkpoint_file_loads_and_what_no_image_depends_on_is_left(
    library: str, wrapped: str, tmp_path: Path
) -> None:
    state = theirs(library)
    extra = {"loss.logvar": torch.zeros(1)} if library == "taming" else {"quantize.codebook_used": torch.zeros(9)}
    torch.save({wrapped: state | extra, "epoch": 3}, tmp_path / "last.ckpt")
    tokenizer = loaded(library, tmp_path / "last.ckpt")
    [level] = tokenizer.levels
    assert tuple(level) == (16, 16, 48)
    assert tokenizer.config.quantizers[0].normalize == (library == "llamagen")
    decoder = tokenizer.state_dict()["decoder.resolutions.1.blocks.0.conv1.weight"]
    name = {"taming": "decoder.up.0.block.0", "llamagen": "decoder.conv_blocks.1.res.0"}[library]
    assert torch.equal(decoder, state[f"{name}.conv1.weight"])


def openai_halves(folder: Path) -> dict[str, Tensor]:
    """Seeded weights of OpenAI's dVAE in a folder, a file for each half, and all of them by their whole names."""
    state = seeded(json.loads(GOLDEN.read_text())["openai, one block a group"]["shapes"])
    for half in ("encoder", "decoder"):
        own = {name.removeprefix(f"{half}."): value for name, value in state.items() if name.startswith(half)}
        save_file(own, folder / f"{half}.safetensors")
    return state


def test_the_halves_of_openais_dvae_are_one_folder(tmp_path: Path) -> None:
    state = openai_halves(tmp_path)
    tokenizer = loaded("openai", tmp_path)
    assert [tuple(level) for level in tokenizer.levels] == [(4, 4, 512)]
    found = tokenizer.state_dict()
    assert torch.equal(found["quantizers.0.project.bias"], state["encoder.blocks.output.conv.b"])
    kernel = state["decoder.blocks.group_2.block_1.res_path.conv_1.w"]
    assert torch.equal(found["decoder.resolutions.1.blocks.0.branch.1.weight"], kernel)
    (tmp_path / "decoder.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"is no dVAE of openai's: there is no 'decoder.blocks.input.w'; check"
    ) as caught:
        loaded("openai", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("library", ["openai", "taming, gumbel"])
def test_of_a_relaxed_quantizer_a_decoder_learns_on_the_codes_of_encode(library: str, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    name = next(case for case in golden if case.startswith(library))
    save_file(seeded(golden[name]["shapes"]), tmp_path / "model.safetensors")
    tokenizer = loaded(library.split(",")[0], tmp_path, train="decoder").train()
    assert isinstance(tokenizer, VQVAE)
    output, [quantized] = tokenizer(images(), 0)
    again = output_to_images(tokenizer.config.reconstruction, output)
    torch.testing.assert_close(again, tokenizer.decode(tokenizer.encode(images())), atol=1e-5, rtol=0)
    assert quantized.loss == 0


def test_it_is_saved_and_loaded_as_our_own(tmp_path: Path) -> None:
    save_file(theirs("taming"), tmp_path / "taming.safetensors")
    tokenizer = loaded("taming", tmp_path / "taming.safetensors")
    tokenizer.save_pretrained(tmp_path / "model")
    again = ImageTokenizer.from_pretrained(tmp_path / "model")
    codes = tokenizer.encode(images())
    assert torch.equal(again.encode(images())[0], codes[0])
    assert torch.equal(again.decode(codes), tokenizer.decode(codes))


@pytest.mark.parametrize(
    ("train", "learns"), [(None, set()), ("decoder", {"decoder"}), ("all", {"encoder", "quantizers", "decoder"})]
)
def test_training_moves_what_it_is_told_to_and_no_code_is_revived(
    train: str | None, learns: set[str], tmp_path: Path
) -> None:
    save_file(theirs("taming"), tmp_path / "taming.safetensors")
    tokenizer = loaded("taming", tmp_path / "taming.safetensors", train=train).train()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    objective = tokenizer.objective()
    if train:
        optimizer = torch.optim.SGD([p for group in objective.parameter_groups() for p in group.parameters], 0.1)
        for step in range(2):
            loss, _ = objective({"images": (images() * 255).byte()}, step)
            loss.backward()
            optimizer.step()
            objective.after_update(applied=True)
    moved = {n.split(".")[0] for n, v in tokenizer.named_parameters() if not torch.equal(v, before[n])}
    assert moved == learns


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (Path("evil.txt"), "run"))


def test_a_file_that_holds_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": theirs("taming"), "callback": Evil()}, "last.ckpt")
    Path("other.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("last.ckpt", "other.pt"):
        with pytest.raises(UserError, match="something else than tensors") as caught:
            loaded("taming", tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not Path("evil.txt").exists()


def _without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in theirs("taming").items() if key != name}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"layer.weight": torch.zeros(2)}, r"is no VQGAN of taming's: there is no 'encoder.conv_in.weight'; check"),
        (theirs("llamagen"), "where multiples of 32 were expected"),
        (_without("decoder.norm_out.bias"), "there is no 'decoder.norm_out.bias'"),
        (theirs("taming") | {"quantize.proj.weight": torch.zeros(2)}, "found 'quantize.proj.weight', which it has not"),
        (
            theirs("taming") | {"quant_conv.weight": torch.zeros(4, 9, 1, 1)},
            r"'quant_conv.weight' is \[4, 9, 1, 1\], where \[4, 8\] was expected",
        ),
    ],
)
def test_weights_of_something_else_are_told_in_one_line(state: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        loaded("taming", tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_or_does_not_fit_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected weights at .*gone.ckpt, found no file"):
        loaded("taming", tmp_path / "gone.ckpt")
    with pytest.raises(UserError, match="expected the weights of a tokenizer of diffusers's, model.safetensors or"):
        loaded("diffusers", tmp_path)
    save_file(theirs("taming"), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="images of 31×31 cannot be cut into codes of 2×2 pixels: choose an image size"):
        loaded("taming", tmp_path, side=31)


def test_a_config_has_its_own_model_or_anothers() -> None:
    training = {"steps": 1, "batch_size": 1, "learning_rate": 1e-3, "warmup_steps": 0}
    other = {"pretrained": {"library": "taming", "path": "x"}, "training": training}
    for key, value in {"model": {"kind": "vqvae"}, "init_from": "run"}.items():
        with pytest.raises(UserError, match=f"leave `{key}` out.*, or `pretrained`"):
            parse_config(ImageTokenizerConfig, other | {key: value}, "test")
    again = parse_config(ImageTokenizerConfig, other, "test").model_dump(mode="json")  # as a run's config.yaml has it
    assert parse_config(ImageTokenizerConfig, again, "test").kind == "taming's VQGAN"
    section = parse_config(ImageTokenizerConfig, {"model": SMALL, "training": training}, "test")
    assert new_tokenizer(section, 16).levels[0].codebook_size == 16384
