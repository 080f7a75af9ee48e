"""Numbers of a training for trackers such as TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

from ..errors import MissingExtra, TrainingError
from ..network.running import said
from .distributed import together


@final
@dataclass(frozen=True, slots=True)
class Tracking:
    """Where a training's numbers go, through Accelerate's trackers: loss, learning rate, throughput, resting factors, score.

    Args:
        folder: Where trackers that write files put them; ``tensorboard --logdir`` shows it.
        run: The name of this training.
        log_with: Names that Accelerate knows, or trackers of its kind.
        every: Steps between two entries of the loss.

    Raises:
        TrainingError: ``every`` is no positive number.
    """

    folder: str | os.PathLike[str] = "runs"
    run: str = "finetune"
    log_with: tuple[Any, ...] = ("tensorboard",)
    every: int = 10

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise TrainingError(f"every is {self.every!r}; it must be a whole number of 1 or more")


@contextmanager
def tracked(accelerator: Any, tracking: Tracking | None, settings: dict[str, Any]) -> Iterator[Any]:
    """A function ``log(numbers, step)``; the trackers are closed at the end, also after an error.

    Raises:
        MissingExtra: None of the trackers is installed.
        TrainingError: A tracker fails, in process 0 alone perhaps; the function raises it as well.
    """
    if tracking is None:
        yield lambda numbers, step: None
        return
    if not accelerator.log_with:
        raise MissingExtra(" or ".join(map(str, tracking.log_with)), "train", "tracking a training")
    with _alike():
        accelerator.init_trackers(tracking.run, {key: value for key, value in settings.items() if value is not None})

    def log(numbers: dict[str, Any], step: int) -> None:
        with _alike():
            accelerator.log(numbers, step=step)

    try:
        yield log
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


@contextmanager
def _alike() -> Iterator[None]:
    with together():
        try:
            yield
        except Exception as error:  # the trackers are other people's
            raise TrainingError(f"tracking fails: {said(error)}") from error
