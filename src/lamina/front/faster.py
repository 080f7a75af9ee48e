"""Faster: for people in a hurry, from a network to a faster one, with what it gained and what it lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..answers import change as answers_change
from ..answers import in_words
from ..calibration.calibrate import calibrate
from ..calibration.calibration import Calibration
from ..calibration.outputs import Gaussian, Outputs
from ..choose.make_plan import fastest_within
from ..choose.planner import Planner
from ..choose.scoring import Jury, checked_score, unscored
from ..comparison import Comparison, compare
from ..decomposition import attach_plan
from ..errors import GoalError, LaminaError
from ..goals import Budget, Drop, Goal, goal_of
from ..measure.table import TimingTable
from ..network.memory import devices_of
from ..network.running import outside_inference_mode
from ..plan import Plan, Scores, listed
from ..runtimes.runtime import Runtime
from ..shown import Shown
from ..train.recalibrate import recalibrate
from ..values import Mode
from .batches import batches_of


@final
@dataclass(frozen=True, slots=True, repr=False)
class FasterResult(Shown):
    """What `faster` made, and what is known of it.

    Attributes:
        model: The faster network, which carries its plan; ``lamina.save`` takes it.
        plan: Its plan.
        comparison: The network and the faster one, timed in turn.
        scores: The score before and after, and of all that was tried; None without a score.
        change: ‖after − before‖ / ‖before‖ of the outputs on the data, or on the example where there are none; None where that
            cannot be told.
        recalibrated: Whether batch norms were recalibrated on the data.
        asked: The goal.
        said: What is to be said first, such as a goal that is not met.
        on: What the change of the outputs is of.
    """

    model: nn.Module
    plan: Plan
    comparison: Comparison
    scores: Scores | None
    change: float | None
    recalibrated: bool
    asked: Goal
    said: tuple[str, ...]
    on: str

    def __str__(self) -> str:
        """Five lines: what was asked, what was measured, what it cost, what that was predicted to be, what to do next."""
        plan, layers = self.plan, f"{len(self.plan.decomposed)} of {len(self.plan.layers)} layers decomposed"
        if self.scores:
            lost = f"score: {self.scores}"
        elif self.change is None:
            lost = "outputs: by how much they change cannot be told; there is no score"
        else:
            lost = f"{in_words(self.change, self.on)}; there is no score"
        if plan.nats is not None:
            predicted = f"{plan.nats:.3g} nats of divergence from the network's own answers, for each item"
        elif plan.factors.weights_alone:
            predicted = "none, since factors of the weights alone scored better"
        elif plan.factors.calibration:
            unpriced = [name or "the network" for name, layer in plan.decomposed.items() if layer.nats is None]
            predicted = f"not known, as the calibration has no gradients of {listed(unpriced)}"
        else:
            predicted = "none without data"
        return "\n".join(
            [
                f"asked: {'; '.join([str(self.asked), *self.said])}; {layers}",
                f"measured: {self.comparison.timed}",
                lost,
                f"predicted loss: {predicted}{'; batch norm recalibrated' if self.recalibrated and not self.scores else ''}",
                f"next: {self._next()}",
            ]
        )

    def _next(self) -> str:
        if not self.plan.decomposed:
            return "allow more to be lost, or decompose all the same and fine-tune: lamina.finetune"
        if self.scores is None:
            return "measure how accurate result.model is; then lamina.save(result.model, folder)"
        return "lamina.save(result.model, folder); lamina.refine, or lamina.finetune with labels, wins back what was lost"


@outside_inference_mode
def faster(
    model: nn.Module,
    example: Any,
    goal: Goal | Sequence[Budget],
    *,
    data: Any = None,
    score: Callable[[nn.Module], Any] | None = None,
    at_most: float | None = None,
    outputs: Outputs | Callable[[Any], Tensor] | None = Gaussian(),  # noqa: B008 - a frozen value
    mode: Mode | None = None,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    worth: float = 0.005,
    seconds: float = 2.0,
    timings: TimingTable | str | os.PathLike[str] | None = None,
    progress: bool = False,
    runtime: Runtime | None = None,
) -> FasterResult:
    """Make a network faster in one call: plan, decompose, recalibrate, compare, score, and print five lines of what came out.

    Args:
        model: A trained network; it is only read.
        example: What it is fed; see `make_plan`.
        goal: As `make_plan` takes it, `Drop` too.
        data: Unlabelled data, calibrated on with `Gaussian` and, where there is batch norm, recalibrated on, if that betters
            the score, or, without one, brings the outputs nearer; an iterator is read into a list. Or what `calibrate`
            returned: then nothing is recalibrated.
        score: From a network to a number, higher is better; see `make_plan`. The network that is returned is scored as it is.
        at_most: How much of the score may be lost. What loses more is not returned: instead the fastest network within it is
            looked for, as for `Drop`, from the goal's down to the network itself, and the first line says so.
        outputs: How the output is read, where data are calibrated on; see `calibrate`.
        mode: See `make_plan`.
        include: Patterns; only layers matching one of them are decomposed. Empty: all.
        skip: Patterns; layers matching one stay dense.
        worth: See `make_plan`.
        seconds: The most to spend on comparing both networks; see `compare`.
        timings: See `make_plan`.
        progress: Show a progress bar.
        runtime: What will run it where it is served; see `make_plan`.

    Returns:
        The network and its evidence; it prints as the same five lines.

    Raises:
        GoalError: The goal makes no sense, or ``at_most`` or `Drop` comes without a score. Or a score is no finite number.
        LaminaError: As `calibrate`, `make_plan`, `decompose` and `compare`. What the score raises passes through.
    """
    goal, score = goal_of(goal), checked_score(score)
    most = None if at_most is None else Drop(at_most)
    if (most or isinstance(goal, Drop)) and score is None:
        raise GoalError(unscored(most or goal))
    if most and isinstance(goal, Drop):
        raise GoalError("a lamina.Drop says already how much may be lost: leave at_most out")
    data = list(data) if isinstance(data, Iterator) else data
    images = None if isinstance(data, Calibration) else data
    calibration = data if images is None else calibrate(model, data, outputs=outputs, progress=progress)
    options: dict[str, Any] = {"mode": mode, "include": include, "skip": skip, "worth": worth}
    options |= {"data": calibration, "timings": timings, "progress": progress, "runtime": runtime}
    said: list[str] = []
    with Planner.of(model, example, **options) as planner:
        twin, device = planner.survey.twin(), devices_of(planner.survey.model)[0]

        def change(small: nn.Module) -> float | None:
            return answers_change(twin, small, planner.survey.examples if images is None else batches_of(images, device))

        def recalibrated(small: nn.Module) -> Callable[[], None] | None:
            return None if images is None else _recalibrated(small, images, said)

        # Without a score the outputs' change tells whether it is better to recalibrate.
        asked = score or (lambda small: -(change(small) or 0.0))
        jury = Jury.of(planner.survey, planner.calibration, asked, recalibrated, compete=score is not None)
        if isinstance(goal, Drop):
            candidate = fastest_within(goal, planner, jury)
        else:
            planned = planner.plan(goal)
            said += planned.beside
            if most is None:
                candidate = jury.best(planned.told)
            else:
                candidate = fastest_within(most, planner, jury, planned.plan)
                tried = candidate.plan.scores.tried if candidate.plan.scores else ()
                if _forms(candidate.plan) == _forms(planned.plan):
                    candidate = jury.said(candidate, tried, goal=goal, notes=planned.told.notes)
                else:
                    instead = "this is the fastest within it instead" if candidate.plan.decomposed else "nothing is decomposed"
                    said = [f"that loses more than {most.value:g} of the score, so {instead}"]
        plan = candidate.plan if score else candidate.plan.model_copy(update={"scores": None})
        small = attach_plan(candidate.model, plan)
        result = FasterResult(
            model=small,
            plan=plan,
            comparison=compare(planner.survey.model, small, example, mode=mode, seconds=seconds, runtime=runtime),
            scores=plan.scores,
            change=change(small),
            recalibrated=candidate.finished,
            asked=goal,
            said=tuple(dict.fromkeys(said)),
            on="the example" if images is None else "the data",
        )
    print(result)
    return result


def _forms(plan: Plan) -> dict[str, Any]:
    return {name: layer.form for name, layer in plan.decomposed.items()}


def _recalibrated(small: nn.Module, images: Any, said: list[str]) -> Callable[[], None] | None:
    """Recalibrate a network's batch norms; what puts the old statistics back, None where there was nothing to do."""
    norms = [module for module in small.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    if not norms:
        return None
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        recalibrate(small, batches_of(images, devices_of(small)[0]))
    except LaminaError as error:
        said.append(f"batch norm is as it was: {error}")
        return None

    def undo() -> None:
        for buffer, content in kept:
            buffer.copy_(content)

    return undo
