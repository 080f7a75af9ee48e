"""Rules: how a layer's form follows from the evidence.

A rule is its configuration. It is asked a `Question`, which hands out evidence when asked for it and at no cost when not: a
rule that needs no timings causes none, and one that needs no spectrum none either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Real
from typing import Protocol, final

from ..errors import GoalError
from ..factorize.evbmf import evbmf_rank
from ..forms import Dense, Form
from ..values import Geometry, Timing, as_number
from .spectra import Spectrum, form_of


class Question(Protocol):
    """One layer, the forms it may take, and the evidence about them."""

    @property
    def geometry(self) -> Geometry:
        """Of the layer."""

    path: tuple[Form, ...]
    """From the form at the goal's ratio down, one rank at a time."""
    aligned: tuple[Form, ...]
    """Forms in the same window whose ranks suit blocked kernels, largest first."""
    ratio: float
    """The goal's."""

    def spectra(self) -> tuple[Spectrum, ...]:
        """The spectrum of each side of the weight. Layers that are alike but for their weights are then asked one by one."""

    def times(self, forms: Sequence[Form]) -> dict[Form, Timing]:
        """Measured times of forms, `Dense` among them if asked for."""


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """The form that a rule takes, and why, in a line; and the best one that it doubted, where it stays dense for its time."""

    form: Form
    reason: str
    doubted: Form | None = None


class Rule(Protocol):
    """How a form is chosen."""

    @property
    def timed(self) -> bool:
        """Whether the rule looks at timings: only then is its choice judged against the clock afterwards."""

    def choose(self, question: Question) -> Choice:
        """Answer a question whose path is not empty."""


@final
@dataclass(frozen=True, slots=True)
class AtRatio:
    """The rank that the ratio asks for; no timing (arXiv 2309.03824, section 2)."""

    @property
    def timed(self) -> bool:
        """No."""
        return False

    def choose(self, question: Question) -> Choice:
        """The first form of the path."""
        return Choice(question.path[0], "at the ratio asked for, not timed")


@final
@dataclass(frozen=True, slots=True)
class LargestStep:
    """The rank just below the largest drop in time (arXiv 2309.03824, algorithm 1, "rank quantization").

    Every rank of the window is timed; ``Δt(r) = t(r + 1) − t(r)`` is the time saved by the step down to r, and the rank with
    the largest is taken if it is faster than the dense layer. (The paper prints the difference the other way round, which would
    pick the slow side of the cliff.) It takes noise for a step where there is none: see `Plateau`.
    """

    @property
    def timed(self) -> bool:
        """Yes."""
        return True

    def choose(self, question: Question) -> Choice:
        """``argmax Δt``, or dense."""
        path = question.path
        times = question.times([*path, Dense()])
        t = [times[form].median_s for form in path]
        if len(path) == 1:
            best, saved = 0, 0.0
        else:
            saved, best = max((t[i - 1] - t[i], i) for i in range(1, len(path)))
        return _or_dense(path[best], times, f"the largest step down of {len(path)} ranks, {saved * 1e3:.2g} ms")


_MARGIN, _DOUBT = 0.01, 5.0
"""A form is taken that is faster by such a share and by so many of its errors, which are a little more than half a standard
error of its median."""
_STEEP = 1.5
"""How many times its share of weights a step must save of the time to be a cliff."""


@final
@dataclass(frozen=True, slots=True)
class Plateau:
    """The foot of a step in time: a cliff is taken, a slope is not slid down.

    Time mostly falls with the weights, and where it only does that, the form at the ratio stays. A foot is a form that saves a
    far larger share of the time of the next larger one than of its weights. The best foot saves most time beyond the weights
    given up; taken is the largest that is about as good, refined to the edge of its step. Forms are timed coarse to fine: the
    window's ends and its aligned forms first, then, by bisection, the forms between the foot and the next larger one.

    Args:
        slack: Differences of this share of the time count for nothing.
        gate: A difference counts only beyond this many standard errors of the two medians.

    Raises:
        GoalError: A negative number, or none.
    """

    slack: float = 0.03
    gate: float = 3.0

    def __post_init__(self) -> None:
        if not (as_number(self.slack) >= 0 and as_number(self.gate) >= 0):
            raise GoalError(f"slack {self.slack!r} and gate {self.gate!r} must not be negative, and must be numbers")

    @property
    def timed(self) -> bool:
        """Yes."""
        return True

    def choose(self, question: Question) -> Choice:
        """The edge of the best plateau, or dense."""
        size = question.geometry
        coarse = sorted(
            {question.path[0], question.path[-1], *question.aligned}, key=lambda form: (-form.parameters(size), str(form))
        )
        times = question.times([*coarse, Dense()])
        good = self._good([form.parameters(size) for form in coarse], [times[form] for form in coarse])
        form, best = coarse[good], times[coarse[good]]
        if good:
            limit = best.median_s * (1 + self.slack) + self.gate * _error(best)
            form, times = self._refined(question, form, coarse[good - 1], limit, times)
        return _or_dense(form, times, f"the edge of the best step among {len(times) - 1} timed")

    def _good(self, weights: Sequence[int], times: Sequence[Timing]) -> int:
        """The place of the form to take, among forms from the largest to the smallest."""
        seconds = [timing.median_s for timing in times]

        def is_foot(number: int) -> bool:
            above = number - 1
            noise = self.gate * (_error(times[number]) + _error(times[above]))
            given_up = 1 - weights[number] / weights[above]
            return seconds[above] - seconds[number] > noise + seconds[above] * max(self.slack, _STEEP * given_up)

        def won(number: int) -> float:
            return weights[number] / weights[0] - seconds[number] / seconds[0]

        feet = [number for number in range(1, len(times)) if is_foot(number)]
        best = max(map(won, feet), default=-1.0)
        # The form at the ratio stands high on a step where there is a foot: it must be better by more than the slack to stay.
        return next((number for number in feet if won(number) >= best - self.slack), 0) if best >= -self.slack else 0

    def _refined(
        self, question: Question, good: Form, bad: Form, limit: float, times: dict[Form, Timing]
    ) -> tuple[Form, dict[Form, Timing]]:
        """Bisect the path's forms between a good form and a larger bad one for the largest that is still good."""
        size = question.geometry
        low, high = good.parameters(size), bad.parameters(size)
        between = [form for form in reversed(question.path) if low < form.parameters(size) < high]
        while between:
            middle = len(between) // 2
            form = between[middle]
            times = times | question.times([form])
            if times[form].median_s <= limit:
                good, between = form, between[middle + 1 :]
            else:
                between = between[:middle]
        return good, times


@final
@dataclass(frozen=True, slots=True)
class Energy:
    """The smallest ranks that hold a share of the weight: of its squared singular values, on each side for itself.

    With a calibration they are those of ``G½ W H½``: what is held is then a share of what the answers would lose with it all.

    The spectrum alone says the ranks, and the goal's ratio the least that is to be gained: a layer that is not made so much
    smaller stays dense, as does one that is not faster. At ``Ratio(1)`` whatever is smaller will do. Of a Tucker-2 each side
    leaves out ``1 - share`` at most, so together they hold ``2 share - 1`` at least.

    Args:
        share: From above 0 to 1.

    Raises:
        GoalError: No such share.
    """

    share: float = 0.9

    def __post_init__(self) -> None:
        _share("share", self.share, least=False)

    @property
    def timed(self) -> bool:
        """Yes: what its ranks gain."""
        return True

    def choose(self, question: Question) -> Choice:
        """The form with these ranks, or dense."""
        ranks = [_holding(spectrum.squares, self.share) for spectrum in question.spectra()]
        return _by_spectrum(question, ranks, f"the least ranks that hold {self.share:g} of the weight")


@final
@dataclass(frozen=True, slots=True)
class Evbmf:
    """The ranks that stand out of noise, on each side for itself, by empirical variational Bayes (Nakajima et al., 2013).

    Used for layers by Kim et al., arXiv 1511.06530. The noise is estimated from the same weight, so what a layer keeps can be
    nothing at all: hence the floor. With a calibration it looks at ``G½ W H½``, as `Energy` does. It is often bold: measure the
    accuracy. The goal's ratio is the least that is to be gained, as with `Energy`.

    Args:
        floor: The share of a side's full rank below which no rank goes, from 0 to 1; one channel stays in any case.

    Raises:
        GoalError: No such share.
    """

    floor: float = 0.1

    def __post_init__(self) -> None:
        _share("floor", self.floor, least=True)

    @property
    def timed(self) -> bool:
        """Yes: what its ranks gain."""
        return True

    def choose(self, question: Question) -> Choice:
        """The form with these ranks, or dense."""
        ranks = [
            max(evbmf_rank(each.squares, each.rows, each.columns), math.ceil(self.floor * len(each.squares)), 1)
            for each in question.spectra()
        ]
        return _by_spectrum(question, ranks, "the ranks that stand out of the noise")


def _share(name: str, value: object, least: bool) -> None:
    if isinstance(value, bool) or not (isinstance(value, Real) and 0 <= float(value) <= 1 and (least or float(value) > 0)):
        raise GoalError(f"{name} is {value!r}; it is a number from {'0' if least else 'above 0'} to 1")


def _holding(squares: Sequence[float], share: float) -> int:
    """The smallest rank whose squared singular values sum up to a share of all; 1 at least."""
    held = list(accumulate(squares))
    # Rounding must not ask for one more where the share is met exactly.
    return next((rank for rank, sum_ in enumerate(held, 1) if sum_ >= share * held[-1] * (1 - 1e-12)), 1)


def _by_spectrum(question: Question, ranks: Sequence[int], what: str) -> Choice:
    layer = question.geometry
    form = form_of(layer, ranks)
    before, after = (each - layer.bias_parameters for each in (layer.parameters, form.parameters(layer)))
    if after >= before:
        return Choice(Dense(), f"{what} make it no smaller")
    if after * question.ratio > before:
        return Choice(Dense(), f"{what}, {form}, make it {before / after:.3g} times smaller, not {question.ratio:g}")
    return _or_dense(form, question.times([form, Dense()]), what)


def _error(timing: Timing) -> float:
    return timing.mad_s / math.sqrt(timing.repeats)


def _or_dense(form: Form, times: dict[Form, Timing], reason: str) -> Choice:
    """A form that is faster by a margin and beyond the noise, or dense: a form costs accuracy, so doubt speaks for the latter.

    The form was chosen by these times, so it is often a lucky one.
    """
    dense, chosen = times[Dense()].median_s, times[form].median_s
    # A form's time is its ratio to the dense run of the same round, and its spread that ratio's: what slows both is no doubt.
    noise = _DOUBT * _error(times[form])
    if chosen * (1 + _MARGIN) + noise < dense:
        return Choice(form, f"×{dense / chosen:.2f}: {reason}")
    doubt = " beyond doubt" if chosen < dense else ""
    share = f"{chosen / dense:.2f} of the dense time"
    return Choice(Dense(), f"no rank is faster{doubt}: the best candidate, {form}, takes {share}", form)
