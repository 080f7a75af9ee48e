"""One training on its way: epochs, steps, and the places in between where it is kept.

A *batch* is what the loader yields, a *step* one of the optimizer's: ``accumulate`` batches, or the rest of an epoch at its
end. Whatever changes the phase of the network, or is written to disk, happens between two steps.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..errors import LaminaError, TrainingError
from ..network.running import first_line, set_mode
from ..progress import Display
from ..schedules import phase_name
from ..values import input_of
from .checkpoint import Checkpoints, Content, newest, read, settle, write
from .data import Batches, Share, tensors_in
from .distill import Teacher
from .distributed import from_each, from_first, mean, rank, share_buffers, unsynchronised, wait_for_all, whole, wrapped
from .freezing import Freezing
from .random_states import random_states, random_states_kept, set_random_states
from .records import EpochRecord, TrainingRecord
from .state import expect_same, planned, set_optimizer, set_weights, weights_of


@final
@dataclass(slots=True)
class Place:
    """Where a training stands: the numbers among what a checkpoint holds."""

    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that are done."""
    step: int = 0
    loss: float = 0.0
    """Sum over this epoch's samples."""
    samples: int = 0
    seconds: float = 0.0
    resting: tuple[str, ...] = ()
    best_step: int | None = None
    history: list[EpochRecord] = field(default_factory=list)

    def as_state(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Place:
        """From what `as_state` returned."""
        return cls(**state | {"history": [EpochRecord(**record) for record in state["history"]]})


@final
@dataclass(slots=True)
class Run:
    """One training: what it works with, and the way through its epochs."""

    model: nn.Module
    data: Batches
    loss: Callable[[Any, Any], Tensor]
    epochs: int
    rests: Freezing | None
    pupil: Teacher | None
    score: Callable[[nn.Module], float] | None
    patience: int | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    device: torch.device
    autocast: Callable[[], Any]
    accumulate: int
    clip: float | None
    checkpoints: Checkpoints | None
    log: Callable[[dict[str, Any], int], None]
    log_every: int
    eval_mode: bool
    find_unused_parameters: bool
    shown: Display
    settings: dict[str, Any]
    place: Place = field(default_factory=Place)
    net: nn.Module | None = None
    """The network as a step calls it, in the current phase."""

    def all(self) -> TrainingRecord:
        """Every epoch that is still to come."""
        self.model.zero_grad(set_to_none=True)
        coming = self._resume()
        resumed_at = None if self.place.step == 0 else self.place.step
        while self.place.epoch < self.epochs and not self._out_of_patience():
            self._train(self._start_epoch() if coming is None else coming)
            self._end_epoch()
            coming = None
        share_buffers(self.model)
        stopped: Literal["finished", "patience"] = "finished" if self.place.epoch == self.epochs else "patience"
        folder = None if self.checkpoints is None else Path(self.checkpoints.folder)
        return TrainingRecord(tuple(self.place.history), self.place.step, stopped, folder, resumed_at)

    def _start_epoch(self) -> Iterator[Share]:
        """The order and the phase of the next epoch."""
        place = self.place
        place.batch, place.loss, place.samples, place.seconds = 0, 0.0, 0, 0.0
        self.data.start(place.epoch)
        if self.rests is not None:
            if self.rests.start_epoch(place.epoch):
                self._wrap()
            place.resting = self.rests.resting
        return self.data.rest(0)

    def _train(self, coming: Iterator[Share]) -> None:
        """All batches of this epoch that are still to come."""
        place, total = self.place, len(self.data)
        if self.net is None:
            self._wrap()
        self.model.train(not self.eval_mode)
        self._say()
        every = None if self.checkpoints is None else self.checkpoints.every
        began = time.perf_counter()
        while place.batch < total:
            size = min(self.accumulate, total - place.batch)
            losses = [self._backward(self._next(coming, place.batch + i), size, i == size - 1) for i in range(size)]
            self._step()
            place.batch += size
            self._show(sum(losses) / size, place.seconds + time.perf_counter() - began)
            if every and place.step % every == 0 and place.batch < total:
                place.seconds += time.perf_counter() - began
                self._save()
                began = time.perf_counter()
        place.seconds += time.perf_counter() - began

    def _end_epoch(self) -> None:
        """The record of this epoch, and its checkpoint."""
        place = self.place
        record = EpochRecord(
            number=place.epoch,
            loss=place.loss / place.samples,
            samples_per_s=place.samples / max(place.seconds, 1e-9),
            resting=place.resting,
            score=None if self.score is None else self._scored(self.score),
            rate=float(self.optimizer.param_groups[0]["lr"]),
        )
        if all(record.merit > earlier.merit for earlier in place.history):
            place.best_step = place.step
        place.history.append(record)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            follows = record.score if self.scheduler.mode == "max" else record.loss
            assert follows is not None  # a schedule that follows a score is refused where there is none
            self.scheduler.step(follows)
        place.epoch += 1
        place.batch = 0
        numbers = {"epoch_loss": record.loss, "samples_per_s": record.samples_per_s, "weights_at_rest": len(record.resting)}
        self.log(numbers if record.score is None else numbers | {"score": record.score}, place.step)
        self._save()

    def _next(self, coming: Iterator[Share], position: int) -> Share:
        try:
            share = next(coming, None)
        except LaminaError:
            raise
        except Exception as error:  # the user's data set may raise anything
            raise TrainingError(f"{self._now}: the loader fails: {type(error).__name__}: {first_line(error)}") from error
        if share is None:
            raise TrainingError(
                f"the loader yields {f'{position} batches' if position else 'nothing'}, "
                f"where its length promises {len(self.data)}"
            )
        return share

    def _backward(self, share: Share, size: int, last: bool) -> float:
        """Add one batch's gradients to those of its step; returns its loss, the mean over all processes."""
        from accelerate.utils import send_to_device

        net = self.net
        assert net is not None
        batch = send_to_device(share.batch, self.device)
        with nullcontext() if last else unsynchronised(net):
            loss = self._loss(net, batch)
            value = float(mean(loss * share.weight))
            if not math.isfinite(value):
                kept = "" if self.checkpoints is None else f"; the checkpoints in {self.checkpoints.folder} are from before"
                raise TrainingError(f"{self._now}: the loss is {value}{kept}; a lower learning rate or clip= may help")
            (loss * (share.weight / size)).backward()  # type: ignore[no-untyped-call]
        self.place.loss += value * share.samples
        self.place.samples += share.samples
        return value

    def _loss(self, net: nn.Module, batch: Any) -> Tensor:
        inputs = input_of(batch)
        target = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else batch
        try:
            with self.autocast():
                output = inputs.run(net)
                wanted = None if self.pupil is None else self.pupil.answers(inputs)
            output = torch.utils._pytree.tree_map_only(Tensor, _at_least_float32, output)
        except Exception as error:  # the user's network may raise anything
            raise TrainingError(
                f"{self._now}: the network does not run on a batch ({inputs}): {type(error).__name__}: {first_line(error)}"
            ) from error
        try:
            loss = self.loss(output, target)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                what = _shapes(loss) if isinstance(loss, Tensor) else f"a {type(loss).__name__}: sum up its parts"
                raise TrainingError(f"the loss is no scalar tensor but {what}")
            loss = loss if self.pupil is None else self.pupil.loss(output, wanted, loss)
            if not loss.requires_grad:
                raise TrainingError("it has no gradient: nothing that trains leads to it, or it was detached")
            return loss
        except Exception as error:
            shapes = f"output {_shapes(output)}, target {_shapes(target)}"
            why = str(error) if isinstance(error, LaminaError) else f"{type(error).__name__}: {first_line(error)}"
            raise TrainingError(f"{self._now}: the loss cannot be computed ({shapes}): {why}") from error

    def _step(self) -> None:
        """The optimizer's step, and what hangs on it."""
        if self.clip is not None:
            trained = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
            norm = float(whole(nn.utils.clip_grad_norm_(trained, self.clip)))
            if not math.isfinite(norm):
                raise TrainingError(f"{self._now}: the norm of the gradients is {norm}; a lower learning rate may help")
        self.optimizer.step()
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
        self.model.zero_grad(set_to_none=True)
        self.place.step += 1
        if self.rests is not None and self.rests.step():
            self._wrap()

    def _wrap(self) -> None:
        self.net = wrapped(self.model, self.net, find_unused_parameters=self.find_unused_parameters)

    def _say(self, numbers: str = "") -> None:
        epoch = f"epoch {self.place.epoch + 1}/{self.epochs}"
        self.shown.say(epoch, self.place.batch, len(self.data), numbers)

    def _show(self, loss: float, seconds: float) -> None:
        rate = self.place.samples / max(seconds, 1e-9)
        phase = phase_name(None) if self.rests is None else self.rests.phase
        self._say(f"loss {loss:.4f}  {rate:,.0f} samples/s  {phase}")
        if self.place.step % self.log_every == 0:
            self.log({"loss": loss, "learning_rate": float(self.optimizer.param_groups[0]["lr"])}, self.place.step)

    def _scored(self, score: Callable[[nn.Module], float]) -> float:
        share_buffers(self.model)
        set_mode(self.model, False)
        with torch.no_grad(), random_states_kept(self.device):
            value: float = from_first(float(score(self.model)))
        if math.isnan(value):
            raise TrainingError(f"after {self.place.step} steps the score is NaN")
        return value

    def _out_of_patience(self) -> bool:
        merits = [record.merit for record in self.place.history]
        return self.patience is not None and bool(merits) and len(merits) - 1 - merits.index(max(merits)) >= self.patience

    @property
    def _now(self) -> str:
        return f"step {self.place.step + 1} (epoch {self.place.epoch + 1})"

    def _save(self) -> None:
        """Write a checkpoint, after everything in it was found finite."""
        if self.checkpoints is None:
            return
        weights = weights_of(self.model)
        trained = {name for name, _ in self.model.named_parameters()}
        for name, tensor in weights.items():
            if name in trained and not bool(torch.isfinite(tensor).all()):
                raise TrainingError(
                    f"after step {self.place.step} {name} is NaN or infinite: no checkpoint was written, those in "
                    f"{self.checkpoints.folder} are from before; a lower learning rate or clip= may help"
                )
        state = {
            "settings": self.settings,
            "place": self.place.as_state(),
            "optimizer": torch.utils._pytree.tree_map_only(Tensor, whole, self.optimizer.state_dict()),
            "scheduler": self.scheduler.state_dict(),
            "freezing": None if self.rests is None else self.rests.state_dict(),
            "data": self.data.state_dict(),
            "random": from_each(random_states(self.device)),
        }
        if rank() == 0:
            write(self.checkpoints, self.place.step, Content(weights, planned(self.model), state))
            settle(self.checkpoints, self.place.best_step)
        wait_for_all()

    def _resume(self) -> Iterator[Share] | None:
        """Go to where the newest checkpoint stands; returns what is to come of an epoch in whose middle that is."""
        if self.checkpoints is None:
            return None
        path: Path | None = None
        complaint = None
        if rank() == 0:
            try:
                path = newest(self.checkpoints)
            except TrainingError as error:
                complaint = str(error)
        path, complaint = from_first((path, complaint))
        if complaint is not None:
            raise TrainingError(complaint)
        if path is None:
            return None
        content = read(path)
        state = content.state
        expect_same(path, state["settings"], self.settings)
        set_weights(path, self.model, content.weights)
        set_optimizer(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.rests is not None:
            self.rests.load_state_dict(state["freezing"])
        self.place = place = Place.from_state(state["place"])
        self.data.load_state_dict(state["data"])
        # Finding the place draws random numbers, so the states are set last.
        coming = self.data.rest(place.batch) if place.batch else None
        self.data.set_generators()
        states = state["random"]
        set_random_states(states[rank() % len(states)], self.device)
        if rank() == 0:
            settle(self.checkpoints, place.best_step)
        wait_for_all()
        return coming


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _shapes(value: Any) -> str:
    shapes = [str(tuple(tensor.shape)) for tensor in tensors_in(value)]
    return ", ".join(shapes) or f"a {type(value).__name__}"
