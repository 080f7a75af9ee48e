"""One training on its way: epochs, steps, and the places in between where it is kept.

A *batch* is what the loader yields, a *step* one of the optimizer's: ``accumulate`` batches, or the rest of an epoch at its
end. Whatever changes the phase of the network, or is written to disk, happens between two steps.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..errors import LaminaError, TrainingError
from ..network.preserve import repeatable
from ..network.running import said, set_mode
from ..network.wrappers import unwrapped
from ..progress import Display
from ..schedules import phase_name
from ..values import Workload, arguments
from .checkpoint import Checkpoints, Content, newest, read, settle, write
from .data import Batches, Feed, Share, keepers, tensors_in
from .distill import Teacher
from .distributed import (
    copied,
    from_each,
    from_first,
    own_part,
    processes,
    put_back,
    rank,
    sharded,
    share_buffers,
    together,
    unsynchronised,
    whole,
    wrapped,
)
from .freezing import Freezing
from .random_states import random_states, set_random_states
from .records import EpochRecord, TrainingRecord
from .state import Settings, expect_same, planned, restore, tensors_of


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


class _Fed(NamedTuple):
    """One batch as a step takes it."""

    share: Share
    inputs: Workload
    target: Any


@final
@dataclass(slots=True)
class Run:
    """One training: what it works with, and the way through its epochs."""

    model: nn.Module
    data: Batches
    feed: Feed
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
    settings: Settings
    place: Place = field(default_factory=Place)
    net: nn.Module | None = None
    """The network as a step calls it, in the current phase."""
    inner: nn.Module = field(init=False)
    """The network itself, out of ``torch.compile``."""
    odd: frozenset[str] = field(init=False)
    """What was not finite before anything was trained, such as a mask of −∞."""

    def __post_init__(self) -> None:
        self.inner = unwrapped(self.model)
        self.odd = frozenset(self._infinite())

    def all(self) -> TrainingRecord:
        """Every epoch that is still to come."""
        self.inner.zero_grad(set_to_none=True)
        coming = self._resume()
        resumed_at = None if self.place.step == 0 else self.place.step
        while self.place.epoch < self.epochs and not self._out_of_patience():
            self._train(self._start_epoch() if coming is None else coming)
            self._end_epoch()
            coming = None
        share_buffers(self.inner)
        stopped: Literal["finished", "patience"] = "finished" if self.place.epoch == self.epochs else "patience"
        folder = None if self.checkpoints is None else Path(self.checkpoints.folder)
        return TrainingRecord(tuple(self.place.history), self.place.step, stopped, folder, resumed_at)

    def _start_epoch(self) -> Iterator[Share]:
        """The order and the phase of the next epoch."""
        place = self.place
        place.batch, place.loss, place.samples, place.seconds = 0, 0.0, 0, 0.0
        coming = self.data.start(place.epoch)
        if self.rests is not None:
            if self.rests.start_epoch(place.epoch):
                self._wrap()
            place.resting = self.rests.resting
        return coming

    def _train(self, coming: Iterator[Share]) -> None:
        """All batches of this epoch that are still to come."""
        place, batches = self.place, len(self.data)
        if self.net is None:
            self._wrap()
        self.inner.train(not self.eval_mode)
        self._say()
        every = None if self.checkpoints is None else self.checkpoints.every
        began = time.perf_counter()
        while place.batch < batches:
            size = min(self.accumulate, batches - place.batch)
            with self._buffers_put_back():
                losses = [self._backward(self._next(coming, place.batch + i), size, i == size - 1) for i in range(size)]
                self._step()
            place.batch += size
            self._show(sum(losses) / size, place.seconds + time.perf_counter() - began)
            if every and place.step % every == 0 and place.batch < batches:
                place.seconds += time.perf_counter() - began
                self._save()
                began = time.perf_counter()
        place.seconds += time.perf_counter() - began
        with together(), self._saying("the loader fails at its end"):
            next(coming, None)

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

    @contextmanager
    def _saying(self, what: str | Callable[[], str]) -> Iterator[None]:
        """Errors of the user's own code, which may raise anything, with where they come from."""
        try:
            yield
        except torch.OutOfMemoryError:  # of which some tools make smaller batches
            raise
        except Exception as error:
            why = str(error) if isinstance(error, LaminaError) else said(error)
            raise TrainingError(f"{self._now}: {what if isinstance(what, str) else what()}: {why}") from error

    @contextmanager
    def _buffers_put_back(self) -> Iterator[None]:
        """After a step that fails, running statistics are what they were: with NaN in them the network could answer nothing."""
        before = copied(self.inner.buffers())
        try:
            yield
        except BaseException:
            put_back(before)
            raise

    def _next(self, coming: Iterator[Share], position: int) -> _Fed:
        """The next batch, on the device of the training, as the network and the loss take it."""
        with together(3) as sums:
            with self._saying("the loader fails"):
                share = next(coming, None)
                if share is None:
                    found = f"{position} batches" if position else "nothing"
                    raise TrainingError(f"it yields {found}, where its length promises {len(self.data)}")
            fed = self._feed(share)
            sums[:] = 1, share.check, share.check**2
        if sums[0] * sums[2] != sums[1] ** 2:  # they are not all equal
            raise TrainingError(
                f"{self._now}: the processes have drawn different samples for one batch: the sampler must draw from torch, or "
                "from a seed that is the same in all"
            )
        return fed

    def _feed(self, share: Share) -> _Fed:
        from accelerate.utils import send_to_device

        with self._saying("a batch cannot be read"):
            read = self.feed(send_to_device(share.batch, self.device))
            if not (isinstance(read, tuple) and len(read) == 2):
                raise TrainingError(f"feed returns a {type(read).__name__}, which is no pair of input and target")
            return _Fed(share, arguments(read[0]), read[1])

    def _backward(self, fed: _Fed, size: int, last: bool) -> float:
        """Add one batch's gradients to those of its step; returns its loss, the mean over all processes."""
        net, share = self.net, fed.share
        assert net is not None
        share_buffers(self.inner)
        with unsynchronised(net, last):
            with together(1) as sums:
                loss = self._loss(net, fed.inputs, fed.target)
                sums[0] = float(loss.detach()) * share.weight
            value = sums[0] / processes()
            if not math.isfinite(value):
                raise TrainingError(f"{self._now}: the loss is {value}{self._kept}; a lower learning rate or clip= may help")
            with self._saying("the gradients cannot be computed"):
                (loss * (share.weight / size)).backward()  # type: ignore[no-untyped-call]
        self.place.loss += value * share.samples
        self.place.samples += share.samples
        return value

    @property
    def _kept(self) -> str:
        return "" if self.checkpoints is None else f"; the checkpoints in {self.checkpoints.folder} are from before"

    def _loss(self, net: nn.Module, inputs: Workload, target: Any) -> Tensor:
        given = f", given as {len(inputs.args)} arguments: feed= can say otherwise" if len(inputs.args) > 1 else ""
        with self._saying(f"the network does not run on a batch ({inputs}{given})"):
            with self.autocast():
                output = inputs.run(net)
                wanted = None if self.pupil is None else self.pupil.answers(inputs)
            output = torch.utils._pytree.tree_map_only(Tensor, at_least_float32, output)
        with self._saying(lambda: f"the loss cannot be computed (output {_shapes(output)}, target {_shapes(target)})"):
            loss = self.loss(output, target)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                what = _shapes(loss) if isinstance(loss, Tensor) else f"a {type(loss).__name__}: sum up its parts"
                raise TrainingError(f"the loss is no scalar tensor but {what}")
            loss = loss if self.pupil is None else self.pupil.loss(output, wanted, loss)
            if not loss.requires_grad:
                raise TrainingError("it has no gradient: nothing that trains leads to it, or it was detached")
            return loss

    def _step(self) -> None:
        """The optimizer's step, and what hangs on it."""
        graded = {name: parameter for name, parameter in self.inner.named_parameters() if parameter.grad is not None}
        norm = self._norm({name: parameter.grad for name, parameter in graded.items() if parameter.grad is not None})
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(graded.values(), self.clip, norm)
        with together(), self._saying("the optimizer or its schedule fails"):
            self.optimizer.step()
            if not isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step()
        self.inner.zero_grad(set_to_none=True)
        self.place.step += 1
        if self.rests is not None and self.rests.step():
            self._wrap()

    def _norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """The norm of all gradients; one that is NaN or infinite would spoil its weights for good."""
        norm = nn.utils.get_total_norm([g._values() if g.is_sparse else g for g in gradients.values()])
        if not math.isfinite(length := float(whole(norm))):
            what = f"the norm of the gradients is {length}" if self.clip is not None else None
            for name, gradient in gradients.items():
                if not math.isfinite(float(whole(gradient.double().norm()))):
                    what = f"the gradient of {name} is NaN or infinite"
                    break
            if what is not None:
                raise TrainingError(f"{self._now}: {what}{self._kept}; a lower learning rate or clip= may help")
        return norm

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
        share_buffers(self.inner)
        set_mode(self.inner, False)
        value = math.nan
        with together(), torch.no_grad(), repeatable(self.inner):
            try:
                value = float(score(self.model))
            except Exception as error:
                raise TrainingError(f"after {self.place.step} steps the score cannot be told: {said(error)}") from error
        agreed: float = from_first(value)
        if math.isnan(agreed):
            raise TrainingError(f"after {self.place.step} steps the score is NaN")
        return agreed

    def _out_of_patience(self) -> bool:
        merits = [record.merit for record in self.place.history]
        return self.patience is not None and bool(merits) and len(merits) - 1 - merits.index(max(merits)) >= self.patience

    @property
    def _now(self) -> str:
        return f"step {self.place.step + 1} (epoch {self.place.epoch + 1})"

    def _infinite(self) -> list[str]:
        """Names of what is not finite; of what is spread, this process's part is looked at."""
        tensors = [*self.inner.named_parameters(), *self.inner.named_buffers()]
        return [name for name, tensor in tensors if not bool(torch.isfinite(own_part(tensor)).all())]

    def _objects(self) -> list[Any]:
        return keepers(self.loss, self.score)

    def _save(self) -> None:
        """Write a checkpoint, after everything in it was found finite."""
        if self.checkpoints is None:
            return
        with together():
            for name in self._infinite():
                if name not in self.odd:
                    raise TrainingError(
                        f"after step {self.place.step} {name} is NaN or infinite: no checkpoint was written, those in "
                        f"{self.checkpoints.folder} are from before; a lower learning rate or clip= may help"
                    )
        tensors = tensors_of(self.inner)
        weights: dict[str, Tensor] | None = None
        if not sharded(self.inner):
            weights = {name: tensors.pop(name) for name in self.inner.state_dict()}
        elif self.checkpoints.whole:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            gathered: Any = get_model_state_dict(self.inner, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            weights = gathered
        state = {
            "settings": self.settings,
            "place": self.place.as_state(),
            "tensors": tensors,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "freezing": None if self.rests is None else self.rests.state_dict(),
            "data": self.data.state_dict(),
            "objects": [take() for take, _ in self._objects()],
            "random": from_each(random_states(self.device)),
        }
        content = Content(weights, planned(self.inner), state)
        write(self.checkpoints, self.place.step, content, self.place.best_step)

    def _resume(self) -> Iterator[Share] | None:
        """Go to where the newest checkpoint stands; returns what is to come of an epoch in whose middle that is."""
        if self.checkpoints is None:
            return None
        content: Content | None = None
        with together():
            content = newest(self.checkpoints) if rank() == 0 else None
        path = from_first(content and content.path)
        if path is None:
            return None
        with together():
            content = content or read(path)
            state = content.state
            expect_same(str(path), state["settings"], self.settings)
        restore(str(path), content, self.inner, self.optimizer)
        self.scheduler.load_state_dict(state["scheduler"])
        if self.rests is not None:
            self.rests.load_state_dict(state["freezing"])
        for (_, give), kept in zip(self._objects(), state["objects"], strict=True):
            give(kept)
        self.place = place = Place.from_state(state["place"])
        coming = self.data.resume(place.epoch, place.batch, state["data"])
        states = state["random"]
        set_random_states(states[rank() % len(states)], self.device)
        with together():
            if rank() == 0:
                settle(self.checkpoints, place.best_step)
        return coming


def at_least_float32(tensor: Tensor) -> Tensor:
    """An output as a loss takes it."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _shapes(value: Any) -> str:
    shapes = [str(tuple(tensor.shape)) for tensor in tensors_in(value)]
    return ", ".join(shapes) or f"a {type(value).__name__}"
