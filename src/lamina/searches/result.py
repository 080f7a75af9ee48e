"""What a search found: its trials, their front, and the winner."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from ..comparison import Comparison
from ..figures import front_figure
from ..goals import AnyLimit
from ..plan import Plan
from ..shown import Shown
from ..supernet.space import Configuration, described
from ..values import Cost


@final
@dataclass(frozen=True, slots=True)
class Trial:
    """A configuration that was scored: what it costs, its score, or why it has none."""

    config: Configuration
    cost: Cost
    score: float | None
    error: str | None = None
    seconds: float = 0.0
    worker: str = ""

    @property
    def merit(self) -> float:
        """The score; −∞ for a failed one."""
        return float("-inf") if self.score is None else self.score

    def __str__(self) -> str:
        """``0.912 at 21.3 k parameters, 2.59 M MACs: …``."""
        what = f"{self.score:.6g}" if self.score is not None else f"failed ({self.error})"
        return f"{what} at {self.cost}: {described(self.config)}"


@final
@dataclass(frozen=True, slots=True)
class Winner:
    """The best configuration that was scored.

    Attributes:
        config: The configuration.
        score: Its score in the supernet.
        cost: What it costs, by the space's numbers.
        plan: A plan like any other.
        measured: The whole extracted network against the original, where time was limited and could be measured here.
    """

    config: Configuration
    score: float
    cost: Cost
    plan: Plan
    measured: Comparison | None = None


@final
@dataclass(frozen=True, slots=True, repr=False)
class SearchResult(Shown):
    """How a search went.

    Attributes:
        best: The winner.
        trials: Every configuration within the limits that the study has scored, the best first; failed ones last.
        limits: What was asked for.
        strategy: How it was looked for, as it prints.
        whole: The cost of the original network.
        over: Finalists whose whole network took longer than allowed when it was measured, with their times in milliseconds.
        network: The winner as it was scored, plain layers; its batch norms have the statistics that its score estimated.
        recalibrated: Whether its score did that, so that `Supernet.extract` gives another network without ``recalibration=``.
    """

    best: Winner
    trials: tuple[Trial, ...]
    limits: tuple[AnyLimit, ...]
    strategy: str
    whole: Cost
    over: tuple[tuple[Trial, float], ...] = ()
    network: nn.Module | None = None
    recalibrated: bool = False

    @property
    def scored(self) -> tuple[Trial, ...]:
        """The trials that have a score."""
        return tuple(trial for trial in self.trials if trial.score is not None)

    @property
    def failed(self) -> tuple[Trial, ...]:
        """The trials whose score raised, or was no finite number."""
        return tuple(trial for trial in self.trials if trial.score is None)

    @property
    def front(self) -> tuple[Trial, ...]:
        """The trials that no other one beats in both score and cost, the cheapest first; cost is that of the first limit."""
        front: list[Trial] = []
        for trial in sorted(self.scored, key=lambda t: (self.price(t.cost), -t.merit)):
            if not front or trial.merit > front[-1].merit:
                front.append(trial)
        return tuple(front)

    def price(self, cost: Cost) -> float:
        """The part of a cost that the first limit looks at; without limits its MACs."""
        return self.limits[0].of(cost) if self.limits else float(cost.macs)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Score against cost: every trial, the front, the winner and the limit, as a Matplotlib figure.

        Args:
            path: Where it is written too, if anywhere.

        Raises:
            MissingExtra: Matplotlib is not installed.
        """
        unit = {"milliseconds": "ms", "macs": "MACs", "parameters": "parameters"}
        return front_figure(
            [(self.price(trial.cost), trial.merit) for trial in self.scored],
            [(self.price(trial.cost), trial.merit) for trial in self.front],
            across=unit[self.limits[0].goal] if self.limits else "MACs",
            up="score in the supernet",
            best=("winner", (self.price(self.best.cost), self.best.score)),
            limit=(f"limit {self.limits[0]}", self.limits[0].value) if self.limits else None,
            path=path,
        )

    @property
    def against(self) -> str:
        """How the winner stands against the original: its speed, or where nothing was timed its size."""
        if self.best.measured is None:
            share = self.best.cost.macs / self.whole.macs if self.whole.macs else 1.0
            return f"{share:.2f} of the original's MACs; not timed: a limit on time, or net.time(), tells how fast it is"
        speedup, (low, high) = self.best.measured.speedup, self.best.measured.interval
        slower = " SLOWER than the original: limit its time" if high < 1 else ""
        return f"×{speedup:.2f} against the original ({low:.2f} to {high:.2f}).{slower}"

    def __str__(self) -> str:
        """How fast it is against the original, the winner, what was scored, and the front."""
        limit = " and ".join(map(str, self.limits)) or "no limit"
        lines = [
            self.against,
            f"{self.strategy} within {limit}: {len(self.scored)} configurations scored, {len(self.failed)} failed",
            f"best: {self.best.score:.6g} at {self.best.cost}: {described(self.best.config)}",
        ]
        if self.best.measured:
            lines.append(f"whole network: {self.best.measured}")
        if self.recalibrated:
            lines.append(
                "its batch norms were estimated anew for its score: take result.network, or extract with the same recalibration"
            )
        lines += [f"over the limit when measured as a whole: {ms:.4g} ms, {trial}" for trial, ms in self.over]
        lines += [f"front: {trial}" for trial in self.front]
        return "\n".join(lines)
