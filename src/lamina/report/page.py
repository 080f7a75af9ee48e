"""The page: evidence in, one HTML file out, which needs no network and asks none."""

from __future__ import annotations

import datetime
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, final

from ..comparison import Comparison
from ..errors import LaminaError, MissingExtra
from ..files import write_value
from ..front.front import Front
from ..measure.table import TimingTable
from ..plan import Plan, PlannedLayer
from ..plan.text import costs, refused_alike
from ..values import Cost, change, quantity
from .commands import commands
from .evidence import Evidence, gathered
from .figures import plotly, plotted_front, plotted_staircases, plotted_times

_TEMPLATE = "page.html.j2"


@final
@dataclass(frozen=True, slots=True)
class Report:
    """Where a report lies."""

    path: str

    def __str__(self) -> str:
        """One line."""
        return f"the report is in {self.path}: open it in a browser"


def report(
    source: Plan | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    model: str = "",
    front: Front | str | os.PathLike[str] | None = None,
    comparisons: Sequence[Comparison | str | os.PathLike[str]] = (),
    timings: TimingTable | str | os.PathLike[str] | None = None,
) -> Report:
    """Write a page about a plan: what was asked, what came of it, where the time goes, and why each layer is what it is.

    It is one file, about 5 MB, most of it the program that draws. It asks no network for anything, and a browser is told so.

    Args:
        source: A plan, the file of one, or the folder of a saved network.
        path: The HTML file; it is there whole or not at all.
        model: The network's name, as the command line has it: for the title, and for the commands that reproduce it.
        front: What `pareto` made, or the folder that it was saved in.
        comparisons: What `compare` made, or files that `Comparison.save` or ``lamina bench -o`` wrote: runtimes side by side.
        timings: The table in which the layers' times are, for the staircases; the default one where there is none.

    Raises:
        PlanError: The plan or the front cannot be read, or the front is of another network.
        LaminaError: A comparison or the table cannot be read, or the page cannot be written.
        MissingExtra: Jinja or Plotly is not installed.
    """
    page = rendered(gathered(source, model=model, front=front, comparisons=comparisons, timings=timings))
    write_value(path, page.encode(), LaminaError, "the report")
    return Report(str(path))


def rendered(evidence: Evidence) -> str:
    """The page as text.

    Raises:
        MissingExtra: Jinja or Plotly is not installed.
    """
    try:
        jinja = importlib.import_module("jinja2")
    except ImportError as error:
        raise MissingExtra("jinja2", "report", "a report") from error
    environment = jinja.Environment(
        loader=jinja.PackageLoader("lamina.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja.StrictUndefined,
    )  # fmt: skip
    plan = evidence.plan
    page: str = environment.get_template(_TEMPLATE).render(
        title=evidence.model or evidence.source or "A network",
        headline=_headline(plan),
        numbers=_numbers(plan, _scores(evidence)),
        warning=plan.warning,
        notes=plan.notes,
        accuracy=plan.accuracy(),
        front=evidence.front,
        front_figure=plotted_front(evidence.front) if evidence.front else None,
        points=_points(evidence.front) if evidence.front else [],
        where=plan.where(),
        times_figure=plotted_times(plan),
        layers=[_row(name, layer, plan) for name, layer in plan.layers.items()],
        refused=[
            {"names": [n or "(the network)" for n in names], "why": why, "share": sum(plan.shares.get(n, 0.0) for n in names)}
            for why, names in refused_alike(plan).items()
        ],
        staircases=plotted_staircases(evidence),
        comparisons=evidence.comparisons,
        commands=commands(evidence),
        conditions=_conditions(evidence),
        program=plotly("offline").get_plotlyjs(),
    )
    return page


def _headline(plan: Plan) -> str:
    """What was asked and what came of it, in a sentence."""
    layers = f"{len(plan.decomposed)} of its {len(plan.layers)} layers are decomposed"
    if not plan.decomposed:
        return f"Asked for: {plan.goal}. No layer is decomposed: the network stays as it was."
    if plan.whole and plan.whole.speedup and plan.whole.interval:
        low, high = plan.whole.interval
        what = "A training step" if plan.mode == "training" else "The network"
        return (
            f"Asked for: {plan.goal}. {what} is {plan.whole.speedup:.2f} times as fast as the original "
            f"(95\u00a0% between {low:.2f} and {high:.2f}), and {layers}."
        )
    return f"Asked for: {plan.goal}. {layers[0].upper()}{layers[1:]}; how fast that is was not measured."


def _scores(evidence: Evidence) -> tuple[float, float] | None:
    """The score before and after: as the plan has it, or as the point of the front has that is this plan."""
    plan, front = evidence.plan, evidence.front
    if plan.scores:
        return plan.scores.before, plan.scores.after
    if front is None or front.before is None:
        return None
    scored = [point.score for point in front.points if point.score is not None and not point.plan.differences(plan)]
    return (front.before, scored[0]) if scored else None


def _numbers(plan: Plan, scores: tuple[float, float] | None) -> list[tuple[str, str, str]]:
    """Three numbers: how fast, how accurate, how large; each with what it is and what it is measured by."""
    whole = plan.whole
    fast = f"×{whole.speedup:.2f}" if whole and whole.speedup else "not timed"
    timed = f"{_ms(whole.before)} → {_ms(whole.after)}" if whole and whole.speedup else "the whole network"
    if scores:
        good, by = " → ".join(f"{score + 0.0:.4g}" for score in scores), "by your score, higher is better"  # + 0: not -0
    elif plan.nats is not None:
        good, by = f"{plan.nats:.2g} nats", "predicted change of each answer"
    else:
        good, by = "not known", "accuracy: give data or a score"
    before, after = costs(plan)
    smaller = f"÷{before.parameters / after.parameters:.2f}" if after.parameters else "–"
    return [
        (fast, "speed", timed),
        (good, "accuracy", by),
        (smaller, "parameters", change(before.parameters, after.parameters)),
    ]


def _ms(cost: Cost) -> str:
    return f"{cost.timing.median_ms:.3g} ms" if cost.timing else "–"


def _points(front: Front) -> list[dict[str, Any]]:
    rows = [(point, f"speed-up {point.asked:g}" if point.asked else "the fastest") for point in front.points]
    rows += [(point, f"{point.plan.goal}, every layer") for point in front.uniform]
    return [{"asked": asked, "point": point, "beaten": point in front.dominated} for point, asked in rows]


def _row(name: str, layer: PlannedLayer, plan: Plan) -> dict[str, Any]:
    """One line of the table of layers, with numbers to sort by."""
    before, after = layer.before.timing, layer.after.timing
    state = "put back" if name in plan.put_back else "decomposed" if layer.decomposed else "dense"
    return {
        "name": name or "(the network)",
        "was": str(layer.geometry),
        "becomes": str(layer.form),
        "state": state,
        "parameters": change(layer.before.parameters, layer.after.parameters),
        "parameters_by": layer.after.parameters,
        "macs": quantity(layer.after.macs),
        "macs_by": layer.after.macs,
        "share": plan.shares.get(name),
        "time": f"{before.median_ms:.3g} → {after.median_ms:.3g} ms" if before and after else "not timed",
        "time_by": before.median_s if before else -1,
        "gain": before.median_s / after.median_s if before and after else None,
        "lost": layer.lost,
        "lost_by": layer.nats if layer.nats is not None else layer.loss if layer.decomposed else None,
        "why": plan.put_back.get(name) or layer.reason,
    }


def _conditions(evidence: Evidence) -> list[tuple[str, str]]:
    plan, rows = evidence.plan, list[tuple[str, str]]()
    if plan.setting:
        rows.append(("measured on", str(plan.setting)))
    if evidence.front:
        rows += [("the front was measured on", evidence.front.conditions), ("and fed", evidence.front.example)]
    rows.append(("how ranks were chosen", plan.rule))
    if plan.factors.calibration:
        rows.append(("factors fitted to the calibration", plan.factors.calibration))
    rows.append(("structure of the network", plan.fingerprint))
    rows.append(("written", f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z} by lamina {version('lamina')}"))
    return rows
