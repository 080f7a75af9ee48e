"""Goals: what a user asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

from .errors import GoalError


@final
@dataclass(frozen=True, slots=True)
class Ratio:
    """Make each layer's weight ``value`` times smaller: parameters before / parameters after, biases aside.

    It says from which rank the choice of each layer starts (arXiv 2309.03824, the α of its section 2); a rule that looks at
    timings may then step further down, and what was achieved stands in the plan.

    Raises:
        GoalError: The ratio is below 1, or no finite number.
    """

    value: float
    goal: Literal["ratio"] = "ratio"

    def __post_init__(self) -> None:
        if not (isinstance(self.value, int | float) and math.isfinite(self.value) and self.value >= 1):
            raise GoalError(f"a ratio of {self.value!r} is not possible: it is parameters before / after, 1 or more")

    def __str__(self) -> str:
        """``ratio 2``."""
        return f"ratio {self.value:g}"


Goal = Ratio
