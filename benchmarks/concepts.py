"""The drawings of docs/concepts.md: forms, a calibration, freezing, a series and a nested order. Nothing is measured.

python benchmarks/concepts.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Ellipse, Rectangle

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
BLUE, ORANGE, GREY, GREEN = "#2f6fb0", "#c8641b", "#9aa3ad", "#3c8c5a"
plt.rcParams |= {"svg.hashsalt": "lamina", "font.size": 10, "svg.fonttype": "none"}


def box(axes: Any, x: float, y: float, width: float, height: float, text: str, colour: str, **options: Any) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", **options))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white", fontsize=9)


def blank(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    figure, axes = plt.subplots(1, columns, figsize=(width, height))
    for one in np.atleast_1d(axes):
        one.axis("off")
    return figure, axes


def forms() -> Any:
    """What a layer of 64 channels becomes, each factor as wide as its channels and labelled by its weights."""
    figure, axes = blank(8, 3.4)
    rows: list[tuple[str, list[tuple[str, int, str]]]] = [
        ("Dense()", [("3×3, 64→64: 36,864 weights", 64, GREY)]),
        ("BlockTerm(16, 24)", [("1×1, 64→16", 16, BLUE), ("3×3, 16→24", 24, ORANGE), ("1×1, 24→64", 24, BLUE)]),
        ("BlockTerm(None, 16)", [("3×3, 64→16", 40, ORANGE), ("1×1, 16→64", 24, BLUE)]),
        ("BlockTerm(64, 64, groups=8)", [("1×1, 64→64", 22, BLUE), ("3×3 in 8 groups", 20, ORANGE), ("1×1, 64→64", 22, BLUE)]),
    ]
    for place, (name, factors) in enumerate(rows):
        y = 3 - place
        axes.text(-2, y + 0.3, name, ha="right", va="center", family="monospace", fontsize=9)
        x = 0.0
        for text, width, colour in factors:
            box(axes, x, y, width, 0.6, text, colour)
            x += width + 0.6
    axes.text(0, 4.0, "the kernel that looks around is orange, what only mixes channels is blue", fontsize=8.5, color="#555")
    axes.set_xlim(-42, 68)
    axes.set_ylim(-0.2, 4.3)
    return figure


def calibration() -> Any:
    """Which of two directions of a weight is kept: the longer one, or the one that the inputs use."""
    figure, (left, right) = blank(8, 3.2, 2)
    draw = np.random.default_rng(0)
    points = draw.normal(size=(250, 2)) * (0.35, 1.6)
    for axes, title in ((left, "the weight alone"), (right, "the weight, and 250 unlabelled inputs")):
        axes.set_title(title, fontsize=10)
        axes.set_xlim(-4, 4)
        axes.set_ylim(-5, 4.4)
        axes.set_aspect("equal")
    left.add_patch(Ellipse((0, 0), 6, 3.6, fill=False, color=GREY, lw=1.5))
    left.annotate("", (3, 0), (0, 0), arrowprops={"arrowstyle": "->", "color": BLUE, "lw": 3})
    left.annotate("", (0, 1.8), (0, 0), arrowprops={"arrowstyle": "->", "color": GREY, "lw": 3})
    left.text(0.2, -4.9, "rank 1 keeps the direction\nin which the weight is largest", ha="center", fontsize=9, color=BLUE)
    right.scatter(*points.T, s=5, color=GREEN, alpha=0.5)
    right.annotate("", (3, 0), (0, 0), arrowprops={"arrowstyle": "->", "color": GREY, "lw": 3})
    right.annotate("", (0, 1.8), (0, 0), arrowprops={"arrowstyle": "->", "color": BLUE, "lw": 3})
    right.text(
        0.2, -3.9, "hardly any input lies along it:\nthe other direction loses less", ha="center", fontsize=9, color=BLUE
    )
    return figure


def freezing() -> Any:
    """Which factors train in which phase."""
    figure, axes = blank(8, 2.0)
    names = ["both 1×1s", "core", "all else"]
    trains = [(0, 1, 1), (1, 0, 1), (0, 1, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
    for row, name in enumerate(names):
        axes.text(-0.1, 2 - row + 0.4, name, ha="right", va="center", fontsize=9)
        for column, phase in enumerate(trains):
            box(axes, column, 2 - row, 0.96, 0.8, "trains" if phase[row] else "rests", ORANGE if phase[row] else "#5d6670")
    for column in range(len(trains)):
        axes.text(column + 0.48, -0.35, f"epoch {column + 1}", ha="center", fontsize=8.5, color="#555")
    axes.set_xlim(-1.2, 6.1)
    axes.set_ylim(-0.6, 3.1)
    return figure


def series() -> Any:
    """A core of 8 channels in groups of 2, 4 and 8: each is the one before, written wider, plus a term."""
    figure, axes = blank(8, 2.9)
    for place, size in enumerate((2, 4, 8)):
        x = place * 10
        axes.add_patch(Rectangle((x, 0), 8, 8, fill=False, edgecolor="#c9ced4"))
        for inner, colour in ((8, GREEN), (4, ORANGE), (2, BLUE)):
            if inner > size:
                continue
            for at in range(0, 8, inner):
                axes.add_patch(
                    Rectangle((x + at, 8 - at - inner), inner, inner, facecolor=colour, edgecolor="white", alpha=0.85)
                )
        axes.text(x + 4, -1.1, f"groups of {size}", ha="center", fontsize=9)
        if place:
            axes.text(x - 1, 4, "→", ha="center", va="center", fontsize=16, color="#555")
    axes.set_xlim(-1, 29)
    axes.set_ylim(-2, 9)
    axes.set_aspect("equal")
    return figure


def order() -> Any:
    """Steps of three layers from the slowest to the fastest, by what they lose for the time they save."""
    figure, axes = plt.subplots(figsize=(8, 3.2))
    steps = [("conv1", 1.6, 0.004), ("conv3", 1.1, 0.006), ("conv2", 1.3, 0.010), ("conv1", 0.9, 0.012), ("conv3", 0.7, 0.020)]
    time, loss, colours = 10.0, 0.0, {"conv1": BLUE, "conv2": ORANGE, "conv3": GREEN}
    axes.plot([time], [loss], "o", color="#333")
    for name, saved, lost in steps:
        axes.plot([time, time - saved], [loss, loss + lost], color=colours[name], lw=2.5)
        axes.text(time - saved / 2, loss + lost / 2 + 0.003, name, ha="center", fontsize=8.5, color=colours[name])
        time, loss = time - saved, loss + lost
        axes.plot([time], [loss], "o", color="#333")
    axes.axvline(6.5, color=GREY, ls="--")
    axes.text(6.6, 0.047, "a budget of 6.5 ms: the first point beyond it", fontsize=8.5, color="#555", ha="right")
    axes.set_xlabel("time of the network, ms")
    axes.set_ylabel("predicted loss, nats")
    axes.invert_xaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


DRAWINGS: dict[str, Callable[[], Any]] = {
    "forms": forms,
    "calibration": calibration,
    "freezing": freezing,
    "series": series,
    "order": order,
}


def main() -> None:
    for name, draw in DRAWINGS.items():
        figure = draw()
        figure.savefig(IMAGES / f"concept-{name}.svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
