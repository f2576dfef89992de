"""Training curves as inline SVG that takes the page's own colours, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Stand-ins that no plot uses otherwise; in the SVG they become the page's CSS variables.
_INK, _FAINT = "#010203", "#040506"
_LINES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04")
_CSS = {_INK: "var(--ink-soft)", _FAINT: "var(--rule)"} | {
    colour: f"var(--line-{i})" for i, colour in enumerate(_LINES)
}

Series = tuple[str, list[float], list[float]]  # label, steps, values


@dataclass(frozen=True)
class Panel:
    title: str
    svg: str


def panels(history: Sequence[dict[str, float]], name: str) -> list[Panel]:
    """A plot for each kind of figure in a stage's metrics: losses, PSNR, the learning rate."""
    keys = sorted({key for line in history for key in line})
    kinds = (
        ("Loss", [key for key in keys if "loss" in key.split("/") or key.split("/")[-1] == "reconstruction"]),
        ("PSNR, dB", [key for key in keys if "psnr" in key]),
        ("Accuracy of the next token", [key for key in keys if "accuracy" in key.split("/")]),
        ("Codes in use", [key for key in keys if "usage" in key or "perplexity" in key]),
        ("Learning rate", [key for key in keys if key == "learning_rate"]),
    )
    found = []
    for title, wanted in kinds:
        series = [
            (
                key.replace("_", " "),
                [line["step"] for line in history if key in line],
                [line[key] for line in history if key in line],
            )
            for key in wanted[: len(_LINES)]
        ]
        if series:
            found.append(Panel(title, line_plot(series, salt=f"{name} {title}")))
    return found


def line_plot(series: Sequence[Series], salt: str) -> str:
    """Lines over steps as an `<svg>` element. `salt` keeps the ids of different plots on one page apart."""
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _FAINT,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _FAINT,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for (label, steps, values), colour in zip(series, _LINES, strict=False):
            dense = len(values) > 200
            if dense:
                axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
            axes.plot(steps, _smoothed(values) if dense else values, color=colour, linewidth=1.5, label=label)
            if len(values) < 30:
                axes.plot(steps, values, "o", color=colour, markersize=2.5)
        values = [value for _, _, values in series for value in values]
        if min(values) > 0 and max(values) > 30 * min(values) and "learning" not in series[0][0]:
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        axes.set_xlabel("step")
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        if len(series) > 1:
            axes.legend(frameon=False, handlelength=1.2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue())


def _smoothed(values: list[float], memory: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = memory * average + (1 - memory) * value, memory * weight + 1 - memory
        result.append(average / weight)
    return result


def _inline(svg: str) -> str:
    """Without prologue, metadata and fixed size; colours and fonts of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for stand_in, variable in _CSS.items():
        svg = svg.replace(stand_in, variable)
    return svg
