"""The fastest network within a drop of the score: budgets one after the other, each planned, decomposed, measured and scored.

That the score falls as the speed rises is likely and not sure. So the bisection only says where to look; the answer is the
fastest network that was itself scored within the drop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..forms import Dense
from ..goals import Drop, Speedup
from ..plan import Plan, ScoredPoint
from ..progress import Display
from .by_budget import CLOSE
from .scoring import Candidate, Jury, speedup_of

POINTS = 8
"""How many speed-ups are looked at, at most."""
FASTEST = Speedup(1e6)
"""Asks for the fastest network that there is."""


def by_drop(
    drop: Drop,
    jury: Jury,
    plan_for: Callable[[Speedup], Plan],
    top: Plan,
    shown: Display,
    afresh: Callable[[Plan], Plan] = lambda plan: plan,
) -> Candidate:
    """The candidate whose network is the fastest of those scored within a drop; all layers dense where there is none.

    Args:
        drop: What the score may lose.
        jury: Makes and scores networks.
        plan_for: The plan for a speed-up.
        top: The fastest plan that is looked at, the first one to be.
        shown: Shows how far it is.
        afresh: Times the network of a plan once more, for the report: the fastest of several was lucky, too.
    """
    least = jury.before - drop.value
    judged: dict[tuple[Any, ...], bool] = {}
    tried: list[ScoredPoint] = []
    best: Candidate | None = None

    def passes(plan: Plan) -> bool:
        """Whether a plan leads to a network within the drop; the fastest one is kept."""
        nonlocal best
        speed = speedup_of(plan) or 0.0
        if not plan.decomposed or speed <= 1:  # as good as the network itself, and no faster
            return True
        key = tuple(sorted((name, layer.form) for name, layer in plan.decomposed.items()))
        if key not in judged:
            judged[key] = False
            # Factors of the weights alone make no network faster, so they are asked only where the others fail.
            for candidate in jury.candidates(plan):
                tried.append(candidate.point)
                judged[key] = candidate.merit >= least
                if judged[key]:
                    if best is None or speed > (speedup_of(best.plan) or 0.0):
                        best = candidate
                    break
        return judged[key]

    slow, fast, point, plan = 1.0, max(speedup_of(top) or 1.0, 1.0), math.inf, top
    for number in range(POINTS):
        shown.say("scoring networks", number, POINTS)
        measured = speedup_of(plan) or 1.0
        if passes(plan):
            slow = max(slow, min(point, fast), min(measured, fast))
        else:
            fast = min(fast, point)
        if fast <= slow * (1 + CLOSE):
            break
        point = math.sqrt(slow * fast)
        plan = plan_for(Speedup(point))
    said = f"networks scored: {len(tried)}; this is the fastest of them within a {drop}"
    if best is None:
        said = f"networks scored: {len(tried)}; none that is faster is within a {drop}, so all layers stay dense"
        best = next(iter(jury.candidates(dense(top, "no faster network is within the drop"))))
    elif len(judged) > 1:
        best = replace(best, plan=afresh(best.plan))
    return jury.said(best, tuple(tried), goal=drop, notes=(said, *best.plan.notes))


def dense(plan: Plan, why: str) -> Plan:
    """A plan by which every layer stays dense."""
    layers = {name: layer.with_form(Dense(), why, "rule") if layer.decomposed else layer for name, layer in plan.layers.items()}
    whole = plan.whole and plan.whole.model_copy(
        update={"after": plan.whole.before, "predicted_s": None, "speedup": None, "interval": None}
    )
    return plan.model_copy(update={"layers": layers, "whole": whole, "put_back": {}, "notes": ()})
