"""The results of a sweep over settings of sampling: its plots and its table."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.evaluation.results import SweepResult, SweepSetting
from pipeline.report.plots import Panel, Series, curve_plot

_NAMES = {"guidance": "guidance", "temperature": "temperature", "top_k": "top-k"}
_DISTANCES = ("FD (", "FID (")


@dataclass(frozen=True)
class SweepFacts:
    """What the page shows of a sweep."""

    panels: list[Panel]
    columns: list[str]  # names of the settings and of the metrics
    rows: list[tuple[bool, list[str], list[float | None]]]  # lowest distance first: is it the best, setting, metrics
    best: str
    compares: str
    samples: int


def sweep_facts(sweep: SweepResult) -> SweepFacts:
    """The plots and the table of a sweep's results."""
    settings = sweep["settings"]
    varied = [name for name in _NAMES if len({_values(setting)[name] for setting in settings}) > 1] or ["temperature"]
    metrics = list(settings[0]["metrics"])
    shown = [name for name in metrics if name.startswith((*_DISTANCES, "KID", "IS", "precision", "recall"))]
    distance = next(name for name in shown if name.startswith(_DISTANCES))
    rows = [
        (i == sweep["best"], [_text(value) for value in _values(s).values()], [s["metrics"][name] for name in shown])
        for i, s in sorted(enumerate(settings), key=lambda pair: _or_infinite(pair[1]["metrics"][distance]))
    ]
    best = settings[sweep["best"]]
    told = ", ".join(f"{_NAMES[name]} {_text(value)}" for name, value in _values(best).items())
    columns = [*_NAMES.values(), *shown]
    return SweepFacts(_panels(settings, best, varied, shown), columns, rows, told, sweep["compares"], sweep["samples"])


def _panels(settings: list[SweepSetting], best: SweepSetting, varied: list[str], metrics: list[str]) -> list[Panel]:
    """Fréchet distance against Inception Score and precision against recall, along the setting with most values."""
    distance = next(name for name in metrics if name.startswith(_DISTANCES))
    along = max(varied, key=lambda name: len({_values(setting)[name] for setting in settings}))
    panels = []
    for x, y in ((_with("IS", metrics), distance), (_with("recall", metrics), _with("precision", metrics))):
        if x is None or y is None:
            continue
        lines: dict[str, list[tuple[str, tuple[float, float]]]] = {}  # mark and point of each setting, by line
        for setting in settings:
            point = _point(setting, x, y)
            if point is not None:
                values = _values(setting)
                label = ", ".join(f"{_NAMES[name]} {_text(values[name])}" for name in varied if name != along)
                lines.setdefault(label, []).append((_text(values[along]), point))
        if not lines:
            continue
        series: list[Series] = [
            (label, [point[0] for _, point in line], [point[1] for _, point in line]) for label, line in lines.items()
        ]
        marks = [[mark for mark, _ in line] for line in lines.values()]
        title = f"{y.split(' (')[0]} against {x.split(' (')[0]}, along {_NAMES[along]}"
        plot = curve_plot(series, marks, _point(best, x, y), x, y, salt=f"sweep {title}")
        panels.append(Panel(title, plot))
    return panels


def _values(setting: SweepSetting) -> dict[str, float | None]:
    """The varied settings by name, in the order of `_NAMES`."""
    return {"guidance": setting["guidance"], "temperature": setting["temperature"], "top_k": setting["top_k"]}


def _point(setting: SweepSetting, x: str, y: str) -> tuple[float, float] | None:
    """Where the setting lies in the plot of two metrics; None if one of them was not measured."""
    at_x, at_y = setting["metrics"][x], setting["metrics"][y]
    return None if at_x is None or at_y is None else (at_x, at_y)


def _with(start: str, metrics: list[str]) -> str | None:
    return next((name for name in metrics if name.startswith(start)), None)


def _or_infinite(value: float | None) -> float:
    return float("inf") if value is None else value


def _text(value: float | None) -> str:
    return "all" if value is None else f"{value:g}"
