"""What a sweep of sampling's settings found: its curves, and its table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.report.plots import Panel, Series, curve_plot

_NAMES = {"guidance": "guidance", "temperature": "temperature", "top_k": "top-k"}
_DISTANCES = ("FD (", "FID (")


@dataclass(frozen=True)
class SweepFacts:
    panels: list[Panel]
    columns: list[str]  # names of the settings and of the metrics
    rows: list[
        tuple[bool, list[str], list[float | None]]
    ]  # nearest first: whether it is the best one, its setting, its metrics
    best: str
    compares: str
    samples: int


def sweep_facts(sweep: dict[str, Any]) -> SweepFacts:
    """From the entry `sweep` of evaluate/metrics.json."""
    settings = sweep["settings"]
    varied = [name for name in _NAMES if len({setting[name] for setting in settings}) > 1] or ["temperature"]
    metrics = list(settings[0]["metrics"])
    shown = [name for name in metrics if name.startswith((*_DISTANCES, "KID", "IS", "precision", "recall"))]
    distance = next(name for name in shown if name.startswith(_DISTANCES))
    rows = [
        (i == sweep["best"], [_text(s[name]) for name in _NAMES], [s["metrics"][name] for name in shown])
        for i, s in sorted(enumerate(settings), key=lambda pair: pair[1]["metrics"][distance])
    ]
    best = settings[sweep["best"]]
    told = ", ".join(f"{_NAMES[name]} {_text(best[name])}" for name in _NAMES)
    columns = [*_NAMES.values(), *shown]
    return SweepFacts(_panels(settings, best, varied, shown), columns, rows, told, sweep["compares"], sweep["samples"])


def _panels(settings: list[dict[str, Any]], best: dict[str, Any], varied: list[str], metrics: list[str]) -> list[Panel]:
    """Fréchet distance against Inception Score and precision against recall, along the setting with most values."""
    distance = next(name for name in metrics if name.startswith(_DISTANCES))
    pairs = [(_with("IS", metrics), distance), (_with("recall", metrics), _with("precision", metrics))]
    along = max(varied, key=lambda name: len({setting[name] for setting in settings}))
    panels = []
    for x, y in pairs:
        lines: dict[str, list[dict[str, Any]]] = {}
        for setting in settings:
            if x and y and setting["metrics"][x] is not None and setting["metrics"][y] is not None:
                label = ", ".join(f"{_NAMES[name]} {_text(setting[name])}" for name in varied if name != along)
                lines.setdefault(label, []).append(setting)
        if not (x and y and lines):
            continue
        series: list[Series] = [
            (label, [s["metrics"][x] for s in line], [s["metrics"][y] for s in line]) for label, line in lines.items()
        ]
        marks = [[_text(s[along]) for s in line] for line in lines.values()]
        ring = (
            (best["metrics"][x], best["metrics"][y]) if None not in (best["metrics"][x], best["metrics"][y]) else None
        )
        title = f"{y.split(' (')[0]} against {x.split(' (')[0]}, along {_NAMES[along]}"
        panels.append(Panel(title, curve_plot(series, marks, ring, x, y, salt=f"sweep {title}")))
    return panels


def _with(start: str, metrics: list[str]) -> str | None:
    return next((name for name in metrics if name.startswith(start)), None)


def _text(value: float | None) -> str:
    return "all" if value is None else f"{value:g}"
