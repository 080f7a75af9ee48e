"""The nested order of a space: one list of steps, so that every limit is met by a prefix of it.

Each step makes one layer cheaper, and the steps stand by what they lose for what they save. Within a layer only forms on the
lower convex hull of cost and loss are stepped on, so the steps of a layer come in their own order by themselves. What a prefix
ends at is the best answer, by additive losses, to the limit that it just meets, among configurations of such forms: it is the
knapsack's relaxation (Sinha and Zoltners, Operations Research 27, 1979). FlexRank (arXiv 2602.02680) orders the ranks of a
network so; here stand groups, ranks and the dense layer in one list, and cost is measured time.
"""

from __future__ import annotations

import math
from itertools import pairwise

from ..errors import SearchError
from ..goals import Limit
from .space import Losses, Row, Space


def nested_order(space: Space, losses: Losses, price: Limit) -> list[Row]:
    """The rows of the order, from the one that loses least to the one that costs least.

    Args:
        space: The space.
        losses: Layer → form → loss.
        price: What is to be saved: the part of a cost that this limit looks at. Its value does not matter.

    Raises:
        SearchError: Times are asked for, and nothing was timed; or a form has no loss.
    """
    steps: list[tuple[float, int, int, int]] = []  # loss for what is saved, layer, number in the layer, form
    start: list[int] = []
    for at, (name, choice) in enumerate(space.choices.items()):
        if missing := [form for form in choice.forms if form not in losses.get(name, {})]:
            raise SearchError(f"{name or 'the network'}: there is no loss of {missing[0]}")
        costs = [price.of(cost) for cost in choice.costs]
        points = [(cost, losses[name][form]) for cost, form in zip(costs, choice.forms, strict=True)]
        if not (hull := _hull(points)):
            raise SearchError(f"{name or 'the network'}: none of its forms has a finite loss")
        start.append(hull[0])
        for number, (before, after) in enumerate(pairwise(hull)):
            lost = losses[name][choice.forms[after]] - losses[name][choice.forms[before]]
            steps.append((lost / (costs[before] - costs[after]), at, number, after))
    rows = [tuple(start)]
    for _, at, _, form in sorted(steps):
        rows.append((*rows[-1][:at], form, *rows[-1][at + 1 :]))
    return rows


def _hull(points: list[tuple[float, float]]) -> list[int]:
    """Positions of (cost, loss) on the lower convex hull, from the least loss to the least cost."""
    order = sorted((i for i, (_, loss) in enumerate(points) if math.isfinite(loss)), key=lambda i: (points[i][1], points[i][0]))
    kept: list[int] = []
    for i in order:
        cost, loss = points[i]
        if kept and cost >= points[kept[-1]][0]:
            continue  # dearer, and no better
        while len(kept) > 1:
            (c1, l1), (c2, l2) = points[kept[-2]], points[kept[-1]]
            if (l2 - l1) * (c2 - cost) < (loss - l2) * (c1 - c2):
                break
            kept.pop()
        kept.append(i)
    return kept
