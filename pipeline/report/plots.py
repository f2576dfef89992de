"""Plots of trainings and of sweeps as inline SVG that takes the page's own colours, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Stand-ins that no plot uses otherwise; in the SVG they become the page's CSS variables.
_INK, _FAINT = "#010203", "#040506"
_LINES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04")
_DASHES = ("-", "--", ":", "-.")
_MOST_LINES = len(_LINES) * len(_DASHES)  # each with a look of its own
_CSS = {_INK: "var(--ink-soft)", _FAINT: "var(--rule)"} | {
    colour: f"var(--line-{i})" for i, colour in enumerate(_LINES)
}

Series = tuple[str, list[float], list[float]]  # label, steps, values


@dataclass(frozen=True)
class Panel:
    """A plot, as an `<svg>` element, and the title above it; `note`: what it does not show."""

    title: str
    svg: str
    note: str = ""


def panels(history: Sequence[dict[str, float]], name: str, best: tuple[str, float, int] | None = None) -> list[Panel]:
    """A plot for each kind of metric in a stage's history: losses, PSNR, the learning rate.

    `best`: the metric, value and step of the model, where it is not of the last step; that point has a ring.
    """
    keys = sorted({key for line in history for key in line if not key.startswith("best/")})
    kinds = (
        ("Loss", [key for key in keys if "loss" in key.split("/") or key.split("/")[-1] == "reconstruction"]),
        ("Reward", [key for key in keys if key.split("/")[-1] == "reward"]),
        ("Divergence from the start, nats a code", [key for key in keys if key == "kl"]),
        ("PSNR, dB", [key for key in keys if "psnr" in key]),
        ("Accuracy", [key for key in keys if "accuracy" in key.split("/")]),
        ("Retrieval on the validation split", [key for key in keys if key.startswith("val/") and " R@" in key]),
        ("Share of codes in use", [key for key in keys if "usage" in key]),
        ("Perplexity of the codebook", [key for key in keys if "perplexity" in key]),
        ("Learning rate", [key for key in keys if key == "learning_rate"]),
    )
    found = []
    for title, wanted in kinds:
        shown = _most_telling(wanted, best[0] if best else None)
        series = [
            (
                key.replace("_", " "),
                [line["step"] for line in history if key in line],
                [line[key] for line in history if key in line],
            )
            for key in shown
        ]
        if series:
            ring = (best[2], best[1]) if best and best[0] in shown else None
            note = f"{len(shown)} of {len(wanted)} curves; metrics.jsonl has all" if len(shown) < len(wanted) else ""
            found.append(Panel(title, line_plot(series, f"{name} {title}", ring), note))
    return found


def _most_telling(keys: Sequence[str], best: str | None) -> list[str]:
    """As many keys as a plot has looks: the best one's, totals before levels, validation before training."""

    def order(key: str) -> tuple[bool, int, bool, int]:
        level = re.search(r"[/_](\d+)$", key)
        return key != best, level is not None, not key.startswith("val/"), int(level[1]) if level else 0

    return sorted(keys, key=order)[:_MOST_LINES]


def line_plot(series: Sequence[Series], salt: str, ring: tuple[float, float] | None = None) -> str:
    """Lines over steps as an `<svg>` element. `salt` names it, and keeps its ids apart from other plots'.

    `ring`: a step and a value with a ring around.
    """
    crowded = len(series) > len(_LINES)
    with _drawn(salt, 2.5 + (_legend_height(series) if crowded else 0)) as (figure, buffer):
        axes = figure.add_subplot()
        for i, (label, steps, values) in enumerate(series):
            colour, dashes = _look(i)
            dense = len(values) > 200 and "learning" not in label
            if dense:
                axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
            axes.plot(steps, _smoothed(values) if dense else values, dashes, color=colour, linewidth=1.5, label=label)
            if len(values) < 30:
                axes.plot(steps, values, "o", color=colour, markersize=2.5)
        if ring:
            _ring(axes, ring)
        values = [value for _, _, values in series for value in values]
        if min(values) > 0 and max(values) > 30 * min(values) and "learning" not in series[0][0]:
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        axes.set_xlabel("step")
        _bare(axes, legend=len(series) > 1 and not crowded)
        if crowded:
            _legend_below(figure)
    return _inline(buffer.getvalue(), salt)


def curve_plot(
    series: Sequence[Series],
    marks: Sequence[Sequence[str]],
    best: tuple[float, float] | None,
    x_label: str,
    y_label: str,
    salt: str,
) -> str:
    """Points joined in their order, each with its mark (`marks[series][point]`), and a ring around the point `best`,
    as an `<svg>` element."""
    with _drawn(salt, height=2.9 + _legend_height(series)) as (figure, buffer):
        axes = figure.add_subplot()
        if best:
            _ring(axes, best)
        for i, ((label, x, y), texts) in enumerate(zip(series, marks, strict=True)):
            colour, dashes = _look(i)
            axes.plot(x, y, dashes, color=colour, marker="o", markersize=3.5, linewidth=1.3, label=label)
            for text, at_x, at_y in zip(texts, x, y, strict=True):
                axes.annotate(text, (at_x, at_y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _bare(axes, legend=False)
        if len(series) > 1:
            _legend_below(figure)
    return _inline(buffer.getvalue(), salt)


def standalone(svg: str) -> str:
    """An inline plot as a whole SVG file, in the colours of the light page."""
    colours = "--ink-soft:#6c6860;--rule:#e4e0d7;--line-0:#a8431f;--line-1:#1f6f8b;--line-2:#6b7f2a;--line-3:#8a4f9e"
    head, rest = svg.split(">", 1)
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    style = f"<style>svg{{{colours};background:#fff;font-family:sans-serif}}</style>"
    return f"{head.replace('<svg', f'<svg {namespaces}', 1)}>{style}{rest}"


def _look(i: int) -> tuple[str, str]:
    """Colour and dashes of a plot's i-th line."""
    return _LINES[i % len(_LINES)], _DASHES[i // len(_LINES) % len(_DASHES)]


def _legend_below(figure: Figure) -> None:
    """Where it covers no line."""
    figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=2.4, fontsize=8)


def _legend_height(series: Sequence[Series]) -> float:
    """In inches, below the plot."""
    return 0.17 * -(-len(series) // 2)


def _ring(axes: Axes, point: tuple[float, float]) -> None:
    axes.plot(*point, "o", color=_LINES[0], markersize=12, markerfacecolor="none", markeredgewidth=1)


@contextmanager
def _drawn(salt: str, height: float = 2.5) -> Iterator[tuple[Figure, io.StringIO]]:
    """A figure to draw on; when the block ends, its SVG is in the buffer."""
    style: Any = {  # matplotlib's own type of it lists three hundred names
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
        figure, buffer = Figure(figsize=(4.4, height), layout="constrained"), io.StringIO()
        yield figure, buffer
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})


def _bare(axes: Axes, legend: bool) -> None:
    axes.grid(axis="y", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, handlelength=1.2)


def _smoothed(values: list[float], memory: float = 0.85) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = memory * average + (1 - memory) * value, memory * weight + 1 - memory
        result.append(average / weight)
    return result


def _inline(svg: str, name: str) -> str:
    """The SVG without prologue, metadata and fixed size, in the colours and fonts of the page; `name` is read aloud."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    label = f'role="img" aria-label="plot: {escape(name)}"'
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', lambda head: f'<svg viewBox="{head[1]}" {label}>', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for stand_in, variable in _CSS.items():
        svg = svg.replace(stand_in, variable)
    return svg
