"""One budget for the whole network: the forms that lose least within limits, chosen exactly.

A multiple-choice knapsack: one option a layer, least sum of losses, each limited sum within its limit. SciPy's HiGHS solves it
to a stated gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

GAP = 1e-4
"""How far above the least possible sum of losses an answer may lie, as a share of it."""


@final
@dataclass(frozen=True, slots=True)
class Row:
    """A limited sum: what each option of each layer adds, and the most that all may add up to.

    ``late`` rows are looked at only once an answer breaks them: most never do.
    """

    costs: Mapping[str, Sequence[float]]
    most: float
    late: bool = False

    def of(self, answer: Mapping[str, int]) -> float:
        """The sum for an answer."""
        return sum(self.costs[name][number] for name, number in answer.items())


def solve(
    losses: Mapping[str, Sequence[float]], rows: Sequence[Row], *, gap: float = GAP, seconds: float = 20.0
) -> dict[str, int] | None:
    """Choose one option for each layer, so that the losses add up to the least within the limits.

    Args:
        losses: Layer → the loss of each option, none negative.
        rows: The limits.
        gap: See `GAP`.
        seconds: The longest that the solver may take; its best answer so far is then given.

    Returns:
        Layer → the position of its option; None where no choice is within the limits.
    """
    if not losses:
        return {} if all(row.most >= 0 for row in rows) else None
    active = [row for row in rows if not row.late]
    while True:
        answer = _solved(losses, active, gap, seconds)
        broken = [row for row in rows if row not in active and answer and row.of(answer) > _with_rounding(row)]
        if answer is None or not broken:
            return answer
        active += broken


def _with_rounding(row: Row) -> float:
    return row.most + 1e-6 * max(abs(row.most), max((abs(c) for costs in row.costs.values() for c in costs), default=0.0))


def _solved(losses: Mapping[str, Sequence[float]], rows: Sequence[Row], gap: float, seconds: float) -> dict[str, int] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    names = list(losses)
    sizes = [len(losses[name]) for name in names]
    total, owners = sum(sizes), np.repeat(np.arange(len(names)), sizes)
    one_each = csr_array((np.ones(total), (owners, np.arange(total))), shape=(len(names), total))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for row in rows:
        costs = np.concatenate([np.asarray(row.costs[name], float) for name in names])
        scale = np.abs(costs).max() or 1.0  # the solver's tolerances are absolute
        constraints.append(LinearConstraint(costs[None] / scale, -np.inf, row.most / scale))
    aim: NDArray[np.float64] = np.concatenate([np.asarray(losses[name], float) for name in names])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])

    def solved(whole: bool) -> Any:
        return milp(
            aim / (aim.max() or 1.0),
            constraints=constraints,
            integrality=np.full(total, int(whole)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": gap, "time_limit": seconds},
        )

    def answer(x: NDArray[np.float64]) -> dict[str, int]:
        return {name: int(np.argmax(x[start : start + n])) for name, start, n in zip(names, starts, sizes, strict=True)}

    # With shares of options allowed, no more layers are mixed than there are limits. Of many layers it hardly matters to which
    # of its options such a one is rounded; the least loss with shares then proves it, and takes a tenth of the time.
    shared = solved(whole=False)
    if shared.x is None:
        return None
    rounded = answer(np.where(shared.x > 1e-6, 2 + _cheapness(rows, names), 0))
    least = float(aim @ shared.x)
    if all(row.of(rounded) <= row.most for row in rows) and _sum(losses, rounded) <= least * (1 + gap):
        return rounded
    result = solved(whole=True)
    return None if result.x is None else answer(result.x)


def _cheapness(rows: Sequence[Row], names: Sequence[str]) -> NDArray[np.float64]:
    """For each option from 0 for what costs most of what is limited to 1 for what costs least."""
    total = np.zeros(1)
    for row in rows:
        costs = np.concatenate([np.asarray(row.costs[name], float) for name in names])
        total = total - costs / (np.abs(costs).max() or 1.0)
    span = float(np.ptp(total)) or 1.0
    found: NDArray[np.float64] = (total - total.min()) / span
    return found


def _sum(losses: Mapping[str, Sequence[float]], answer: Mapping[str, int]) -> float:
    return sum(losses[name][number] for name, number in answer.items())
