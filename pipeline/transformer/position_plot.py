"""An image of the validation loss at each position of the sequence: what is hard to predict, and where."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from pipeline.core.image_io import from_png
from pipeline.transformer.layout import Layout


def position_plot(losses: Sequence[float], layout: Layout) -> Image.Image:
    """Plot `losses`, in nats, one for each of the T + N targets; lines mark where each level begins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.4), dpi=100, layout="constrained")
    axes = figure.add_subplot(xlabel="position", ylabel="validation loss (nats)")
    axes.plot(range(len(losses)), losses, linewidth=1)
    for number, start in enumerate(layout.level_starts):
        first = layout.text_length + start
        axes.axvline(first - 0.5, color="0.7", linewidth=1)
        name = "image" if len(layout.levels) == 1 else f"level {number}"
        axes.annotate(name, (first, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    axes.set_ylim(bottom=0)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return from_png(file.getvalue())
