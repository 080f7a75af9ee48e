"""The pictures of a report, as Plotly has them: what is drawn, in JSON. Colours of text are the page's, for light and dark."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any

from ..errors import MissingExtra
from ..forms import Dense
from ..front.front import Front, Point
from ..plan import Plan
from .evidence import Evidence

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), which people who see few colours tell apart, darkened where they
# would be too light on white.
BEFORE, AFTER, BEST = "#7f8c8d", "#0072b2", "#d55e00"
_KINDS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MOST_BARS = 30
_MARGIN = {"l": 10, "r": 10, "t": 10, "b": 10}
Figure = dict[str, Any]


def plotly(name: str) -> Any:
    """A module of Plotly.

    Raises:
        MissingExtra: Plotly is not installed.
    """
    try:
        return importlib.import_module(f"plotly.{name}")
    except ImportError as error:
        raise MissingExtra("plotly", "report", "a report") from error


def plotted_front(front: Front) -> Figure:
    """What each speed costs: the points, what nothing beats, uniform ratios, and the network itself."""
    go = plotly("graph_objects")
    sign = 1 if front.by == "score" else -1

    def trace(points: Sequence[Point], name: str, color: str, **more: Any) -> Any:
        known = [point for point in points if abs(front.merit(point)) < float("inf")]
        return go.Scatter(
            x=[point.speedup for point in known],
            y=[sign * front.merit(point) for point in known],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [point.interval[1] - point.speedup for point in known],
                "arrayminus": [point.speedup - point.interval[0] for point in known],
                "thickness": 1,
            },
            text=[f"{len(point.plan.decomposed)} of {len(point.plan.layers)} layers" for point in known],
            hovertemplate="×%{x:.2f}: %{y:.5g}<br>%{text}",
            name=name,
            marker={"color": color, "size": 9, **more},
            line={"color": color},
            mode="lines+markers",
        )

    beaten = front.dominated
    traces = [trace([point for point in front.points if point not in beaten], "chosen by measured time", AFTER)]
    if beaten:
        traces.append(trace(beaten, "beaten by another point", BEFORE, symbol="x"))
        traces[-1].mode = "markers"
    if front.uniform:
        traces.append(trace(front.uniform, "the same ratio for every layer", BEST, symbol="square"))
        traces[-1].line.dash = "dash"
    own = front.before if front.before is not None else 0.0
    traces.append(
        go.Scatter(
            x=[1], y=[own], mode="markers", name="the network itself", marker={"symbol": "star", "size": 14, "color": BEFORE}
        )
    )
    return _drawn(traces, across="measured speed-up, times the original", up=front.by)


def plotted_times(plan: Plan) -> Figure | None:
    """Where the time of one run goes, layer by layer, before and after; None where that was not timed."""
    go = plotly("graph_objects")
    shares = dict(sorted(plan.shares.items(), key=lambda each: -each[1]))
    if not shares:
        return None
    after = {name: share * _kept(plan, name) for name, share in shares.items()}
    names = list(shares)[:_MOST_BARS]
    rest = list(shares)[_MOST_BARS:]
    rows = [(name or "(the network)", shares[name], after[name]) for name in names]
    if rest:
        rows.append((f"{len(rest)} others", sum(shares[n] for n in rest), sum(after[n] for n in rest)))
    rows.reverse()  # Plotly begins below
    labels = [label for label, *_ in rows]
    bars = [
        go.Bar(
            y=labels, x=[100 * row[at] for row in rows], orientation="h", name=name, marker={"color": color},
            hovertemplate="%{y}: %{x:.1f} %",
        )
        for at, name, color in ((2, "after", AFTER), (1, "before", BEFORE))
    ]  # fmt: skip
    figure = _drawn(bars, across="share of the original's time, %", up="")
    figure["layout"]["height"] = 120 + 24 * len(rows)
    figure["layout"]["yaxis"]["type"] = "category"  # names may be numbers
    figure["layout"]["legend"]["traceorder"] = "reversed"
    return figure


def plotted_staircases(evidence: Evidence) -> dict[str, Figure]:
    """By layer its staircase: the times of the forms that were timed against their weights; the chosen one is marked."""
    go = plotly("graph_objects")
    figures: dict[str, Figure] = {}
    for name, staircase in evidence.staircases.items():
        layer = evidence.plan.layers[name]
        traces = []
        for number, (kind, forms) in enumerate(staircase.kinds.items()):
            color = _KINDS[number % len(_KINDS)]
            traces.append(
                go.Scatter(
                    x=[100 * staircase.weights(form) for form in forms],
                    y=[100 * staircase.shares[form] for form in forms],
                    text=[str(form) for form in forms],
                    mode="lines+markers",
                    name=kind,
                    hovertemplate="%{text}: %{y:.0f} % of the time",
                    line={"color": color, "width": 1},
                    marker={"color": color, "size": 7, "symbol": number},
                )
            )
        chosen = {Dense(): 1.0, **staircase.shares}.get(layer.form)
        if chosen is not None:
            traces.append(
                go.Scatter(
                    x=[100 * staircase.weights(layer.form)],
                    y=[100 * chosen],
                    text=[str(layer.form)],
                    mode="markers",
                    name=f"chosen: {layer.form}",
                    hovertemplate="%{text}",
                    marker={"symbol": "star", "size": 16, "color": BEST},
                )
            )
        figure = _drawn(traces, across="weights, % of the dense layer's", up="time, % of the dense layer's")
        line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 100, "y1": 100, "line": {"dash": "dot", "width": 1}}
        figure["layout"]["shapes"] = [line]
        figures[name] = figure
    return figures


def _kept(plan: Plan, name: str) -> float:
    """The share of its time that a layer keeps, by the times that layers take alone; 1 of what is no layer, or not timed."""
    layer = plan.layers.get(name)
    if layer is None or layer.before.timing is None or layer.after.timing is None:
        return 1.0
    return layer.after.timing.median_s / layer.before.timing.median_s


def _drawn(traces: Sequence[Any], across: str, up: str) -> Figure:
    layout = plotly("graph_objects").Layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin=_MARGIN,
        xaxis={"title": {"text": across}, "automargin": True, "zeroline": False},
        yaxis={"title": {"text": up}, "automargin": True, "zeroline": False},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hovermode="closest",
        height=420,
    )
    figure: Figure = json.loads(plotly("graph_objects").Figure(list(traces), layout).to_json())
    return figure
