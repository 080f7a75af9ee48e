"""How a training went: values to print, and to keep in a checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from ..figures import lines_figure
from ..shown import Shown


@final
@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch of a training.

    Attributes:
        number: From 0.
        loss: Mean over the samples, in train mode, while the network learnt.
        samples_per_s: Samples of all processes together a second of training; scoring and checkpoints do not count.
        resting: Names of the weights that rested when it began.
        score: What ``score`` said at its end.
        rate: Learning rate of the first parameter group at its end.
    """

    number: int
    loss: float
    samples_per_s: float
    resting: tuple[str, ...] = ()
    score: float | None = None
    rate: float = 0.0

    @property
    def merit(self) -> float:
        """What makes one epoch better than another: the score, and without one a low loss."""
        return -self.loss if self.score is None else self.score


@final
@dataclass(frozen=True, slots=True, repr=False)
class TrainingRecord(Shown):
    """How a training went.

    Attributes:
        epochs: One record each, also of epochs that an earlier run made before it was stopped.
        steps: Steps of the optimizer.
        stopped: ``"finished"``, or ``"patience"`` where it no longer got better.
        checkpoints: The folder with ``last`` and ``best`` in it; None where none was asked for.
        resumed_at: The step from which this run went on; None where it began anew.
    """

    epochs: tuple[EpochRecord, ...]
    steps: int
    stopped: Literal["finished", "patience"]
    checkpoints: Path | None = None
    resumed_at: int | None = None

    @property
    def best(self) -> EpochRecord:
        """The epoch of the highest score, without scores of the lowest loss; the first of equals."""
        return max(self.epochs, key=lambda epoch: epoch.merit)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Loss, and score where there is one, against epochs, as a Matplotlib figure.

        Args:
            path: Where it is written too, if anywhere.

        Raises:
            MissingExtra: Matplotlib is not installed.
        """
        lines = {"loss": [(epoch.number + 1.0, epoch.loss) for epoch in self.epochs]}
        if scores := [(epoch.number + 1.0, epoch.score) for epoch in self.epochs if epoch.score is not None]:
            lines["score"] = scores
        return lines_figure(lines, across="epoch", up=" and ".join(lines), path=path)

    def headline(self) -> str:
        """How long it went and where it was best, which it prints last."""
        return str(self).rpartition("\n")[2]

    def __str__(self) -> str:
        """From where it went on, and a line an epoch."""
        at = self.resumed_at
        begun = (
            []
            if at is None
            else ["already finished: nothing was left to do" if at == self.steps else f"went on from step {at}"]
        )
        lines = [
            f"epoch {epoch.number + 1}: loss {epoch.loss:.4f}, "
            + (f"score {epoch.score:.4f}, " if epoch.score is not None else "")
            + f"{epoch.samples_per_s:,.0f} samples/s, {len(epoch.resting)} weights at rest"
            for epoch in self.epochs
        ]
        return "\n".join([*begun, *lines, f"{self.steps} steps, {self.stopped}; best was epoch {self.best.number + 1}"])
