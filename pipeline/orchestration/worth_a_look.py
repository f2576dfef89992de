"""What the owner of a finished run should know and no error says: a short list that `smalti run` ends with and the
report begins with.

Read from the records of its stages; imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config.pipeline import PipelineConfig
from pipeline.core.atomic_io import read_json
from pipeline.orchestration.graph import stages_of
from pipeline.orchestration.tracking import read_history

_CUT = 0.01  # the share of captions that a window may cut
_RISE = 0.05  # by how much of its minimum a validation loss may rise before it is more than noise


def worth_a_look(config: PipelineConfig, directories: Mapping[str, Path]) -> list[str]:
    """A line a finding, of the stages in `directories` (by stage name); one that is missing has none."""
    found = _captions_cut(config, directories) + _low_usage(config, directories)
    for stage in stages_of(config):
        if stage.trains and stage.name in directories:
            found += _rising_validation(stage.name, read_history(directories[stage.name]))
    return found


def _captions_cut(config: PipelineConfig, directories: Mapping[str, Path]) -> list[str]:
    path = directories.get("text-tokenizer", Path()) / "stats.json"
    stats = dict(read_json(path)) if path.is_file() else {}
    share = float(stats.get("captions_cut_share", 0))
    if share <= _CUT:
        return []
    return [
        f"text-tokenizer: {share:.0%} of the captions are longer than text_length {config.text_tokenizer.text_length}"
        f" and were cut; text_tokenizer.text_length={stats['tokens_per_caption/p99']:.0f} would keep 99 % of them whole"
    ]


def _low_usage(config: PipelineConfig, directories: Mapping[str, Path]) -> list[str]:
    if "image-tokenizer" not in directories:
        return []
    usage: dict[str, float] = {}  # by level, the last that was measured
    for metrics in read_history(directories["image-tokenizer"]):
        usage |= {name: value for name, value in metrics.items() if name.startswith("val/codebook_usage")}
    floor = config.image_tokenizer.usage_floor
    low = [f"{value:.0%}{_level(name)}" for name, value in usage.items() if value < floor]
    if not low:
        return []
    return [
        f"image-tokenizer: {', '.join(low)} of the codes are in use, fewer than usage_floor {floor:.0%}:"
        " a smaller codebook loses nothing, or see docs/tokenizers.md on collapse"
    ]


def _level(name: str) -> str:
    level = re.search(r"_(\d+)$", name)
    return f" on level {level[1]}" if level else ""


def _rising_validation(stage: str, history: Sequence[Mapping[str, float]]) -> list[str]:
    """Of each loss that is both trained and validated: whether the one rose while the other fell."""
    found = []
    for name in sorted({name for metrics in history for name in metrics if name.startswith("val/loss")}):
        validated, trained = _by_step(history, name), _by_step(history, name.removeprefix("val/"))
        best = min(validated, key=lambda step: validated[step])
        last = max(validated)
        then = [value for step, value in trained.items() if step <= best]
        if validated[last] > (1 + _RISE) * validated[best] and then and trained[max(trained)] < then[-1]:
            found.append(
                f"{stage}: {name} rose from {validated[best]:.4g} at step {best} to {validated[last]:.4g} at step"
                f" {last}, while it fell in training: the model learns its samples by heart; training.keep_best"
                " takes the best step, and fewer steps, more samples or dropout help"
            )
    return found


def _by_step(history: Sequence[Mapping[str, float]], name: str) -> dict[int, float]:
    return {int(metrics["step"]): metrics[name] for metrics in history if name in metrics}
