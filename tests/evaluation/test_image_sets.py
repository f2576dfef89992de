"""A set is every image at a path: what is used is counted, what is left out is named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from pipeline.cli.main import cli
from pipeline.core.errors import UserError
from pipeline.evaluation.feature_store import FeatureStore
from pipeline.evaluation.image_sets import images_at, read_set
from pipeline.extractors.registry import load_extractor
from pipeline.sampling.save import save_image
from tests.data.sample_images import encoded, image, write_folder, write_tar


def keys(path: Path) -> list[str]:
    return [one.key for one in read_set(path).images]


def test_a_gif_beside_a_png_of_its_name_is_an_image_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(image(0)))
    (tmp_path / "a.gif").write_bytes(encoded(image(1), "GIF"))
    (tmp_path / "b.PNG").write_bytes(encoded(image(2)))
    (tmp_path / "a.txt").write_text("a caption")
    assert keys(tmp_path) == ["a.gif", "a.png", "b"]
    assert [one.caption for one in images_at(tmp_path)] == ["a caption", "a caption", None]
    assert read_set(tmp_path).left_out == []


def test_dotted_names_in_a_tar_are_told_apart(tmp_path: Path) -> None:
    members = [(f"shot_v1.{i:03d}.{kind}", b"") for i in range(4) for kind in ("png", "txt")]
    members = [(name, encoded(image(0)) if name.endswith("png") else name.encode()) for name, _ in members]
    members += [("s0.input.jpg", encoded(image(1), "JPEG")), ("s0.txt", b"of the sample")]
    found = images_at(write_tar(tmp_path / "a.tar", members))
    assert [one.key for one in found] == [*(f"shot_v1.{i:03d}" for i in range(4)), "s0.input"]
    assert [one.caption for one in found] == [*(f"shot_v1.{i:03d}.txt" for i in range(4)), "of the sample"]


def test_repeated_names_are_all_used(tmp_path: Path) -> None:
    contents = [encoded(image(i)) for i in range(3)]
    found = images_at(write_tar(tmp_path / "in" / "a.tar", [("x.png", content) for content in contents]))
    assert [one.name for one in found] == ["x.png", "x.png#2", "x.png#3"]
    assert [one.content() for one in found] == contents
    write_tar(tmp_path / "in" / "b.tar", [("x.png", contents[0])])
    assert len({one.key for one in images_at(tmp_path / "in")}) == 4


def test_joined_tars_are_read_to_their_end(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", [(f"{i}.png", encoded(image(i)))])
    joined = tmp_path / "joined" / "all.tar"
    joined.parent.mkdir()
    joined.write_bytes(b"".join((tmp_path / f"{i}.tar").read_bytes() for i in range(3)))
    assert keys(joined) == ["0", "1", "2"]
    assert [one.content() for one in images_at(joined)] == [encoded(image(i)) for i in range(3)]


@pytest.mark.parametrize("damage", ["behind the end", "cut between members", "cut within a header", "header", "page"])
def test_a_damaged_tar_is_an_error_and_no_smaller_set(tmp_path: Path, damage: str) -> None:
    whole = write_tar(tmp_path / "a.tar", [(f"{i}.png", encoded(image(i))) for i in range(3)]).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        third = tar.getmembers()[2].offset
    content = {
        "behind the end": whole + b"garbage" * 200,
        "cut between members": whole[:third],
        "cut within a header": whole[: third + 100],
        "header": whole[:third] + b"\xff" * 512 + whole[third + 512 :],
        "page": b"<html>404</html>" * 100,
    }[damage]
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"a.tar: expected an uncompressed tar of images, found"):
        read_set(tmp_path / "a.tar")


def test_one_stray_tar_in_a_folder_hides_no_image(tmp_path: Path) -> None:
    write_folder(tmp_path, 5)
    write_tar(tmp_path / "stray.tar", [("00000.png", encoded(image(9))), ("readme.md", b"")])
    (tmp_path / "more.tar.gz").write_bytes(b"\x1f\x8b")
    found = read_set(tmp_path)
    assert len(found.images) == len({one.key for one in found.images}) == 6
    assert found.told().startswith(
        "6 images (5 files, 1 in 1 tar); left out: 2 (.gz is not read: 1, the first more.tar.gz"
    )


def test_what_is_hidden_or_no_image_is_named_and_links_are_followed_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 2)
    write_folder(folder / ".ipynb_checkpoints", 2)
    write_folder(tmp_path / "elsewhere", 3)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "._00000.png").write_bytes(b"a Mac's leftover")
    (folder / "photo.heic").write_bytes(b"")
    found = read_set(folder)
    assert [one.name for one in found.images] == ["00000.png", "00001.png", *(f"link/0000{i}.png" for i in range(3))]
    assert dict(found.left_out) == {
        ".ipynb_checkpoints/00000.png": "hidden",
        ".ipynb_checkpoints/00001.png": "hidden",
        "._00000.png": "hidden",
        "loop": "a link to a folder that is read already",
        "photo.heic": ".heic is not read",
    }


def test_what_a_mac_adds_to_a_tar_is_hidden(tmp_path: Path) -> None:
    names = ("a.png", "._a.png", "__MACOSX/a.png", ".thumbs/b.png")
    found = read_set(write_tar(tmp_path / "a.tar", [(name, encoded(image(0))) for name in names]))
    assert [one.name for one in found.images] == ["a.png"]
    assert [reason for _, reason in found.left_out] == ["hidden"] * 3


def test_the_sheet_of_generate_is_no_sample(tmp_path: Path) -> None:
    write_folder(tmp_path, 2)
    save_image(image(3), tmp_path / "grid.png", {"prompts": ["a"]})
    assert keys(tmp_path) == ["00000", "00001"]
    (tmp_path / "grid.png").write_bytes(encoded(image(3)))  # somebody's own
    assert len(keys(tmp_path)) == 3


def test_links_and_folders_above_in_a_tar_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded(image(7)))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("../secret.png", "/etc/secret.png", "a.png"):
            member = tarfile.TarInfo(name)
            content = encoded(image(len(name)))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        tar.addfile(link)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(buffer.getvalue())
    before = sorted(tmp_path.rglob("*"))
    found = read_set(tmp_path / "in")
    assert [one.content() for one in found.images] == [encoded(image(n)) for n in (13, 15, 5)]
    assert [reason for _, reason in found.left_out] == ["no regular file in a tar"]
    assert sorted(tmp_path.rglob("*")) == before


def test_captions_that_are_no_utf8_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(image(0)))
    (tmp_path / "a.txt").write_bytes("ein Bär".encode("latin-1"))
    with pytest.raises(UserError, match=r"a.txt: expected a caption in UTF-8, found other bytes"):
        _ = images_at(tmp_path)[0].caption
    (tmp_path / "a.txt").write_bytes("\ufeffein Bär\n".encode())
    assert images_at(tmp_path)[0].caption == "ein Bär"


def test_turned_and_deep_copies_have_the_same_features(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    for i in range(4):
        picture = image(i, (20, 12))
        upright = picture.transpose(Image.Transpose.ROTATE_270)
        grey = np.asarray(upright.convert("L"))
        for name, content in {
            "plain": encoded(upright),
            "turned": encoded(picture, "PNG", exif=turned),
            "grey": encoded(Image.fromarray(grey)),
            "deep": encoded(Image.fromarray(grey.astype(np.uint16) * 257)),
        }.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{i}.png").write_bytes(content)
    extractor = load_extractor("efficientnet-lite0", torch.device("cpu"), batch_size=4)
    store = FeatureStore(tmp_path / "cache", extractor)
    for one, other in (("plain", "turned"), ("grey", "deep")):
        a, b = (images_at(tmp_path / name) for name in (one, other))
        assert torch.equal(store.features(a).features, store.features(b).features)
        assert store.sizes(a) == store.sizes(b) == {(12, 20): 4}


def test_evaluate_prints_how_many_images_it_used_and_what_it_left_out(tmp_path: Path) -> None:
    real, fake = write_folder(tmp_path / "real", 6), write_folder(tmp_path / "fake", 6, start=10)
    (real / "a.avif").write_bytes(b"")
    output = tmp_path / "found.json"
    arguments = ["--real", real, "--fake", fake, "--cache", tmp_path / "cache", "-o", output]
    result = CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "real: 6 images; left out: 1 (.avif is not read: 1, the first a.avif)" in result.stderr
    assert "fake: 6 images\n" in result.stderr
    sets = json.loads(output.read_text())["sets"]
    assert sets["real"] == {"images": 6, "left_out": [{"name": "a.avif", "reason": ".avif is not read"}]}
    assert sets["fake"] == {"images": 6, "left_out": []}
