"""Stage prepare: captioned images from any source -> image shards.

Reads the source of `prepare.source`. Decodes, checks, filters, crops and resizes every image once; splits by a
hash of the key; writes WebDataset tars (train/, val/), their catalog, index.json, rejected.jsonl and
contact-sheet.png. Array tasks share the parts of the source; the stage itself, after the tasks, looks for duplicates
and makes the catalog and the index.
See pipeline/data/prepare.py.
"""

from __future__ import annotations

from PIL import Image

from pipeline.cli.stage import run_stage
from pipeline.data.catalog_columns import FOLDER
from pipeline.data.prepare import prepare, prepare_share
from pipeline.orchestration.stage_run import StageRun


def main(run: StageRun) -> None:
    """Run the stage, or an array task of it, in `run`; rank 0 does the work."""
    if run.array_task is not None:
        prepare_share(run.directory, run.config.prepare, run.seed, run.my_share, run.pieces_done)
        return
    # Imported here: worker processes import this file, too, and need no torch.
    from pipeline.core import distributed

    if distributed.is_main():
        index = prepare(run.directory, run.config.prepare, run.seed)
        for name, split in index["splits"].items():
            run.add_output(f"{name}.shards")
            if split["shards"]:
                run.add_output(name)
        run.add_output(FOLDER)
        for name in ("index.json", "rejected.jsonl", "contact-sheet.png"):
            run.add_output(name, artifact=True)
        counts = {f"{name}_samples": float(split["samples"]) for name, split in index["splits"].items()}
        run.tracker.log({**counts, "rejected_samples": float(index["rejected"]["samples"])}, step=0)
        with Image.open(run.directory / "contact-sheet.png", formats=("PNG",)) as sheet:
            run.tracker.log_image("contact-sheet", sheet, step=0)
    distributed.barrier()


if __name__ == "__main__":
    run_stage("prepare", main)
