"""Images as JPEG and PNG through prepare and tokenize, on one process and on several: the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.data.sample_images import encoded, image, write_tar
from tests.launch import launch


@pytest.mark.slow
def test_one_process_and_four_make_the_same_bytes_of_jpegs_and_pngs_and_leave_out_the_same_copies(
    tmp_path: Path,
) -> None:
    members: list[tuple[str, bytes]] = []
    for number in range(40):
        scene = image(number, (8, 8)).resize((64, 64), Image.Resampling.BICUBIC)
        members += [(f"{number}.png", encoded(scene)), (f"{number}.txt", f"scene {number}".encode())]
    tar = write_tar(tmp_path / "images.tar", members)
    sizes = ["--samples", "120", "--per-tar", "12", "--ways", "1,4", "--near-duplicates"]
    output = launch("benchmarks.real_bytes", str(tmp_path / "out"), str(tar), *sizes)  # fails where a byte differs
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("| ")]
    digests = {(row[0], row[1]): row[-1] for row in rows[1:]}
    assert digests["1", "prepare"] == digests["4", "prepare"]
    assert digests["1", "tokenize"] == digests["4", "tokenize"] != digests["1", "prepare"]
    rejected = {way: (tmp_path / "out" / way / "tiny/prepare/rejected.jsonl").read_text() for way in "14"}
    assert rejected["1"] == rejected["4"]
    assert 5 < rejected["1"].count("near-duplicate") < 110
