"""A model's folder is loaded in the precision that is asked for, and in no other on the way: bytes of the process."""

from __future__ import annotations

import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pipeline.config.transformer import TransformerShape
from pipeline.core.atomic_io import write_json
from pipeline.core.tensor_file import TensorLayout
from pipeline.core.weights import weight_files, write_weights
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from tests.launch import ROOT, command, environment

SHARD_BYTES = 80_000_000


def _export(folder: Path, **shape: int) -> int:
    """A folder as exports write it, in several files where it is large; how many parameters it has."""
    folder.mkdir()
    with torch.device("meta"):
        model = Transformer(Layout.of(8, 400, [(4, 4, 64)]), TransformerShape(heads=8, **shape))
    layouts = {name: TensorLayout.of(value) for name, value in model.state_dict().items()}
    write_weights(
        folder, layouts, lambda name: torch.zeros(layouts[name].shape, dtype=layouts[name].dtype), SHARD_BYTES
    )
    write_json(folder / "config.json", model.exported_config())
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("how", ["AutoModel", "ours"])
@pytest.mark.slow
def test_weights_in_several_files_are_loaded_in_bf16_with_no_copy_in_float32(how: str, tmp_path: Path) -> None:
    before_it = _export(tmp_path / "small", layers=1, width=64)
    parameters = _export(tmp_path / "large", layers=6, width=1024)
    assert len(weight_files(tmp_path / "large")) > 3
    arguments = [how, str(tmp_path / "small"), str(tmp_path / "large")]
    process = subprocess.Popen(
        command("tests.core.loading_worker", arguments),
        env=environment(),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    with process, ThreadPoolExecutor(1) as reader:
        assert process.stdout.readline() == "ready\n"
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "ready\n"  # it has loaded the small one, with all that it takes to load
        before = peak = _own_memory(process.pid)
        print(file=process.stdin, flush=True)
        told = reader.submit(process.stdout.readline)
        while not told.done():
            peak = max(peak, _own_memory(process.pid))
            time.sleep(0.001)
        assert told.result() == "loaded\n"
        peak = max(peak, _own_memory(process.pid))  # it waits; since the last look it may have loaded more
        print(file=process.stdin, flush=True)
    rise = peak - before
    # Bytes; in float32 there are 4 of each, beside these. What the small one took may be taken again.
    assert 2 * (parameters - before_it) <= rise <= 2.5 * parameters


def _own_memory(process: int) -> int:
    """Bytes that are resident and of no file; of files that are mapped the system may take any page."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found
    return int(found[1]) * 1024
