"""A curve through measured points: what comes out at what was told, where the two are the same up to their size at first.

    below the first point     in proportion to what is told
    between two points        a power of it: a straight line in logarithms
    beyond the last point     the last power, at least 1

So a change too small to be measured costs what its like costs, and one that goes further than all that was measured costs at
least in proportion.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from typing import Self, final

from pydantic import PositiveFloat, model_validator

from .files import FileValue

_APART = 1.2
"""Points whose told values are less than this factor apart say nothing of the way between them."""
_STEEPEST = 3.0
"""The highest power beyond the last point: what is steeper between two points is their noise, or will not go on so."""
_MOST = math.log(1e300)


@final
class Curve(FileValue):
    """What comes out, by what is told: ``points`` of both, rising in both. Without points it is what is told."""

    points: tuple[tuple[PositiveFloat, PositiveFloat], ...] = ()

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if any(x0 >= x1 or y0 >= y1 for (x0, y0), (x1, y1) in zip(self.points, self.points[1:], strict=False)):
            raise ValueError("the points of a curve must rise")
        return self

    @classmethod
    def of(cls, measured: Iterable[tuple[float, float]]) -> Curve:
        """The curve through pairs of what was told and what came out, in any order.

        Those are left out that are not positive and finite, that are told nearly the same as the one before, or that come out
        no higher: noise, by which no curve may fall.
        """
        points: list[tuple[float, float]] = []
        for told, found in sorted(pair for pair in measured if all(0 < each < math.inf for each in pair)):
            if not points or (told >= _APART * points[-1][0] and found > points[-1][1]):
                points.append((told, found))
        return cls(points=tuple(points))

    def at(self, told: float) -> float:
        """What comes out where so much is told, 0 or more; it never falls, and where nothing is told nothing comes out."""
        if not self.points or told <= 0:
            return max(told, 0.0)
        number = bisect_left(self.points, told, key=lambda point: point[0])
        (x, y) = self.points[min(number, len(self.points) - 1)]
        if number == 0 or told == x:
            return y * (told / x)
        if number < len(self.points):
            (x0, y0), (x1, y1) = self.points[number - 1 : number + 1]
            return min(max(_power(x0, y0, told, _slope(x0, y0, x1, y1)), y0), y1)
        slope = _slope(*self.points[-2], x, y) if len(self.points) > 1 else 1.0
        return max(_power(x, y, told, min(max(slope, 1.0), _STEEPEST)), y)


def coherence(nats: Iterable[float]) -> float:
    """By how much more than their sum losses would cost if the errors behind them all pointed one way: ``(Σ √n)² − Σ n``."""
    each = list(nats)
    if len(each) < 2:  # exactly, for rounding is no loss
        return 0.0
    return max(math.fsum(math.sqrt(n) for n in each) ** 2 - math.fsum(each), 0.0)


def together(nats: Iterable[float], curve: Curve) -> float:
    """What losses of several layers, each alone, come to at once.

    Args:
        nats: Of each layer alone.
        curve: From their `coherence` to what they cost beyond their sum; without points: nothing is known of it.
    """
    each = list(nats)
    return math.fsum(each) + (curve.at(coherence(each)) if curve.points else 0.0)


def _slope(x0: float, y0: float, x1: float, y1: float) -> float:
    return (math.log(y1) - math.log(y0)) / (math.log(x1) - math.log(x0))


def _power(x: float, y: float, told: float, slope: float) -> float:
    return math.exp(min(math.log(y) + slope * (math.log(told) - math.log(x)), _MOST))
