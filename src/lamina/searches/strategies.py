"""Strategies: in which order configurations are looked at. How a configuration is scored is none of their business.

A strategy asks its `Problem` for the scores of some rows at a time and goes on from the answers. What it asks for follows from
the space, the limits, the seed and the scores alone. So all workers of a study walk the same way, each scores what nobody else
has begun, and there is no leader. Optuna's samplers are the exception: there each worker draws for itself.
"""

from __future__ import annotations

import heapq
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, final

import numpy as np

from ..errors import SearchError
from ..goals import Limit
from ..supernet.space import Losses, Row, Space
from .additive import Additive
from .screen import Screen

_WALKED = 1 << 24
"""Configurations up to which a screen looks at all of a space; in a larger one losses by layer are solved for."""

_AT_ONCE = 4096
"""Rows that are scored before a strategy looks again."""


class Asking(Protocol):
    """What a strategy of Optuna's needs of a search: to draw trials until so many configurations are scored."""

    def __call__(self, kind: Literal["tpe", "nsga2"], trials: int) -> None:
        """Draw."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Problem:
    """What a strategy works with.

    Attributes:
        space: The space.
        limits: What a configuration may cost.
        seed: Of whatever is drawn.
        screen: What goes before the score, or None.
        losses: What the network is thought to lose by each form of each layer, before anything is scored.
        score: Scores some rows, all workers together; a row whose score failed has −∞.
        ask: Lets Optuna draw.
    """

    space: Space
    limits: tuple[Limit, ...]
    seed: int
    screen: Screen | None
    losses: Losses
    score: Callable[[Sequence[Row]], dict[Row, float]]
    ask: Asking

    def screened(self) -> list[Row]:
        """The rows that the screen leaves over, the best first.

        Losses by layer are solved for, the next best following one another. Of a function every configuration is asked for.

        Raises:
            SearchError: The screen is a function, and the space holds too many configurations to ask for all.
        """
        assert self.screen is not None
        screen, space = self.screen, self.space
        if isinstance(screen.loss, Mapping) and space.size > _WALKED:
            return list(itertools.islice(best_rows(space, screen.loss, self.limits), screen.survivors))
        if callable(screen.loss) and space.size > _WALKED // 64:
            raise SearchError(
                f"the screen is a function, and the space holds {space.size:,} configurations, too many for it: give it "
                "losses by layer and form, or fewer forms"
            )
        best: list[tuple[float, Row]] = []
        for rows in space.within(self.limits):
            losses = screen.of(space, rows)
            order = np.argsort(losses, kind="stable")[: screen.survivors]
            fresh = [(float(losses[i]), tuple(map(int, rows[i]))) for i in order]
            best = list(itertools.islice(heapq.merge(best, fresh), screen.survivors))
        return [row for _, row in best]

    def allowed(self, row: Row) -> bool:
        """Whether all limits allow a row."""
        return self.space.allows(row, self.limits)

    def start(self) -> Row:
        """The dearest uniform row within the limits, by the first of them; if there is none, the dearest of all within them."""
        space, limits = self.space, self.limits
        rows = [row for row in map(space.row, space.uniforms()) if self.allowed(row)]
        if not rows:
            found = space.dearest_within(limits)
            assert found is not None, "the search has checked the limits"
            return space.row(found)
        return max(rows, key=lambda row: limits[0].of(space.cost_of_row(row))) if limits else rows[-1]


class Strategy(ABC):
    """In which order the configurations of a space are looked at."""

    __slots__ = ()

    @abstractmethod
    def explore(self, problem: Problem) -> None:
        """Have the scores made that this strategy wants; the search keeps them."""

    def check(self, problem: Problem) -> None:  # noqa: B027 - most strategies work on every space
        """Raise `SearchError` where the strategy cannot work on this space, before anything is scored."""


@final
@dataclass(frozen=True, slots=True)
class Solved(Strategy):
    """The least predicted loss within the limits, solved for exactly, scored, learnt from, and solved for again.

    A configuration's loss is predicted by a sum over its layers, which begins as the losses of the supernet or the screen. Each
    round the knapsack (`lamina.choose.budget`) proposes configurations that no score is known of: the best by what is believed,
    and the best by draws from what may be true as well (Thompson, Biometrika 25, 1933), so that what nobody has tried is tried.
    The scores correct the sum by a Bayesian regression (`additive`). It ends after ``trials``, or when ``patience`` rounds in
    turn brought nothing better.

    Args:
        trials: At most so many configurations are scored, by all workers together.
        each: Configurations a round.
        patience: Rounds without a better score after which it ends.

    Raises:
        SearchError: A number makes no sense.
    """

    trials: int = 64
    each: int = 8
    patience: int = 3

    def __post_init__(self) -> None:
        _whole(trials=(self.trials, 1), each=(self.each, 1), patience=(self.patience, 1))

    def check(self, problem: Problem) -> None:
        """A screen must tell losses by layer: a sum is what is solved for."""
        if problem.screen is not None and callable(problem.screen.loss):
            raise SearchError(f"a screen that is a function does not go with {self}: give it losses by layer and form")

    def explore(self, problem: Problem) -> None:
        """Propose, score, correct."""
        believed = problem.losses if problem.screen is None else problem.screen.loss
        assert isinstance(believed, Mapping), "checked before"
        space = problem.space
        model = Additive(space, believed, problem.seed)
        scores: dict[Row, float] = {}
        best, idle = -np.inf, 0
        while len(scores) < self.trials and idle < self.patience:
            fresh: list[Row] = []
            # The first round goes by what was believed before; there the uniform start stands for what anybody would try.
            tables = itertools.chain([model.believed()], (model.drawn() for _ in itertools.count()))
            if not scores and problem.start() not in fresh:
                fresh.append(problem.start())
            vain = 0
            while len(fresh) < min(self.each, self.trials - len(scores)) and vain < 2 * self.each:
                row = space.solved(next(tables), problem.limits, without=[*scores, *fresh])
                if row is None:
                    if not fresh or vain:
                        break  # there is no other within the limits
                    vain += 1
                else:
                    fresh.append(row)
            if not fresh:
                return
            found = problem.score(fresh)
            scores |= found
            model.learn(found)
            top = max(found.values())
            idle = 0 if top > best else idle + 1
            best = max(best, top)

    def __str__(self) -> str:
        """``solved for, at most 64 scores``."""
        return f"solved for, at most {self.trials} scores"


@final
@dataclass(frozen=True, slots=True)
class Exhaustive(Strategy):
    """Every configuration within the limits; after a screen, those that it leaves over.

    Args:
        most: A space with more configurations than this is refused, unless a screen goes before.
    """

    most: int = 100_000

    def check(self, problem: Problem) -> None:
        """Refuse a space that nobody would live to see the end of."""
        if problem.screen is None and problem.space.size > self.most:
            raise SearchError(
                f"the space holds {problem.space.size:,} configurations, more than {self.most:,}: choose Solved(), "
                "pass a screen, or Exhaustive(most=…)"
            )

    def explore(self, problem: Problem) -> None:
        """Score all."""
        if problem.screen is not None:
            problem.score(problem.screened())
            return
        for rows in problem.space.within(problem.limits):
            for start in range(0, len(rows), _AT_ONCE):
                problem.score([tuple(row) for row in rows[start : start + _AT_ONCE].tolist()])

    def __str__(self) -> str:
        """``exhaustive search``."""
        return "exhaustive search"


@final
@dataclass(frozen=True, slots=True)
class BreadthFirst(Strategy):
    """Breadth first over neighbours, from a uniform configuration (arXiv 1912.00673, its breadth-first search).

    The frontier begins with the dearest uniform configuration that the limits allow, or the dearest of all that they allow. A
    neighbour has one layer in any other of its forms, or a pair of layers that trade cost, one a step up and one a step down.
    Those over a limit or seen before are dropped, the rest is scored, and the best ``beam`` of them are the next frontier. It
    ends when a round brings nothing as good as the best so far; each restart begins anew from a random configuration.

    In the paper a single layer moves by one step as well. That suits MACs, which rise from step to step; measured times do not,
    and a limit may forbid the step that lies between two forms.

    Args:
        beam: How many configurations a round goes on from.
        restarts: How often to begin anew after the first time.
        pairs: Whether pairs of layers are tried.
        candidates: At most so many are scored in a round: after a screen those of the least predicted loss, otherwise random
            ones. None scores all.

    Raises:
        SearchError: A number makes no sense.
    """

    beam: int = 4
    restarts: int = 0
    pairs: bool = True
    candidates: int | None = None

    def __post_init__(self) -> None:
        _whole(beam=(self.beam, 1), restarts=(self.restarts, 0))
        if self.candidates is not None:
            _whole(candidates=(self.candidates, 1))

    def check(self, problem: Problem) -> None:
        """A screen must have something to choose among."""
        if problem.screen is not None and self.candidates is None:
            raise SearchError("a screen goes with BreadthFirst(candidates=…), which says how many of a round are scored")

    def explore(self, problem: Problem) -> None:
        """Walk from the uniform configuration, then from random ones."""
        rng = random.Random(problem.seed)
        seen: set[Row] = set()
        best = -np.inf
        for number in range(self.restarts + 1):
            start = problem.start() if number == 0 else self._random(problem, rng, seen)
            if start is None:
                return
            seen.add(start)
            scores = problem.score([start])
            best = max(best, scores[start])
            frontier = [start]
            while fresh := self._fresh(problem, rng, frontier, seen):
                scores = problem.score(fresh)
                cost = problem.space.cost_of_row
                frontier = sorted(fresh, key=lambda row: (-scores[row], cost(row).macs, row))[: self.beam]
                if not scores[frontier[0]] >= best:
                    break
                best = scores[frontier[0]]

    def _random(self, problem: Problem, rng: random.Random, seen: set[Row]) -> Row | None:
        for _ in range(100):
            row = problem.space.row(problem.space.sample_within(rng, problem.limits))
            if row not in seen and problem.allowed(row):
                return row
        return None

    def _fresh(self, problem: Problem, rng: random.Random, frontier: Iterable[Row], seen: set[Row]) -> list[Row]:
        fresh = [
            row
            for row in dict.fromkeys(n for row in frontier for n in neighbours(problem.space, row, pairs=self.pairs))
            if row not in seen and problem.allowed(row)
        ]
        if self.candidates is not None and len(fresh) > self.candidates:
            if problem.screen is not None:
                losses = problem.screen.of(problem.space, np.array(fresh, dtype=np.int64))
                fresh = [fresh[i] for i in np.argsort(losses, kind="stable")[: self.candidates]]
            else:
                fresh = rng.sample(fresh, self.candidates)
        seen.update(fresh)
        return fresh

    def __str__(self) -> str:
        """``breadth-first search, beam 4``."""
        parts = [f"breadth-first search, beam {self.beam}"]
        if self.restarts:
            parts.append(f"{self.restarts} restarts")
        if not self.pairs:
            parts.append("without pairs")
        if self.candidates is not None:
            parts.append(f"{self.candidates} candidates a round")
        return ", ".join(parts)


@final
@dataclass(frozen=True, slots=True)
class Sampled(Strategy):
    """Configurations that are drawn: at random, or by one of Optuna's samplers.

    ``"random"`` draws within the limits, each layer uniformly, and makes a draw cheaper layer by layer until they allow it;
    after a screen, those that it leaves over are taken instead. ``"tpe"`` looks for the best score, ``"nsga2"`` for the whole
    front of score and cost; both take the limits as constraints.

    Args:
        kind: Who draws.
        trials: How many different configurations are scored, by all workers together.

    Raises:
        SearchError: There is no such sampler, or the number makes no sense.
    """

    kind: Literal["random", "tpe", "nsga2"] = "random"
    trials: int = 100

    def __post_init__(self) -> None:
        if self.kind not in ("random", "tpe", "nsga2"):
            raise SearchError(f"there is no sampler {self.kind!r}: 'random', 'tpe' or 'nsga2'")
        _whole(trials=(self.trials, 1))

    def check(self, problem: Problem) -> None:
        """Optuna's samplers draw for themselves."""
        if problem.screen is not None and self.kind != "random":
            raise SearchError(
                f"a screen does not go with {self}: take Solved(), Exhaustive(), Sampled('random'), BreadthFirst(candidates=…)"
            )

    def explore(self, problem: Problem) -> None:
        """Draw and score."""
        if self.kind != "random":
            problem.ask(self.kind, self.trials)
            return
        if problem.screen is not None:
            problem.score(problem.screened()[: self.trials])
            return
        problem.score(list(itertools.islice(_distinct(problem), self.trials)))

    def __str__(self) -> str:
        """``100 configurations by tpe``."""
        return f"{self.trials} configurations by {self.kind}"


def best_rows(space: Space, losses: Losses, limits: Sequence[Limit]) -> Iterator[Row]:
    """Rows within limits, from the least sum of losses on, one after the other."""
    found: list[Row] = []
    while (row := space.solved(losses, limits, without=found)) is not None:
        found.append(row)
        yield row


def neighbours(space: Space, row: Row, *, pairs: bool = True) -> Iterator[Row]:
    """Rows next to one: each layer in any other of its forms, and pairs of layers of which one steps up and one down.

    Args:
        space: The space.
        row: The row.
        pairs: Whether pairs come too; they trade cost between two layers.
    """
    sizes = [len(choice.forms) for choice in space.choices.values()]
    for layer, size in enumerate(sizes):
        yield from ((*row[:layer], form, *row[layer + 1 :]) for form in range(size) if form != row[layer])
    if pairs:
        up = [layer for layer, form in enumerate(row) if form < sizes[layer] - 1]
        down = [layer for layer, form in enumerate(row) if form > 0]
        for higher, lower in itertools.product(up, down):
            if higher != lower:
                yield tuple(form + (layer == higher) - (layer == lower) for layer, form in enumerate(row))


def _distinct(problem: Problem) -> Iterator[Row]:
    """Different random rows, until too many draws in a row bring nothing new."""
    rng = random.Random(problem.seed)
    seen: set[Row] = set()
    idle = 0
    while idle < 1000:
        row = problem.space.row(problem.space.sample_within(rng, problem.limits))
        if row in seen or not problem.allowed(row):
            idle += 1
            continue
        idle = 0
        seen.add(row)
        yield row


def _whole(**numbers: tuple[int, int]) -> None:
    for name, (number, least) in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise SearchError(f"{name} is {number!r}; it must be a whole number of {least} or more")
