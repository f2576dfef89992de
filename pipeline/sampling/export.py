"""`smalti export RUN DIR`: the models of a run as one folder that needs nothing else; with `--step N`, one of them
(`training/consolidate.py`).

    DIR/  README.md  pipeline.json  text-tokenizer/  image-tokenizer/  transformer/  reranker/  prompts.png

Weights are safetensors, everything else is JSON or text: loading it runs no code. `Pipeline.from_pretrained(DIR)` and
`smalti generate DIR "a prompt"` take it like a run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.core.atomic_io import atomic_path, read_json, write_atomic, write_json
from pipeline.core.errors import UserError
from pipeline.core.weights import model_files
from pipeline.core.writable import new_folder


def export_run(run_directory: Path, target: Path) -> None:
    """Export a run's models, config and model card to the folder `target`, atomically: it is complete or not there.

    Raises:
        UserError: the run is not finished, or `target` holds something.
    """
    from pipeline.config.base import identity
    from pipeline.core.version import VERSION
    from pipeline.orchestration.run_directory import RunDirectory
    from pipeline.sampling.model_card import model_card
    from pipeline.sampling.model_source import EXPORT_RECORD, find_models
    from pipeline.transformer.model import EXPORTED_TYPE

    source = find_models(run_directory)
    with new_folder(target) as draft:
        _copy(source.text_tokenizer, draft / "text-tokenizer", "tokenizer.json", "config.json")
        _copy(source.image_tokenizer, draft / "image-tokenizer", *model_files(source.image_tokenizer))
        _copy(source.transformer, draft / "transformer", *model_files(source.transformer))
        config = read_json(source.transformer / "config.json")
        write_json(draft / "transformer" / "config.json", config | {"model_type": EXPORTED_TYPE})
        if source.reranker:
            _export_reranker(source.reranker, draft / "reranker")
        grid = run_directory / "generate" / "prompts.png"
        has_grid = grid.is_file() and RunDirectory(run_directory).is_of_these_inputs("generate")
        if has_grid:
            _copy(grid.parent, draft, grid.name)
        record = {
            "model_hash": source.model_hash,
            "guidance_trained": source.guidance_trained,
            "sampling": identity(source.sampling),
            "smalti": VERSION,
        }
        write_json(draft / EXPORT_RECORD, record)
        write_atomic(draft / "README.md", model_card(run_directory, source, has_grid=has_grid))


def _copy(source: Path, target: Path, *names: str) -> None:
    for name in names:
        with atomic_path(target / name) as temporary:
            shutil.copyfile(source / name, temporary)


def _export_reranker(source: Path, target: Path) -> None:
    """Copy the run's own reranker, or all of a pretrained CLIP's folder, so that the export needs nothing else."""
    values = read_json(source / "config.json")
    if values.get("kind") == "clip":
        folder = Path(values["path"])
        names = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".txt"))
        if "model.safetensors" not in names:
            raise UserError(
                f"{folder}: expected model.safetensors to export, found none: save this CLIP as safetensors"
            )
        _copy(folder, target, *names)
    else:
        _copy(source, target, "model.safetensors", "config.json")
