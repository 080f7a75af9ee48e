"""Freezing inside other people's training loops: a callback for Lightning, one for the Transformers ``Trainer``.

They freeze when training begins, and at every batch take the place of the trainer's own counters, whatever it has told them or
forgotten to: phases are right wherever it resumes. Each imports its framework only when it is made.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import FreezingError, MissingExtra
from ..schedules import Schedule
from .freezing import Freezing, freeze, wake


def lightning_callback(schedule: Schedule) -> Any:
    """A Lightning ``Callback`` that trains the decomposed layers of a ``LightningModule`` under a freezing schedule.

    ::

        trainer = lightning.Trainer(max_epochs=10, callbacks=[lightning_callback(lamina.SequentialFreezing())])

    ``configure_optimizers`` must hand over all parameters, as ``self.parameters()`` gives them. The phase follows from the
    trainer's epoch and ``global_step``, which with several optimizers in manual optimization counts the steps of all. Patterns
    in ``exclude`` are matched against names in the ``LightningModule``.

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
        """Puts a freezing where the trainer stands."""

        def __init__(self) -> None:
            self.freezing: Freezing | None = None
            self._saved: Mapping[str, Any] | None = None

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if stage == "fit":
                wake(pl_module)  # before it makes its optimizers

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

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            assert self.freezing is not None
            if self.freezing.go_to(trainer.current_epoch, trainer.global_step):
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
                # The old reducer would go on counting gradients that no longer come, as long as something holds it.
                trainer.strategy.model._remove_autograd_hooks()
                trainer.strategy.model = trainer.strategy.model.module
                trainer.strategy.configure_ddp()

    return LaminaFreezing()


def transformers_callback(schedule: Schedule) -> Any:
    """A Transformers ``TrainerCallback`` that trains the decomposed layers of a model under a freezing schedule.

    ::

        Trainer(model=small, args=arguments, callbacks=[transformers_callback(lamina.SequentialFreezing())], …).train()

    The phase follows from the trainer's own epoch and step. Where the data have no length, an epoch is a pass over them, and a
    training that is resumed in the middle of a pass goes on with that pass, as the trainer does.

    Supported is one process, with one device or several under ``DataParallel``, and DDP with
    ``TrainingArguments(ddp_find_unused_parameters=True)``: the trainer wraps the model once, and such a wrapper does not wait
    for what rests. After an exception in ``train`` some factors rest still, since the trainer does not tell: the next one with
    this callback wakes them, and so do `freeze`, `finetune` and ``callback.freezing.release()``.

    Args:
        schedule: `SequentialFreezing()` or `VanillaFreezing()`.

    Raises:
        MissingExtra: Transformers is not installed.
        FreezingError: When training begins: see `freeze` and `Freezing.check`; or there are several processes otherwise.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtra("transformers", "zoo", "the Transformers callback") from error

    class LaminaFreezing(transformers.TrainerCallback, transformers.trainer_callback.ExportableState):  # type: ignore[misc]
        """Puts a freezing where the trainer stands."""

        def __init__(self) -> None:
            self.freezing: Freezing | None = None
            self.epoch = 0
            """Of data without a length, which the trainer does not count in epochs: the pass over them."""

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"epoch": self.epoch}}

        def on_init_end(self, args: Any, state: Any, control: Any, **around: Any) -> None:
            if around.get("model") is not None:
                wake(around["model"])  # before it makes its optimizer

        def on_train_begin(self, args: Any, state: Any, control: Any, **around: Any) -> None:
            sharded = getattr(args, "fsdp", None) or getattr(args, "deepspeed", None)
            if args.world_size > 1 and (sharded or args.ddp_find_unused_parameters is not True):
                raise FreezingError(
                    f"the Transformers trainer runs in {args.world_size} processes and wraps the model once, whatever rests: "
                    "set ddp_find_unused_parameters=True, without FSDP or DeepSpeed, or use lamina.finetune"
                )
            saved = state.stateful_callbacks.setdefault(type(self).__name__, {})
            # The trainer counts in whole epochs, but for data of unknown length, where it claims as many as a number can say.
            epochs = state.num_train_epochs if 0 < state.num_train_epochs < sys.maxsize else None
            if epochs is not None:
                begins = int((state.epoch or 0.0) + 1e-6)
            else:
                begins = saved.get("attributes", {}).get("epoch", 0) if state.global_step else 0
            self.epoch = begins - 1
            self.freezing = freeze(around["model"], schedule, epochs=epochs)
            try:
                self.freezing.check(around["optimizer"])
            except FreezingError:
                self.freezing.release()
                raise

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **around: Any) -> None:
            self.epoch += 1

        def on_step_begin(self, args: Any, state: Any, control: Any, **around: Any) -> None:
            assert self.freezing is not None
            last = self.epoch if self.freezing.epochs is None else self.freezing.epochs - 1
            self.freezing.go_to(min(self.epoch, last), state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **around: Any) -> None:
            assert self.freezing is not None
            self.freezing.release()

    return LaminaFreezing()
