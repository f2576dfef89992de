"""Classes as captions: the folder of an image, or KEY.cls in a tar; a caption comes first."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from pipeline.config.prepare import PrepareConfig
from pipeline.core.image_io import png_bytes
from pipeline.data.prepare import prepare
from pipeline.data.shards import read_samples
from tests.data.sample_images import image


def captions(source: dict[str, object], out: Path) -> dict[str, str]:
    config = {"source": source, "image_size": 16, "validation_fraction": 0, "workers": 1, "max_rejected_fraction": 1}
    prepare(out, PrepareConfig.model_validate(config), seed=0)
    return {sample.key: sample.caption for sample in read_samples(out, "train")}


def test_a_folder_is_the_class_of_its_images(tmp_path: Path) -> None:
    for name in ("n01440764/a.png", "n01443537/b.png", "more/n01443537/c.png", "d.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(image(len(name))))
        path.with_suffix(".txt").write_text("a caption")
    source: dict[str, object] = {"kind": "folder", "path": str(tmp_path / "images"), "captions": "folders"}
    found = captions(source, tmp_path / "out")
    assert sorted(found.values()) == ["n01440764", "n01443537", "n01443537"]
    assert '"missing caption"' in (tmp_path / "out" / "rejected.jsonl").read_text()  # of d.png


def test_a_tars_cls_is_the_caption_of_a_sample_that_has_no_other(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, files in enumerate(
            ({"cls": b"17\n"}, {"cls": b"3", "txt": b"a fish"}, {"cls": b"5", "json": b"{}"}, {"json": b"{}"})
        ):
            for extension, content in {"png": png_bytes(image(number)), **files}.items():
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    found = captions({"kind": "webdataset", "urls": str(tmp_path / "a.tar")}, tmp_path / "out")
    assert found == {"000": "17", "001": "a fish", "002": "5"}
