"""`python -m pipeline.cli.config_reference > docs/config.md`: every key of the pipeline config and the cluster file."""

from __future__ import annotations

from pipeline.config.pipeline import PipelineConfig
from pipeline.config.reference import reference
from pipeline.slurm.cluster import ClusterConfig

_INTRODUCTION = """\
# Every config key

Made by `python -m pipeline.cli.config_reference > docs/config.md`; change the classes in `pipeline/config/` instead.

Keys go into a YAML file, or on the command line with dots: `smalti run configs/openmoji.yaml transformer.layers=8`.
`smalti run CONFIG --print-config` prints a config with its defaults. A key that changes results outdates its stage and
what depends on it; one that does not can be changed at any time. Files of whole pipelines are in `configs/`, cluster
files in `configs/cluster/`.

A key stands once in a section; a second one is an error with both lines. Text that YAML takes for something else
(`yes`, `8`) needs quotes; `2024_01_05` and `2024-01-05` are text. A value on the command line is a number, `true`,
`false` or `null` where YAML says so, a list or a section in brackets, and else the text as it is: `"report.title=Run
#5 of May"`. No key's result comes from the environment: variables that libraries read for that are pinned or refused
by name.
"""


def page() -> str:
    """The text of docs/config.md."""
    return (
        _INTRODUCTION
        + reference(PipelineConfig, "The pipeline config", changes_results=True)
        + "\n"
        + reference(ClusterConfig, "The cluster file", changes_results=False)
    )


if __name__ == "__main__":
    print(page(), end="")
