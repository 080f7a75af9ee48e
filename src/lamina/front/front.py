"""Front: networks of one model at several speeds, each measured, and scored where there is a score. A value, saved as JSON."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any, Literal, final

from pydantic import NonNegativeFloat, PositiveFloat

from ..errors import GoalError, PlanError
from ..figures import Place, front_figure
from ..files import FileValue, one_line, read_model, write_whole
from ..goals import Drop
from ..plan import Plan
from ..shown import Shown

FORMAT = 1
_FILE = "front.json"


@final
class Point(FileValue):
    """One network of a front.

    Attributes:
        asked: The speed-up that was asked for; None for the fastest that there is, and where the plan's goal was a ratio.
        speedup: Median of the paired ratios before / after, of both whole networks in turn.
        interval: Its 95 % confidence interval.
        score: What the user's score says of it; None without one.
        nats: Predicted divergence from the network's own answers for each item; None where it was not predicted: without a
            calibration and its gradients, and where factors of the weights alone scored better.
        change: ‖after − before‖ / ‖before‖ of the outputs on the example; None where that cannot be told.
        plan: Its plan.
    """

    asked: PositiveFloat | None
    speedup: PositiveFloat
    interval: tuple[PositiveFloat, PositiveFloat]
    score: float | None = None
    nats: NonNegativeFloat | None = None
    change: NonNegativeFloat | None = None
    plan: Plan


@final
class Front(Shown, FileValue):
    """Networks of one model at several speeds, the slowest first. Made by `pareto`.

    Attributes:
        before: The score of the network itself; None without a score.
        points: The networks, each measured.
        uniform: To compare with, networks with the same ratio in every layer but the first and the last.
        example: What they were fed.
        conditions: Under which times were taken.
        notes: What the user should know first.
    """

    format: Literal[1] = 1
    before: float | None = None
    points: tuple[Point, ...]
    uniform: tuple[Point, ...] = ()
    example: str
    conditions: str
    notes: tuple[str, ...] = ()

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans of the points, in their order."""
        return tuple(point.plan for point in self.points)

    @property
    def by(self) -> Literal["score", "predicted loss", "change of the outputs"]:
        """What the points are compared by, besides their speed: the best that is known of all of them."""
        if self.before is not None:
            return "score"
        return "predicted loss" if all(point.nats is not None for point in self.points) else "change of the outputs"

    def merit(self, point: Point) -> float:
        """A point by that, higher is better."""
        if self.by == "score":
            return float("-inf") if point.score is None else point.score
        loss = point.nats if self.by == "predicted loss" else point.change
        return float("-inf") if loss is None else -loss

    @property
    def dominated(self) -> tuple[Point, ...]:
        """The points to which another one is not inferior in speed or merit, and superior in one of them."""
        return tuple(
            point
            for point in self.points
            if any(
                other.speedup >= point.speedup
                and self.merit(other) >= self.merit(point)
                and (other.speedup > point.speedup or self.merit(other) > self.merit(point))
                for other in self.points
            )
        )

    def best(self, drop: float) -> Point | None:
        """The fastest point whose score lies at most ``drop`` below the network's own; None where there is none.

        Raises:
            GoalError: The front has no scores, or the drop makes no sense.
        """
        if self.before is None:
            raise GoalError("this front has no scores: give lamina.pareto a score")
        least = self.before - Drop(drop).value
        fast = [point for point in self.points if self.merit(point) >= least]
        return max(fast, key=lambda point: point.speedup, default=None)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Score against speed-up, the network itself among the points, as a Matplotlib figure; without scores what is lost.

        Args:
            path: Where it is written too, if anywhere.

        Raises:
            MissingExtra: Matplotlib is not installed.
        """
        sign = 1 if self.by == "score" else -1

        def placed(points: tuple[Point, ...]) -> list[tuple[Point, Place]]:
            return [(each, (each.speedup, sign * self.merit(each))) for each in points if math.isfinite(self.merit(each))]

        every, uniform = placed(self.points), [place for _, place in placed(self.uniform)]
        own = (1.0, self.before or 0.0)
        out = self.dominated
        front = [own, *sorted(place for point, place in every if point not in out)]
        up = {"score": "score", "predicted loss": "predicted loss, nats for each item"}.get(self.by, self.by)
        places = [place for _, place in every]
        return front_figure(
            places,
            front,
            across="measured speed-up",
            up=up,
            best=("the network itself", own),
            beside=("the same ratio for every layer", uniform),
            path=path,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``front.json``, which holds all, and beside it the plan of each point: ``plan-1.json``, … .

        Of an earlier front in this folder nothing is left.

        Raises:
            PlanError: It cannot be written there.
        """
        target = Path(folder)
        try:
            target.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(PlanError):  # there is none
                for number in range(len(self.plans) + 1, len(Front.load(target).plans) + 1):
                    (target / f"plan-{number}.json").unlink(missing_ok=True)
            for number, plan in enumerate(self.plans, 1):
                plan.save(target / f"plan-{number}.json")
            write_whole(target / _FILE, (self.model_dump_json(indent=1) + "\n").encode())
        except (OSError, ValueError) as error:  # a ValueError is a path that no file can have
            raise PlanError(one_line(f"{folder}: the front cannot be written: {error}")) from error

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Front:
        """Read what `save` wrote.

        Raises:
            PlanError: No such file, cut short, of a newer format, or with a field that makes no sense; the message names it.
        """
        path = Path(folder) / _FILE
        unreadable, foreign = f"{path}: not a readable front", f"{path}: not a front: it has no points"
        front = read_model(path, cls, FORMAT, PlanError, unreadable=unreadable, foreign=foreign, needs="points")
        for number, point in enumerate([*front.points, *front.uniform], 1):
            point.plan.check(f"{path}: plan {number}")
        return front

    def headline(self) -> str:
        """How many points there are, and how fast the fastest is."""
        reach = f", up to ×{self.points[-1].speedup:.2f}" if self.points else ""
        return f"{len(self.points)} points{reach}"

    def __str__(self) -> str:
        """A table of at most 80 columns; dominated points bear a star."""
        rows = [("", "asked", "measured", "95 %", "score", "nats", "change", "layers")]
        out = self.dominated
        for number, point in enumerate(self.points, 1):
            asked = f"×{point.asked:.2f}" if point.asked else "fastest"
            rows.append((f"{number}{'*' if point in out else ''}", asked, *_told(point)))
        rows += [("", str(point.plan.goal), *_told(point)) for point in self.uniform]
        columns = [i for i in range(len(rows[0])) if any(row[i] not in ("", "–") for row in rows[1:])]
        widths = {i: max(len(row[i]) for row in rows) for i in columns}
        lines = ["  ".join(row[i].ljust(widths[i]) for i in columns).rstrip() for row in rows] if self.points else []
        if self.before is not None:
            lines.append(f"the network itself scores {self.before + 0.0:.5g}")
        elif self.points:
            lines.append(f"there is no score: points are compared by {self.by}")
        if any(point.nats is not None for point in self.points):
            lines.append("nats: predicted divergence from the network's own answers, for each item")
        if self.uniform:
            lines.append("ratio: the same for every layer but the first and the last, to compare with")
        if out:
            lines.append(f"*: another point is as fast and no worse by its {self.by}, and better in one of them")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _told(point: Point) -> tuple[str, str, str, str, str, str]:
    low, high = point.interval
    return (
        f"×{point.speedup:.2f}",
        f"{low:.2f}–{high:.2f}",
        _number(point.score, ".5g"),
        _number(point.nats, ".3g"),
        _number(point.change, ".3g"),
        f"{len(point.plan.decomposed)} of {len(point.plan.layers)}",
    )


def _number(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)
