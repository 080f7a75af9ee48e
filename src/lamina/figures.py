"""Pictures by Matplotlib: a front, with what was tried and what nothing else beats, and lines."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import MissingExtra

Place = tuple[float, float]
"""Across and up."""


def front_figure(
    tried: Sequence[Place],
    front: Sequence[Place],
    *,
    across: str,
    up: str,
    best: tuple[str, Place],
    limit: tuple[str, float] | None = None,
    beside: tuple[str, Sequence[Place]] = ("", ()),
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """A Matplotlib figure.

    Args:
        tried: All that was tried.
        front: Those that no other one beats, in their order.
        across: Name of the first axis.
        up: Name of the second.
        best: One that is to be seen, with its name in the legend.
        limit: Where a limit lies across, with its name.
        beside: What the front is to be compared with, with its name.
        path: Where it is written too, if anywhere.

    Raises:
        MissingExtra: Matplotlib is not installed.
    """
    figure = _empty()
    axes = figure.subplots()
    axes.scatter([x for x, _ in tried], [y for _, y in tried], s=12, color="0.6", label="scored")
    axes.plot([x for x, _ in front], [y for _, y in front], "o-", markersize=4, label="front")
    if beside[1]:
        axes.plot([x for x, _ in beside[1]], [y for _, y in beside[1]], "s--", markersize=5, label=beside[0])
    axes.plot([best[1][0]], [best[1][1]], "*", markersize=14, label=best[0])
    if limit:
        axes.axvline(limit[1], linestyle="--", color="0.4", label=limit[0])
    return _finished(figure, axes, across, up, path)


def lines_figure(
    lines: Mapping[str, Sequence[Place]],
    *,
    across: str,
    up: str,
    level: tuple[str, float] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """A Matplotlib figure of lines with their points marked.

    Args:
        lines: Name → places.
        across: Name of the first axis.
        up: Name of the second.
        level: A height that is to be seen, with its name.
        path: Where it is written too, if anywhere.

    Raises:
        MissingExtra: Matplotlib is not installed.
    """
    figure = _empty()
    axes = figure.subplots()
    for name, places in lines.items():
        axes.plot([x for x, _ in places], [y for _, y in places], "o-", markersize=3, linewidth=1, label=name)
    if level:
        axes.axhline(level[1], linestyle=":", color="0.4", label=level[0])
    return _finished(figure, axes, across, up, path)


def _finished(figure: Any, axes: Any, across: str, up: str, path: str | os.PathLike[str] | None) -> Any:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.legend()
    if path is not None:
        figure.savefig(path)
    return figure


def _empty() -> Any:
    try:
        kind: Any = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "report", "a plot") from error

    class Figure(kind):  # type: ignore[misc]
        """One that a notebook draws, though no pyplot knows of it."""

        def _repr_png_(self) -> bytes:
            drawn = io.BytesIO()
            self.savefig(drawn, format="png")
            return drawn.getvalue()

    return Figure(figsize=(6.4, 4.4), layout="constrained")
