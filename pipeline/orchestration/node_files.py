"""Whether each node of a training sees the files of its inputs: a node may lack a mount, or have another folder there.

One process a node looks at each file once: rank 0 when it begins the stage, and here the first one of every other node.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from pipeline.config.pipeline import PipelineConfig
from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.manifest import first_fault
from pipeline.orchestration.graph import Stage, inputs_of
from pipeline.orchestration.run_directory import RunDirectory


def refuse_nodes_that_see_other_files(config: PipelineConfig, stage: Stage, runs: RunDirectory) -> None:
    """Collective, once rank 0 has found the inputs of `stage` up to date.

    Raises:
        UserError: a node does not see what rank 0 does; on every rank.
    """
    hashes = distributed.broadcast_object(_hashes(config, stage, runs) if distributed.is_main() else {})
    looks = distributed.local_rank() == 0 and not distributed.is_main()
    told = _difference(runs, hashes) if looks else None
    if found := next((one for one in distributed.all_gather_objects(told) if one), None):
        raise UserError(f"{stage.name}: {found}: see that all nodes mount the same file system there")


def _hashes(config: PipelineConfig, stage: Stage, runs: RunDirectory) -> dict[str, str]:
    found = {name: runs.manifest(name) for name in inputs_of(config, stage)}
    return {name: manifest["hash"] for name, manifest in found.items() if manifest is not None}


def _difference(runs: RunDirectory, hashes: Mapping[str, str]) -> str | None:
    """The first thing that is other than rank 0 sees it; None: all is the same."""
    for name, expected in hashes.items():
        manifest = runs.manifest(name)
        if manifest is None or manifest["hash"] != expected:
            seen = "none" if manifest is None else f"that of {manifest['hash'][:12]}"
            path = runs.stage(name) / "manifest.json"
            return f"{path} on {socket.gethostname()}: expected that of {expected[:12]}, as rank 0 sees, found {seen}"
        if fault := first_fault(runs.stage(name), manifest["outputs"], hashed=False):
            return f"{fault.path} on {socket.gethostname()}: expected {fault.expected}, found {fault.found}"
    return None
