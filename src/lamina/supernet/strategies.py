"""Strategies: in which order configurations are looked at. How a configuration is scored is none of their business.

A strategy asks its `Hunt` for the scores of some rows at a time and goes on from the answers. What it asks for follows from the
space, the limits, the seed and the scores alone. So all workers of a study walk the same way, each scores what nobody else has
begun, and there is no leader. Optuna's samplers are the exception: there each worker draws for itself.
"""

from __future__ import annotations

import heapq
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, final

import numpy as np

from ..errors import SearchError
from ..goals import Limit
from .screen import Screen
from .space import Row, Space

_WALKED = 1 << 24
"""Configurations up to which a screen looks at all of a space; in a larger one it goes from neighbour to neighbour."""

_AT_ONCE = 4096
"""Rows that are scored before a strategy looks again."""


class Asking(Protocol):
    """What a strategy of Optuna's needs of a search: to draw trials until so many configurations are scored."""

    def __call__(self, kind: Literal["tpe", "nsga2"], trials: int) -> None:
        """Draw."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Hunt:
    """What a strategy works with.

    Attributes:
        space: The space.
        limits: What a configuration may cost.
        seed: Of whatever is drawn.
        screen: What goes before the score, or None.
        score: Scores some rows, all workers together; a row whose score failed has −∞.
        ask: Lets Optuna draw.
    """

    space: Space
    limits: tuple[Limit, ...]
    seed: int
    screen: Screen | None
    score: Callable[[Sequence[Row]], dict[Row, float]]
    ask: Asking

    def screened(self) -> list[Row]:
        """The rows that the screen leaves over, the best first.

        A space of at most 16 million configurations is looked at whole; in a larger one the screen itself is searched breadth
        first, from the uniform configurations.
        """
        assert self.screen is not None
        screen, space = self.screen, self.space
        if space.size <= (_WALKED if not callable(screen.loss) else _WALKED // 64):
            best: list[tuple[float, Row]] = []
            for rows in space.within(self.limits):
                losses = screen.of(space, rows)
                order = np.argsort(losses, kind="stable")[: screen.survivors]
                fresh = [(float(losses[i]), tuple(map(int, rows[i]))) for i in order]
                best = list(itertools.islice(heapq.merge(best, fresh), screen.survivors))
            return [row for _, row in best]
        return self._walked_screen(screen)

    def _walked_screen(self, screen: Screen) -> list[Row]:
        found: dict[Row, float] = {}
        starts = [space_row for space_row in map(self.space.row, self.space.uniforms()) if self.allowed(space_row)]
        rng = random.Random(self.seed)
        starts += [self.space.row(self.space.sample_within(rng, self.limits)) for _ in range(8)]
        frontier = list(dict.fromkeys(row for row in starts if self.allowed(row)))
        while frontier:
            losses = screen.of(self.space, np.array(frontier, dtype=np.int64))
            found |= {row: float(loss) for row, loss in zip(frontier, losses, strict=True)}
            kept = heapq.nsmallest(max(screen.survivors // 4, 8), frontier, key=found.__getitem__)
            bar = sorted(found.values())[: screen.survivors][-1]
            frontier = [
                row
                for row in dict.fromkeys(n for row in kept if found[row] <= bar for n in self.space.neighbouring_rows(row))
                if row not in found and self.allowed(row)
            ]
        return heapq.nsmallest(screen.survivors, found, key=found.__getitem__)

    def allowed(self, row: Row) -> bool:
        """Whether all limits allow a row."""
        return self.space.allows(row, self.limits)


class Strategy(ABC):
    """In which order the configurations of a space are looked at."""

    __slots__ = ()

    @abstractmethod
    def explore(self, hunt: Hunt) -> None:
        """Have the scores made that this strategy wants; the search keeps them."""

    def check(self, hunt: Hunt) -> None:  # noqa: B027 - most strategies work on every space
        """Raise `SearchError` where the strategy cannot work on this space, before anything is scored."""


@final
@dataclass(frozen=True, slots=True)
class Exhaustive(Strategy):
    """Every configuration within the limits; after a screen, those that it leaves over.

    Args:
        most: A space with more configurations than this is refused, unless a screen goes before.
    """

    most: int = 100_000

    def check(self, hunt: Hunt) -> None:
        """Refuse a space that nobody would live to see the end of."""
        if hunt.screen is None and hunt.space.size > self.most:
            raise SearchError(
                f"the space holds {hunt.space.size:,} configurations, more than {self.most:,}: choose BreadthFirst(), "
                "pass a screen, or Exhaustive(most=…)"
            )

    def explore(self, hunt: Hunt) -> None:
        """Score all."""
        if hunt.screen is not None:
            hunt.score(hunt.screened())
            return
        for rows in hunt.space.within(hunt.limits):
            for start in range(0, len(rows), _AT_ONCE):
                hunt.score([tuple(row) for row in rows[start : start + _AT_ONCE].tolist()])

    def __str__(self) -> str:
        """``exhaustive search``."""
        return "exhaustive search"


@final
@dataclass(frozen=True, slots=True)
class BreadthFirst(Strategy):
    """Breadth first over neighbours, from a uniform configuration (arXiv 1912.00673, its breadth-first search).

    The frontier begins with the dearest uniform configuration that the limits allow, or the dearest of all that they allow. A
    neighbour has one layer one step away, or a pair of layers that trade cost, one a step up and one a step down. Those over
    a limit or seen before are dropped, the rest is scored, and the best ``beam`` of them are the next frontier. It ends when
    a round brings nothing better than the best so far; each restart begins anew from a random configuration.

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

    def explore(self, hunt: Hunt) -> None:
        """Round after round."""
        seen: set[Row] = set()
        for start in range(self.restarts + 1):
            rng = random.Random(f"{hunt.seed} {start}")
            first = _base(hunt) if start == 0 else hunt.space.row(hunt.space.sample_within(rng, hunt.limits))
            if first in seen or not hunt.allowed(first):
                continue
            seen.add(first)
            best = hunt.score([first])[first]
            frontier = [first]
            while candidates := self._candidates(hunt, frontier, seen, rng):
                scores = hunt.score(candidates)
                # Equal scores: the cheaper one, then the order of the space.
                ranked = sorted(candidates, key=lambda row: (-scores[row], hunt.space.cost_of_row(row).macs, row))
                if not scores[ranked[0]] > best:
                    break
                best = scores[ranked[0]]
                frontier = [row for row in ranked[: self.beam] if scores[row] > float("-inf")]

    def _candidates(self, hunt: Hunt, frontier: Iterable[Row], seen: set[Row], rng: random.Random) -> list[Row]:
        """The neighbours to score next; all that are looked at count as seen, unless they were left for want of room."""
        fresh = [
            row
            for row in dict.fromkeys(n for row in frontier for n in hunt.space.neighbouring_rows(row, pairs=self.pairs))
            if row not in seen and hunt.allowed(row)
        ]
        if self.candidates is not None and len(fresh) > self.candidates:
            if hunt.screen is not None:
                losses = hunt.screen.of(hunt.space, np.array(fresh, dtype=np.int64))
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

    def check(self, hunt: Hunt) -> None:
        """Optuna's samplers draw for themselves."""
        if hunt.screen is not None and self.kind != "random":
            raise SearchError(
                f"a screen does not go with {self}: take Sampled('random'), Exhaustive() or BreadthFirst(candidates=…)"
            )

    def explore(self, hunt: Hunt) -> None:
        """Draw and score."""
        if self.kind != "random":
            hunt.ask(self.kind, self.trials)
            return
        if hunt.screen is not None:
            hunt.score(hunt.screened()[: self.trials])
            return
        hunt.score(list(itertools.islice(_distinct(hunt), self.trials)))

    def __str__(self) -> str:
        """``100 configurations by tpe``."""
        return f"{self.trials} configurations by {self.kind}"


def _distinct(hunt: Hunt) -> Iterator[Row]:
    """Different random rows, until too many draws in a row bring nothing new."""
    rng = random.Random(hunt.seed)
    seen: set[Row] = set()
    idle = 0
    while idle < 1000:
        row = hunt.space.row(hunt.space.sample_within(rng, hunt.limits))
        if row in seen or not hunt.allowed(row):
            idle += 1
            continue
        idle = 0
        seen.add(row)
        yield row


def _base(hunt: Hunt) -> Row:
    """The dearest uniform row within the limits, by the first of them; if there is none, the dearest of all within them."""
    space, limits = hunt.space, hunt.limits
    rows = [row for row in map(space.row, space.uniforms()) if hunt.allowed(row)]
    if not rows:
        found = space.dearest_within(limits)
        assert found is not None, "the search has checked the limits"
        return space.row(found)
    return max(rows, key=lambda row: limits[0].of(space.cost_of_row(row))) if limits else rows[-1]


def _whole(**numbers: tuple[int, int]) -> None:
    for name, (number, least) in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise SearchError(f"{name} is {number!r}; it must be a whole number of {least} or more")
