"""One budget for the whole network: the forms that lose least within limits, chosen exactly.

A multiple-choice knapsack: one option a layer, least sum of losses, each limited sum within its limit. SciPy's HiGHS solves it
to a stated gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

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
    result = milp(
        aim / (aim.max() or 1.0),
        constraints=constraints,
        integrality=np.ones(total),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": gap, "time_limit": seconds},
    )
    if result.x is None:
        return None
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return {
        name: int(np.argmax(result.x[start : start + size])) for name, start, size in zip(names, starts, sizes, strict=True)
    }
