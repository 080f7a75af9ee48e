"""Freezing schedules: which group of factors rests, and when.

Every decomposed layer has its factors in two groups. The *outer* one, group 0, is what meets the input first and, in a triple,
the output last: a low-rank layer's first factor, a block term layer's two 1×1s. The *inner* one, group 1, is the rest: the
second factor, the core. A group that rests is not trained. A schedule is a value; what it does to a network is the business of
`train.freezing`, and what it saves, of `measure`.

Hajimolahoseini et al., arXiv 2309.03824, section 3.
"""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, final

from .errors import FreezingError

Group = Literal[0, 1]
GROUP_NAMES = ("outer", "inner")


@final
@dataclass(frozen=True, slots=True)
class Phase:
    """One state of a schedule: the group that rests, None where all train, and its share of the steps, between 0 and 1."""

    resting: Group | None
    share: float

    def __str__(self) -> str:
        """``outer factors rest``."""
        return phase_name(self.resting)


def phase_name(resting: Group | None) -> str:
    """``outer factors rest``, ``inner factors rest`` or ``all factors train``."""
    return "all factors train" if resting is None else f"{GROUP_NAMES[resting]} factors rest"


class Schedule(ABC):
    """When which group of factors rests. Layers whose names match a pattern in ``exclude`` take no part: they always train."""

    __slots__ = ()
    exclude: tuple[str, ...]

    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The phases with their shares, which sum to 1: what a step costs in the mean follows from them."""

    @abstractmethod
    def resting(self, epoch: int, step: int, epochs: int | None) -> Group | None:
        """The group that rests.

        Args:
            epoch: Number of the epoch, from 0.
            step: Number of optimizer steps made since the beginning of the training, over all epochs.
            epochs: How many epochs there will be; None where nobody knows.

        Raises:
            FreezingError: The answer depends on the number of epochs, and it is not known.
        """

    def check(self, epochs: int | None) -> None:
        """Raise `FreezingError` where the schedule makes no sense for a training of so many epochs, or of unknown length."""
        if epochs is not None and (isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1):
            raise FreezingError(
                f"{epochs!r} epochs are no training; give a positive whole number, or None where it is not known"
            )

    def concerns(self, layer: str) -> bool:
        """Whether the factors of a layer of that name ever rest."""
        return not any(fnmatch.fnmatchcase(layer, pattern) for pattern in self.exclude)

    def idle_pattern(self, layers: Iterable[str]) -> str | None:
        """The first pattern in ``exclude`` that matches none of some names: a slip of the pen, most likely."""
        names = list(layers)
        return next((p for p in self.exclude if not any(fnmatch.fnmatchcase(name, p) for name in names)), None)


def _patterns(exclude: object) -> tuple[str, ...]:
    """A tuple also from a list, as JSON gives it; a bare string is a mistake, for each of its letters would be a pattern."""
    if isinstance(exclude, str) or not isinstance(exclude, tuple | list) or not all(isinstance(p, str) for p in exclude):
        raise FreezingError(f"exclude is {exclude!r}; give a tuple of patterns of layer names, such as ('layer4.*',)")
    return tuple(exclude)


@final
@dataclass(frozen=True, slots=True)
class SequentialFreezing(Schedule):
    """The two groups rest in turn (arXiv 2309.03824, sequential freezing).

    Args:
        period: How long each group rests before they change places.
        unit: What ``period`` counts: epochs, or optimizer steps.
        first: The group that rests first: ``"outer"`` (first factor; both 1×1s) or ``"inner"`` (second factor; core).
        unfrozen_last: So many epochs at the end train everything. The length of the training must then be known.
        exclude: Patterns as in the shell; the factors of layers matching one of them always train.

    Raises:
        FreezingError: A number or a word makes no sense.
    """

    period: int = 1
    unit: Literal["epochs", "steps"] = "epochs"
    first: Literal["outer", "inner"] = "outer"
    unfrozen_last: int = 0
    exclude: tuple[str, ...] = ()
    freezing: Literal["sequential"] = "sequential"

    def __post_init__(self) -> None:
        for name, number, least in (("period", self.period, 1), ("unfrozen_last", self.unfrozen_last, 0)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise FreezingError(f"{name} is {number!r}; it must be a whole number of {least} or more")
        if self.unit not in ("epochs", "steps"):
            raise FreezingError(f"unit is {self.unit!r}; a period counts 'epochs' or 'steps'")
        if self.first not in GROUP_NAMES:
            raise FreezingError(f"first is {self.first!r}; 'outer' or 'inner' factors can rest first")
        object.__setattr__(self, "exclude", _patterns(self.exclude))

    def phases(self) -> tuple[Phase, ...]:
        """Each group half of the time. Unfrozen epochs at the end are left out: against how many, a plan cannot know."""
        return Phase(0, 0.5), Phase(1, 0.5)

    def resting(self, epoch: int, step: int, epochs: int | None) -> Group | None:
        """The groups in turn, then none."""
        self.check(epochs)
        if epochs is not None and epoch >= epochs - self.unfrozen_last:
            return None
        turn = (epoch if self.unit == "epochs" else step) // self.period
        return 1 if (GROUP_NAMES.index(self.first) + turn) % 2 else 0

    def check(self, epochs: int | None) -> None:
        """Raise `FreezingError` where the unfrozen epochs at the end cannot be found, or are all there are."""
        Schedule.check(self, epochs)  # not super(): dataclasses with slots make the class anew
        if self.unfrozen_last and epochs is None:
            raise FreezingError(
                f"{self} must know how many epochs there will be: pass epochs= to lamina.freeze, or set unfrozen_last=0"
            )
        if epochs is not None and self.unfrozen_last >= epochs:
            raise FreezingError(f"{self} would freeze nothing in {epochs} epochs: make unfrozen_last smaller")

    def __str__(self) -> str:
        """``sequential freezing every epoch, outer first, last 2 epochs unfrozen``."""
        every = self.unit.removesuffix("s") if self.period == 1 else f"{self.period} {self.unit}"
        parts = [f"sequential freezing every {every}", f"{self.first} first"]
        if self.unfrozen_last:
            parts.append(f"last {self.unfrozen_last} epochs unfrozen" if self.unfrozen_last > 1 else "last epoch unfrozen")
        return ", ".join(parts) + _without(self.exclude)


@final
@dataclass(frozen=True, slots=True)
class VanillaFreezing(Schedule):
    """The outer group rests throughout: a low-rank layer's first factor, a block term layer's 1×1s (arXiv 2309.03824).

    Args:
        exclude: Patterns as in the shell; the factors of layers matching one of them always train.

    Raises:
        FreezingError: ``exclude`` is no tuple of patterns.
    """

    exclude: tuple[str, ...] = ()
    freezing: Literal["vanilla"] = "vanilla"

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", _patterns(self.exclude))

    def phases(self) -> tuple[Phase, ...]:
        """One."""
        return (Phase(0, 1.0),)

    def resting(self, epoch: int, step: int, epochs: int | None) -> Group | None:
        """Always the outer one."""
        return 0

    def __str__(self) -> str:
        """``vanilla freezing``."""
        return "vanilla freezing" + _without(self.exclude)


def _without(exclude: tuple[str, ...]) -> str:
    return f", without {', '.join(exclude)}" if exclude else ""


AnySchedule = SequentialFreezing | VanillaFreezing
