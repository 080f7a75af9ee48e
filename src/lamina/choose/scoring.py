"""Scoring: what a user's function says of a network, and which of the networks that a plan may lead to scores best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, final

import torch
from torch import Tensor, nn

from ..calibration.calibration import Calibration
from ..decomposition import attach_plan, decompose
from ..errors import GoalError
from ..network.preserve import preserved
from ..network.running import set_mode
from ..plan import FactorMethod, Plan, ScoredPoint, Scores
from .survey import Survey

Score = Callable[[nn.Module], Any]
"""From a network to a number, higher is better. What it raises passes through."""

Finish = Callable[[nn.Module], Callable[[], None] | None]
"""Betters a decomposed network where it is; what undoes it, None where nothing was done."""


def checked_score(score: Any) -> Score | None:
    """A ``score`` argument.

    Raises:
        GoalError: It is no function.
    """
    if score is not None and (not callable(score) or isinstance(score, nn.Module)):
        raise GoalError(f"score is a {type(score).__name__}; give a function from a network to a number, higher is better")
    return score


def unscored(goal: object) -> str:
    """What is said of a drop without a score."""
    return f"a {goal} is one of a score: give score=, a function from a network to a number, higher is better"


def score_of(model: nn.Module, score: Score) -> float:
    """The score of a network, asked in eval mode without gradients; modes, buffers and random states are put back.

    Raises:
        GoalError: It is no number. What the function itself raises passes through.
    """
    with preserved(model), torch.no_grad():
        set_mode(model, False)
        found = score(model)
    if isinstance(found, Tensor) and found.numel() == 1 and not found.is_complex():
        found = found.item()
    if isinstance(found, bool) or not isinstance(found, Real):
        what = f"{type(found).__name__} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise GoalError(f"the score is a {what}; it must be a number, higher is better")
    return float(found)


@final
@dataclass(frozen=True, slots=True)
class Candidate:
    """A network that a plan may lead to, and its score."""

    plan: Plan
    model: nn.Module
    score: float
    finished: bool = False
    """Whether what finishes it has bettered it."""

    @property
    def merit(self) -> float:
        """The score; −∞ where it is no finite number."""
        return self.score if math.isfinite(self.score) else -math.inf

    @property
    def point(self) -> ScoredPoint:
        """What is remembered of it."""
        return ScoredPoint(
            speedup=speedup_of(self.plan),
            score=self.score if math.isfinite(self.score) else None,
            nats=self.plan.nats,
            weights_alone=self.plan.factors.weights_alone,
        )


@final
@dataclass(frozen=True, slots=True)
class Jury:
    """Makes the networks that a plan may lead to, and scores them. Made by `of`.

    Attributes:
        model: The network.
        calibration: What factors are fitted to.
        score: The user's.
        before: The score of the network itself.
        finish: What is done with each network that was decomposed; undone where the score falls.
        compete: Whether factors of the weights alone are tried too.
    """

    model: nn.Module
    calibration: Calibration | None
    score: Score
    before: float
    finish: Finish | None
    compete: bool

    @classmethod
    def of(
        cls,
        survey: Survey,
        calibration: Calibration | None,
        score: Score,
        finish: Finish | None = None,
        compete: bool = True,
    ) -> Jury:
        """Score the network itself: a shadow of it, so that no score can change it.

        Raises:
            GoalError: Its score is no finite number.
        """
        before = score_of(survey.twin(), score)
        if not math.isfinite(before):
            raise GoalError(
                f"the score of the network itself is {before}: no drop can be told from it; "
                "call the function on it in eval mode, and see where that comes from"
            )
        return cls(survey.model, calibration, score, before, finish, compete)

    def candidates(self, plan: Plan) -> Iterator[Candidate]:
        """The networks of a plan: with factors fitted to the calibration, then with those of the weights alone."""
        yield self._candidate(plan)
        if self.compete and plan.factors.calibration and plan.decomposed:
            yield self._candidate(_by_weights(plan))

    def best(self, plan: Plan) -> Candidate:
        """The candidate that scores best, with all of them in its plan.

        Raises:
            GoalError: No score of them is a finite number.
        """
        tried, best = [], None
        for candidate in self.candidates(plan):  # no more than two networks are held at a time
            tried.append(candidate.point)
            if best is None or candidate.merit > best.merit:
                best = candidate
        assert best is not None
        return self.said(best, tuple(tried))

    def said(self, candidate: Candidate, tried: tuple[ScoredPoint, ...], **changed: Any) -> Candidate:
        """A candidate whose plan says how it scored, and how others did.

        Raises:
            GoalError: Its score is no finite number.
        """
        if not math.isfinite(candidate.score):
            raise GoalError(
                f"the score of the decomposed network is {candidate.score}, and {self.before:.6g} before: ask for less, "
                "or decompose by a plan without a score, and call the function on what comes of it"
            )
        scores = Scores(before=self.before, after=candidate.score, tried=tried, recalibrated=candidate.finished)
        plan = candidate.plan.model_copy(update={"scores": scores, **changed})
        return Candidate(plan, attach_plan(candidate.model, plan), candidate.score, candidate.finished)

    def _candidate(self, plan: Plan) -> Candidate:
        small = decompose(self.model, plan, self.calibration)
        score = score_of(small, self.score)
        undo = self.finish(small) if self.finish and plan.decomposed else None
        if undo is not None:
            again = score_of(small, self.score)
            if again > score or not math.isfinite(score):
                return Candidate(plan, small, again, finished=True)
            undo()
        return Candidate(plan, small, score)


def speedup_of(plan: Plan) -> float | None:
    """How much faster the network of a plan was measured to be; 1 where nothing is decomposed."""
    if not plan.decomposed:
        return 1.0
    return plan.whole.speedup if plan.whole else None


def _by_weights(plan: Plan) -> Plan:
    """The same forms with factors of the weights alone, whose loss was not predicted."""
    unpriced = {"loss": None, "loss_of": "weight", "nats": None}
    layers = {name: layer.model_copy(update=unpriced) for name, layer in plan.layers.items()}
    return plan.model_copy(update={"layers": layers, "factors": FactorMethod(weights_alone=True)})
