"""Freezing inside other people's training loops: a callback for Lightning, one for the Transformers ``Trainer``.

They do what a loop of one's own does with `lamina.freeze`: freeze when training begins, tell of every epoch and every optimizer
step, release when it ends. Each imports its framework only when it is made.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import FreezingError, MissingExtra
from ..schedules import Schedule
from .freezing import Freezing, freeze


def lightning_callback(schedule: Schedule) -> Any:
    """A Lightning ``Callback`` that trains the decomposed layers of a ``LightningModule`` under a freezing schedule.

    ::

        trainer = lightning.Trainer(max_epochs=10, callbacks=[lightning_callback(lamina.SequentialFreezing())])

    ``configure_optimizers`` must hand over all parameters, as ``self.parameters()`` gives them. The phase is part of
    Lightning's checkpoints. Patterns in ``exclude`` are matched against names in the ``LightningModule``.

    Supported are training on one device; DDP, whose wrapper is made anew whenever what rests has changed; and
    ``ModelParallelStrategy`` with ``fully_shard``. Other strategies (FSDP 1, DeepSpeed) settle what trains when they begin, and
    are refused.

    Args:
        schedule: `SequentialFreezing()` or `VanillaFreezing()`.

    Raises:
        MissingExtra: Lightning is not installed.
        FreezingError: When training begins: see `freeze` and `Freezing.check`; or the strategy is not supported.
    """
    try:
        lightning = importlib.import_module("lightning.pytorch")
    except ImportError as error:
        raise MissingExtra("lightning", "lightning", "the Lightning callback") from error
    strategies = lightning.strategies

    class LaminaFreezing(lightning.Callback):  # type: ignore[name-defined, misc]
        """Tells a freezing of epochs and optimizer steps."""

        def __init__(self) -> None:
            self.freezing: Freezing | None = None
            self._saved: Mapping[str, Any] | None = None
            self._seen = 0

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            known = (strategies.SingleDeviceStrategy, strategies.DDPStrategy, strategies.ModelParallelStrategy)
            if not isinstance(trainer.strategy, known):
                raise FreezingError(
                    f"{type(trainer.strategy).__name__} does not let the set of trained parameters change; "
                    "train on one device, with DDP or with ModelParallelStrategy"
                )
            epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
            # Optimizers and wrappers have been made, over all parameters.
            self.freezing = freeze(pl_module, schedule, epochs=epochs)
            self.freezing.check(*trainer.optimizers)
            if self._saved is not None:
                self.freezing.load_state_dict(self._saved)
                self._saved = None
            self._rewrap(trainer)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self._seen = trainer.global_step

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            assert self.freezing is not None
            if self.freezing.start_epoch(trainer.current_epoch):
                self._rewrap(trainer)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            assert self.freezing is not None
            changed = [self.freezing.step() for _ in range(self._seen, trainer.global_step)]
            self._seen = trainer.global_step
            if any(changed):
                self._rewrap(trainer)

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self._release()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self._release()

        def state_dict(self) -> dict[str, Any]:
            return self.freezing.state_dict() if self.freezing else {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._saved = state_dict or None

        def _release(self) -> None:
            if self.freezing is not None:
                self.freezing.release()

        def _rewrap(self, trainer: Any) -> None:
            if isinstance(trainer.strategy, strategies.DDPStrategy):
                trainer.strategy.model = trainer.strategy.model.module
                trainer.strategy.configure_ddp()

    return LaminaFreezing()


def transformers_callback(schedule: Schedule) -> Any:
    """A Transformers ``TrainerCallback`` that trains the decomposed layers of a model under a freezing schedule.

    ::

        Trainer(model=small, args=arguments, callbacks=[transformers_callback(lamina.SequentialFreezing())], …).train()

    The phase follows from the trainer's own epoch and step, so that resuming from a checkpoint keeps it.

    Supported is one process, with one device or several under ``DataParallel``. In several processes the trainer wraps the
    model once and gives a callback no way to wrap it anew: this is refused; use `lamina.finetune` there.

    Args:
        schedule: `SequentialFreezing()` or `VanillaFreezing()`.

    Raises:
        MissingExtra: Transformers is not installed.
        FreezingError: When training begins: see `freeze` and `Freezing.check`; or there are several processes.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtra("transformers", "zoo", "the Transformers callback") from error

    class LaminaFreezing(transformers.TrainerCallback):  # type: ignore[misc]
        """Tells a freezing of epochs and optimizer steps."""

        def __init__(self) -> None:
            self.freezing: Freezing | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **around: Any) -> None:
            if args.world_size > 1:
                raise FreezingError(
                    f"the Transformers trainer runs in {args.world_size} processes and cannot wrap the model anew when another "
                    "group of factors rests: use lamina.finetune, or one process"
                )
            # The trainer counts in whole epochs, but for data of unknown length, where it claims as many as a number can say.
            epochs = state.num_train_epochs if 0 < state.num_train_epochs < sys.maxsize else None
            self.freezing = freeze(around["model"], schedule, epochs=epochs)
            self.freezing.check(around["optimizer"])
            self.freezing.load_state_dict(
                self.freezing.state_dict() | {"epoch": _whole_epochs(state, epochs), "steps": state.global_step}
            )

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **around: Any) -> None:
            assert self.freezing is not None
            self.freezing.start_epoch(_whole_epochs(state, self.freezing.epochs))

        def on_step_end(self, args: Any, state: Any, control: Any, **around: Any) -> None:
            assert self.freezing is not None
            while self.freezing.steps < state.global_step:
                self.freezing.step()

        def on_train_end(self, args: Any, state: Any, control: Any, **around: Any) -> None:
            assert self.freezing is not None
            self.freezing.release()

    return LaminaFreezing()


def _whole_epochs(state: Any, epochs: int | None) -> int:
    """Epochs that a Transformers trainer has behind it, which it counts in fractions of steps."""
    done = int((state.epoch or 0.0) + 1e-6)
    return done if epochs is None else min(done, epochs - 1)
