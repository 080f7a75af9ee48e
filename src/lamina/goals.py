"""Goals: what a user asks for. A limit is a goal too: what a network, or a configuration of a supernet, may cost at most."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self, final

from pydantic import Field

from .errors import GoalError
from .values import Cost, as_number, quantity, quoted


@final
@dataclass(frozen=True, slots=True)
class Ratio:
    """Make each layer's weight ``value`` times smaller: parameters before / parameters after, biases aside.

    It says from which rank the choice of each layer starts (arXiv 2309.03824, the α of its section 2); a rule that looks at
    timings may then step further down, and what was achieved stands in the plan. For a rule that looks at the weight's spectrum
    it is the least that is to be gained: the spectrum says the rank, and a layer that it leaves larger than this stays dense.

    Raises:
        GoalError: The ratio is below 1, or no finite number.
    """

    value: float
    goal: Literal["ratio"] = "ratio"

    def __post_init__(self) -> None:
        number = as_number(self.value)
        if not 1 <= number < math.inf:
            raise GoalError(f"a ratio of {self.value!r} is not possible: it is a number, parameters before / after, 1 or more")
        object.__setattr__(self, "value", number)

    def __str__(self) -> str:
        """``ratio 2``."""
        return f"ratio {self.value:g}"


class Limit(ABC):
    """The most that something may cost. Several limits hold together."""

    __slots__ = ()
    value: float

    @abstractmethod
    def of(self, cost: Cost) -> float:
        """The part of a cost that is limited, in the limit's unit."""

    @abstractmethod
    def at(self, cost: Cost) -> Limit:
        """The limit that a cost just meets."""

    def absolute(self, before: Cost) -> Self:
        """Itself: it does not depend on what the network cost before."""
        return self

    def allows(self, cost: Cost) -> bool:
        """Whether a cost is within the limit.

        Raises:
            GoalError: Time is limited, and the cost has none.
        """
        return self.of(cost) <= self.value


def _positive(limit: Limit) -> None:
    number = as_number(limit.value)
    if not 0 < number < math.inf:
        raise GoalError(f"a limit of {limit.value!r} is not possible: {type(limit).__name__} takes a positive number")
    object.__setattr__(limit, "value", number)


@final
@dataclass(frozen=True, slots=True)
class Milliseconds(Limit):
    """At most ``value`` milliseconds for one call on the example, as measured here; with several workloads their weighted mean.

    Raises:
        GoalError: The number is not positive, or not finite.
    """

    value: float
    goal: Literal["milliseconds"] = "milliseconds"

    def __post_init__(self) -> None:
        _positive(self)

    def of(self, cost: Cost) -> float:
        """The median in milliseconds."""
        if cost.timing is None:
            raise GoalError("time is limited, and these costs hold no time: measure them first")
        return cost.timing.median_s * 1e3

    def at(self, cost: Cost) -> Milliseconds:
        """The limit that a cost just meets."""
        return Milliseconds(self.of(cost))

    def __str__(self) -> str:
        """``4 ms``."""
        return f"{self.value:.4g} ms"


@final
@dataclass(frozen=True, slots=True)
class Macs(Limit):
    """At most ``value`` multiply-accumulates on the example, batch included, biases counted as one each.

    Raises:
        GoalError: The number is not positive, or not finite.
    """

    value: float
    goal: Literal["macs"] = "macs"

    def __post_init__(self) -> None:
        _positive(self)

    def of(self, cost: Cost) -> float:
        """The MACs."""
        return cost.macs

    def at(self, cost: Cost) -> Macs:
        """The limit that a cost just meets."""
        return Macs(self.of(cost))

    def __str__(self) -> str:
        """``581 M MACs``."""
        return f"{quantity(self.value)} MACs"


@final
@dataclass(frozen=True, slots=True)
class Parameters(Limit):
    """At most ``value`` parameters, biases and norms included.

    Raises:
        GoalError: The number is not positive, or not finite.
    """

    value: float
    goal: Literal["parameters"] = "parameters"

    def __post_init__(self) -> None:
        _positive(self)

    def of(self, cost: Cost) -> float:
        """The parameters."""
        return cost.parameters

    def at(self, cost: Cost) -> Parameters:
        """The limit that a cost just meets."""
        return Parameters(self.of(cost))

    def __str__(self) -> str:
        """``11.2 M parameters``."""
        return f"{quantity(self.value)} parameters"


AnyLimit = Milliseconds | Macs | Parameters


@final
@dataclass(frozen=True, slots=True)
class Speedup:
    """At least ``value`` times as fast as the network is now, as measured here; with several workloads by their weighted mean.

    Raises:
        GoalError: The number is not above 1, or not finite.
    """

    value: float
    goal: Literal["speedup"] = "speedup"

    def __post_init__(self) -> None:
        number = as_number(self.value)
        if not 1 < number < math.inf:
            raise GoalError(f"a speed-up of {self.value!r} is not possible: it is a number, time before / after, above 1")
        object.__setattr__(self, "value", number)

    def absolute(self, before: Cost) -> Milliseconds:
        """The time that this is for a network of a measured cost."""
        return Milliseconds(Milliseconds(1.0).of(before) / self.value)

    def __str__(self) -> str:
        """``speed-up 1.5``."""
        return f"speed-up {self.value:.4g}"


Budget = Speedup | AnyLimit
"""What a whole network may cost."""


@final
@dataclass(frozen=True, slots=True)
class Within:
    """Several limits at once, or none: a form chosen by hand for every layer."""

    limits: tuple[Annotated[Budget, Field(discriminator="goal")], ...] = ()
    goal: Literal["within"] = "within"

    def __str__(self) -> str:
        """``4 ms and 11.2 M parameters``, or ``no limit``."""
        return " and ".join(map(str, self.limits)) or "no limit"


@final
@dataclass(frozen=True, slots=True)
class Drop:
    """The fastest whole network, as measured here, whose score lies at most ``value`` below the network's own.

    The score is the user's, ``make_plan(…, score=…)``, and higher is better; the drop is in its unit.

    Raises:
        GoalError: The number is below 0, or not finite.
    """

    value: float
    goal: Literal["drop"] = "drop"

    def __post_init__(self) -> None:
        number = as_number(self.value)
        if not 0 <= number < math.inf:
            raise GoalError(f"a drop of {self.value!r} is not possible: it is a number, score before − after, 0 or more")
        object.__setattr__(self, "value", number)

    def __str__(self) -> str:
        """``drop 0.005``."""
        return f"drop {self.value:.4g}"


Goal = Ratio | Speedup | Milliseconds | Macs | Parameters | Within | Drop


def within(limits: Sequence[Budget]) -> Goal:
    """Some limits as one goal: a single one as itself."""
    return limits[0] if len(limits) == 1 else Within(tuple(limits))


def limits_in(goal: Goal) -> tuple[Budget, ...]:
    """What a budget limits."""
    return goal.limits if isinstance(goal, Within) else (goal,)  # type: ignore[return-value]


def in_time(budgets: Sequence[Budget]) -> bool:
    """Whether times must be known to tell what is within some budgets."""
    return any(isinstance(each, Speedup | Milliseconds) for each in budgets)


def goal_of(asked: object) -> Goal:
    """What a user asks for, as one goal: a goal, or a list of limits that hold together.

    Raises:
        GoalError: It is no goal.
    """
    if isinstance(asked, Goal):
        return asked
    if isinstance(asked, list | tuple) and asked and all(isinstance(each, Budget) for each in asked):
        return within(asked)
    raise GoalError(
        f"{quoted(asked)} is no goal: give lamina.Speedup(1.5), Milliseconds(…), Macs(…), Parameters(…), a list of these, "
        "lamina.Drop(0.005) or lamina.Ratio(2)"
    )
