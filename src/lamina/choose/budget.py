"""One budget for the whole network: the forms that lose least within limits, to a stated gap.

A multiple-choice knapsack: one option a layer, least sum of losses, each limited sum within its limit. SciPy's HiGHS solves it
to that gap, or as far as it comes in its time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

GAP = 1e-4
"""How far above the least possible sum of losses an answer may lie, as a share of the answer's."""


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


@final
@dataclass(frozen=True, slots=True)
class Solution:
    """An answer, and what is proved of it.

    Attributes:
        options: Layer → the position of its option.
        gap: The share of its losses that another answer may lose less, as far as is proved.
    """

    options: dict[str, int]
    gap: float


def solve(losses: Mapping[str, Sequence[float]], rows: Sequence[Row], *, gap: float = GAP) -> dict[str, int] | None:
    """The options of `solution`; None where no choice is within the limits."""
    found = solution(losses, rows, gap=gap)
    return found and found.options


def solution(
    losses: Mapping[str, Sequence[float]], rows: Sequence[Row], *, gap: float = GAP, seconds: float = 20.0
) -> Solution | None:
    """Choose one option for each layer, so that the losses add up to the least within the limits.

    Args:
        losses: Layer → the loss of each option, none negative.
        rows: The limits.
        gap: See `GAP`.
        seconds: The longest that the solver may take; its best answer so far is then given, with a gap above the one asked for.

    Returns:
        The answer; None where no choice is within the limits.
    """
    if not losses:
        return Solution({}, 0.0) if all(row.most >= 0 for row in rows) else None
    active = [row for row in rows if not row.late]
    while True:
        answer = _solved(losses, active, gap, seconds)
        broken = [row for row in rows if row not in active and answer and row.of(answer.options) > _with_rounding(row)]
        if answer is None or not broken:
            return answer
        active += broken


def _with_rounding(row: Row) -> float:
    return row.most + 1e-6 * max(abs(row.most), max((abs(c) for costs in row.costs.values() for c in costs), default=0.0))


def _solved(losses: Mapping[str, Sequence[float]], rows: Sequence[Row], gap: float, seconds: float) -> Solution | None:
    names = list(losses)
    sizes = [len(losses[name]) for name in names]
    total, owners = sum(sizes), np.repeat(np.arange(len(names)), sizes)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    aim = np.concatenate([np.asarray(losses[name], float) for name in names])
    costs = np.array([np.concatenate([np.asarray(row.costs[name], float) for name in names]) for row in rows])
    costs = costs.reshape(len(rows), total)
    scales = np.abs(costs).max(1, initial=0.0)
    scales[scales == 0] = 1.0  # the solver's tolerances are absolute
    costs, most = costs / scales[:, None], np.array([row.most for row in rows]) / scales
    aim /= aim.max() or 1.0

    def largest(values: NDArray[np.float64]) -> NDArray[np.int64]:
        """For each layer the place of its option with the largest value."""
        return np.array([start + np.argmax(values[start : start + n]) for start, n in zip(starts, sizes, strict=True)])

    relaxed = _relaxed(aim, costs, most, owners)
    if relaxed is None:
        return None
    shares, dearer = relaxed
    least = proved = float(aim @ shares)
    enough = least * (1 + gap)
    # With shares of options allowed, no more layers are mixed than there are limits. Of many layers it hardly matters to which
    # of its options such a one is rounded; the least loss with shares then proves it, in a tenth of the time or less.
    taken = largest(np.where(shares > 1e-6, 1 - costs.sum(0) / (2 * len(rows) or 1), -1))
    fits = bool((costs[:, taken].sum(1) <= most).all())
    if fits:
        taken = _improved(taken, aim, costs, most, owners)
    lost = float(aim[taken].sum()) if fits else np.inf
    if lost > enough:
        # What is dearer than the gap is in no answer within it, and what is dearer than the answer at hand in none that is
        # better. Where there is one, it is among the few options left; and what the second look proves holds for all.
        for dearest, all_of_them in ((enough - least, False), (lost - least, True)):
            left = (dearer <= dearest + 1e-9) | (shares > 0)
            exact, bound = _whole(aim[left], costs[:, left], most, owners[left], gap, seconds)
            if all_of_them and np.isfinite(held := min(bound, lost)):
                proved = max(least, held)
            if exact is not None and aim[left] @ exact <= (lost if all_of_them else enough):
                chosen = np.zeros(total)
                chosen[left] = exact
                taken, fits = largest(chosen), True
                break
    if not fits:  # the solver's time may have run out before it had any answer
        taken = largest(-costs.sum(0))
        if fits := bool((costs[:, taken].sum(1) <= most).all()):
            taken = _improved(taken, aim, costs, most, owners)
    if not fits:
        return None
    lost = float(aim[taken].sum())
    reached = max(1 - proved / lost, 0.0) if lost > 0 else 0.0
    return Solution({name: int(place - start) for name, place, start in zip(names, taken, starts, strict=True)}, reached)


def _relaxed(
    aim: NDArray[np.float64], costs: NDArray[np.float64], most: NDArray[np.float64], owners: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """The least loss where a layer may be shares of its options: these, and by how much any answer with an option is dearer.

    The second are the reduced costs: no answer with that option is closer to the least loss with shares. For the arguments see
    `_improved`.
    """
    from scipy.optimize import linprog

    each, ones = _one_each(owners), np.ones(owners.max() + 1)
    found = linprog(aim, A_ub=costs if len(most) else None, b_ub=most if len(most) else None, A_eq=each, b_eq=ones)
    if found.x is None:
        return None
    by_limit = costs.T @ found.ineqlin.marginals if len(most) else 0.0
    return found.x, aim - by_limit - each.T @ found.eqlin.marginals


def _whole(
    aim: NDArray[np.float64],
    costs: NDArray[np.float64],
    most: NDArray[np.float64],
    owners: NDArray[np.int64],
    gap: float,
    seconds: float,
) -> tuple[NDArray[np.float64] | None, float]:
    """One for the option that each layer takes, zero for the others, to a gap; and what no answer loses less than.

    For the arguments see `_improved`. Where the time is up there may be no answer, or one that is not proved to the gap.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    constraints = [LinearConstraint(_one_each(owners), 1, 1), *([LinearConstraint(costs, -np.inf, most)] if len(most) else [])]
    options = {"mip_rel_gap": gap, "time_limit": seconds}
    found = milp(aim, constraints=constraints, integrality=np.ones_like(aim), bounds=Bounds(0, 1), options=options)
    bound = found.mip_dual_bound
    return found.x, -np.inf if bound is None else float(bound)


def _one_each(owners: NDArray[np.int64]) -> Any:
    from scipy.sparse import csr_array

    return csr_array((np.ones(len(owners)), (owners, np.arange(len(owners)))))


def _improved(
    taken: NDArray[np.int64],
    aim: NDArray[np.float64],
    costs: NDArray[np.float64],
    most: NDArray[np.float64],
    owners: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The options taken, those of one layer after another exchanged for what loses less, as long as the limits allow it.

    Args:
        taken: For each layer the place of its option among all.
        aim: The loss of each option.
        costs: Of each limit and each option, ``(limits, options)``.
        most: The most that each limit allows.
        owners: The layer of each option.
    """
    taken = taken.copy()
    while True:
        room = most - costs[:, taken].sum(1)
        gained = aim[taken][owners] - aim
        fits = (costs - costs[:, taken][:, owners] <= room[:, None]).all(0)
        best = int(np.argmax(np.where(fits, gained, 0.0)))
        if not (fits[best] and gained[best] > 0):
            return taken
        taken[owners[best]] = best
