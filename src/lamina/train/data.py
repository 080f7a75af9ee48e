"""Batches: which samples make each step, for this process, from any place in an epoch on.

The loader's batch is the batch of the whole training: several processes divide it, so that a training is the same with one of
them or with many. An epoch has a seed, drawn from the training's random states, and all that its loader draws comes from
streams of that seed, beside the training's. So the seed and a position tell where a training stands in its data.

A `DataLoader` over a data set with an index (`Indexed`): every process draws the order anew and fetches its own samples only.
Each batch has a seed of its own, in worker processes too: what a data set draws at random does not depend on which worker
fetched what before, and a resumed training fetches nothing twice.

Anything else that can be iterated again and again (`Replayed`): a list of batches, a loader over a stream, an object of the
user's own. Process 0 iterates it and gives each process its part. What has ``state_dict`` and ``load_state_dict``, such as
torchdata's ``StatefulDataLoader``, keeps its own place; a list has one; all else is iterated anew, and what was seen skipped.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
import warnings
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ..errors import LaminaError, TrainingError, TrainingWarning
from ..folder import digest
from ..network.running import said
from ..values import Workload
from .distributed import from_each, from_first, processes, rank
from .random_states import Apart, seed_all

Feed = Callable[[Any], tuple[Any, Any]]
_END: Any = object()


@final
@dataclass(frozen=True, slots=True)
class Share:
    """This process's part of one batch.

    ``samples`` counts the whole batch. ``weight`` is what the mean over this part must be multiplied with, so that the mean
    over the processes is the mean over the batch: 1 where all parts are equal, 0 where a batch has too few samples for all
    and this process computes on one of another's. ``check`` is alike in all processes that divide the same samples.
    """

    batch: Any
    samples: int
    weight: float
    check: int = 0


def pair(batch: Any) -> tuple[Any, Any]:
    """The rule by which a batch is read: input and target.

    A tuple or list of two is (input, target). A tensor or a mapping is the input, and its own target. All else needs ``feed=``.

    Raises:
        TrainingError: It is something else.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Tensor | Mapping | Workload):
        return batch, batch
    what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
    raise TrainingError(
        f"a batch is a {what} and no (input, target) pair: say which is which by feed=, a function from a batch to such a pair"
    )


class Batches(ABC):
    """The batches of one epoch after the other."""

    def __init__(self, loader: Any, replayed: Sequence[Any], kept: Sequence[Any]) -> None:
        self.loader = loader
        self.is_list = isinstance(loader, Sequence)
        self.seed = 0
        self._told = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset"))]
        self._replayed, self._kept = keepers(*replayed), keepers(*kept)
        self._began: list[Any] = []
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same when a training goes on, and in all processes."""
        dataset: Any = getattr(self.loader, "dataset", None)
        return {
            "loader": type(self.loader).__name__,
            "batches": len(self),
            "batch_size": getattr(self.loader, "batch_size", None),
            "samples": len(dataset) if hasattr(dataset, "__len__") else None,
        }

    def glimpse(self) -> str | None:
        """A hash of the first and the last: who sees others has other data. None where they are not the same twice."""

        def look() -> str:
            with Apart(0):
                return digest({str(number): tensor for number, tensor in enumerate(tensors_in(self._some()))})

        try:
            found = look()
            return found if look() == found else None
        except Exception:  # a data set with other keys, or with errors that its own fetching will tell
            return None

    @abstractmethod
    def _some(self) -> list[Any]:
        """The first and the last that can be asked for."""

    @abstractmethod
    def _from(self, position: int) -> Iterator[Share]:
        """The batches of this epoch from a position on."""

    def start(self, epoch: int) -> Iterator[Share]:
        """Begin an epoch; its batches."""
        if not self.is_list:  # which draws nothing
            self.seed = from_first(int(torch.empty((), dtype=torch.int64).random_()))
        return self._begin(epoch, 0)

    def resume(self, epoch: int, position: int, state: Mapping[str, Any]) -> Iterator[Share] | None:
        """Go to where `state_dict` was asked; the batches still to come, None at an epoch's beginning."""
        self.seed, self._began = state["seed"], state["began"]
        number, takers = len(self._replayed), [give for _, give in [*self._replayed, *self._kept]]
        states = [*(self._began if position else state["now"][:number]), *state["now"][number:]]
        if position:
            return self._begin(epoch, position, zip(takers, states, strict=True))
        for give, one in zip(takers, states, strict=True):
            give(one)
        return None

    def _begin(self, epoch: int, position: int, states: Iterable[tuple[Callable[[Any], Any], Any]] = ()) -> Iterator[Share]:
        """The one place where an epoch begins, fresh or in its middle."""
        for part in self._told:
            tell_epoch(part, epoch)
        for give, state in states:
            give(state)
        if not position:
            self._began = [take() for take, _ in self._replayed]
        self.epoch = epoch
        return self._from(position)

    def state_dict(self) -> dict[str, Any]:
        """The epoch's seed; the states of what draws or counts by itself, when the epoch began and now."""
        return {"seed": self.seed, "began": self._began, "now": [take() for take, _ in [*self._replayed, *self._kept]]}


def keepers(*owners: Any) -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """How the state of each is taken and given back: of what has ``state_dict`` and ``load_state_dict``, and of a generator.

    A generator is looked for under the name ``generator`` in each.
    """
    found: dict[int, tuple[Callable[[], Any], Callable[[Any], Any]]] = {}
    for owner in owners:
        generator = getattr(owner, "generator", None)
        if keeps_state(owner):
            found[id(owner)] = (owner.state_dict, owner.load_state_dict)
        elif isinstance(generator, torch.Generator):
            found[id(generator)] = (generator.get_state, partial(_set_state, generator))
    return list(found.values())


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state.cpu())


def keeps_state(owner: Any) -> bool:
    """Whether something has a state to take and to give back."""
    owner = getattr(owner, "base_dataloader", owner)  # Accelerate's loaders have both methods, but what they hold need not
    return all(callable(getattr(owner, name, None)) for name in ("state_dict", "load_state_dict"))


def tell_epoch(part: Any, epoch: int) -> None:
    """Tell a loader, a sampler or a data set which epoch begins, if it wants to know."""
    if callable(getattr(part, "set_epoch", None)):
        part.set_epoch(epoch)


def batches(loader: Any) -> Batches:
    """Read a ``loader`` argument.

    Raises:
        TrainingError: It has no length, is empty, can be iterated only once, or is divided among processes already.
    """
    if processes() > 1 and (
        isinstance(getattr(loader, "sampler", None), DistributedSampler) or hasattr(loader, "_is_accelerate_prepared")
    ):
        raise TrainingError(
            "the loader is divided among the processes already; pass one over the whole data, each process then takes its part"
        )
    if isinstance(loader, Iterator) or not hasattr(loader, "__iter__"):
        raise TrainingError(
            f"{type(loader).__name__} can be iterated only once or not at all; pass a DataLoader or a list of batches"
        )
    try:
        length = len(loader)
    except TypeError as error:
        raise TrainingError(
            f"{type(loader).__name__} does not say how many batches it holds ({error}): give it, or its data set, a __len__"
        ) from error
    if length < 1:
        raise TrainingError("the loader yields nothing: it holds no batch")
    if (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    ):
        return Indexed(loader)
    return Replayed(loader)


def expect_one_source(data: Batches) -> None:
    """Refuse processes that are given data of their own, of which each would see a part only.

    Raises:
        TrainingError: In all of them; the message names two that differ.
    """
    seen = from_each(data.glimpse())
    for number, one in enumerate(seen):
        if one != seen[0] and None not in seen:
            raise TrainingError(
                f"processes 0 and {number} are given different data: pass the whole data in every process, each takes its part"
            )


def _through(iterable: Iterable[Any], length: int, draws: Apart, begins: Apart | None = None) -> Iterator[Any]:
    """One pass, of no more than so many. It is run to its end, as a loop would: there a loader may count its passes."""
    with begins or draws:
        iterator = iter(iterable)
    for _ in range(length):
        with draws:
            item = next(iterator, _END)
        if item is _END:
            return
        yield item
    with draws:
        next(iterator, _END)


class _Draw(NamedTuple):
    """One batch to fetch: this process's samples of it, and where in the training it stands."""

    indices: list[Any]
    seed: tuple[int, ...]
    epoch: int


class _Seeded(Dataset[Any]):
    """A data set that is seeded before every batch, and told of the epoch in worker processes as well."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._epoch: int | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """As a ``worker_init_fn`` does."""
        if name in ("_dataset", "_epoch"):
            super().__setattr__(name, value)
        else:
            setattr(self._dataset, name, value)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __getitems__(self, draw: _Draw) -> list[Any]:
        if draw.epoch != self._epoch:  # workers that persist have a copy of their own
            tell_epoch(self._dataset, draw.epoch)
            self._epoch = draw.epoch
        seed_all(*draw.seed)
        fetch = getattr(self._dataset, "__getitems__", None)
        items: list[Any] = fetch(draw.indices) if fetch else [self._dataset[index] for index in draw.indices]
        return items


def _begin_worker(own: Callable[[int], None] | None, number: int) -> None:
    """What a worker process does first.

    One that was forked shares its parent's connections to other processes: they would wait as long as it lives. Torch looks for
    the parent every five seconds, and never, where it was killed before the first look.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and type(multiprocessing.current_process()).__name__ == "ForkProcess":
        threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()
    if own is not None:
        own(number)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class _Order:
    """What the fetching loader takes for its batch sampler: this process's samples of the batches still to come."""

    def __init__(self, batches: Any, ahead: deque[tuple[int, float, int]]) -> None:
        self.batches, self.ahead = batches, ahead
        self.seed = self.epoch = self.position = 0

    def __iter__(self) -> Iterator[_Draw]:
        for number, batch in enumerate(_through(self.batches, len(self), Apart(self.seed))):
            if number < self.position:
                continue
            part, weight = _part(len(batch))
            indices = [_plain(index) for index in batch]
            check = zlib.crc32(repr(indices).encode()) % 2**20 if processes() > 1 else 0
            self.ahead.append((len(batch), weight, check))
            yield _Draw(indices[part], (self.seed, number, rank()), self.epoch)

    def __len__(self) -> int:
        return len(self.batches)


@final
class Indexed(Batches):
    """A `DataLoader` over a data set with an index."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader, (loader, loader.sampler, loader.batch_sampler), (loader.dataset, loader.collate_fn))
        self._ahead: deque[tuple[int, float, int]] = deque()
        self._order = _Order(loader.batch_sampler, self._ahead)
        self._fetching: DataLoader[Any] = DataLoader(
            _Seeded(loader.dataset),
            batch_sampler=self._order,  # type: ignore[arg-type]
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=partial(_begin_worker, loader.worker_init_fn),
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    def _some(self) -> list[Any]:
        dataset = self.loader.dataset
        return [self.loader.collate_fn([dataset[index]]) for index in (0, len(dataset) - 1)]

    def _from(self, position: int) -> Iterator[Share]:
        order, draws = self._order, Apart(self.seed, position)
        order.seed, order.epoch, order.position = self.seed, self.epoch, position
        self._ahead.clear()
        for batch in _through(self._fetching, len(self) - position, draws):
            samples, weight, check = self._ahead.popleft()
            yield Share(batch, samples, weight, check)


@final
class Replayed(Batches):
    """Anything else that can be iterated again and again."""

    def __init__(self, loader: Any) -> None:
        self._keeps_place = keeps_state(loader)
        parts = [getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset", "collate_fn")]
        super().__init__(loader, () if self._keeps_place else (loader, *parts), (loader,) if self._keeps_place else ())
        self._draws = Apart(0)

    def state_dict(self) -> dict[str, Any]:
        """Also the states of the stream that the loader draws from."""
        return super().state_dict() | {"draws": self._draws.states if self._keeps_place else None}

    def resume(self, epoch: int, position: int, state: Mapping[str, Any]) -> Iterator[Share] | None:
        """As said there; the stream of a loader that keeps its place goes on as well."""
        if not (self.is_list or self._keeps_place) and rank() == 0 and (position or not isinstance(self.loader, DataLoader)):
            warnings.warn(
                f"{type(self.loader).__name__} does not keep its place (it has no state_dict): it is iterated from the "
                f"beginning of epoch {epoch + 1}, and what it counts by itself begins anew",
                TrainingWarning,
                stacklevel=2,
            )
        coming = super().resume(epoch, position, state)
        if self._keeps_place and position:
            self._draws.states = state["draws"]
        return coming

    def _some(self) -> list[Any]:
        return [self.loader[0], self.loader[-1]] if self.is_list else []

    def _from(self, position: int) -> Iterator[Share]:
        self._draws = Apart(self.seed, 1)
        coming = self._unseen(position) if rank() == 0 else iter(())
        if processes() == 1:
            return (Share(batch, batch_size(batch), 1.0) for batch in coming)
        return iter(lambda: _given_out(coming), None)

    def _unseen(self, position: int) -> Iterator[Any]:
        if self.is_list:
            yield from itertools.islice(self.loader, position, None)
            return
        skipped = 0 if self._keeps_place else position
        # A loader that goes on in mid-epoch may draw more to begin with than one that is new.
        coming = _through(self.loader, len(self) - position + skipped, self._draws, Apart(self.seed, 0))
        if (found := sum(1 for _ in itertools.islice(coming, skipped))) < skipped:
            raise TrainingError(f"the loader yields {found} batches now; {position} were seen before the training was stopped")
        yield from coming


def _given_out(coming: Iterator[Any]) -> Share | None:
    """Process 0's next batch, a part of it for each process; None after the last one. What fails there is raised in all."""
    parts: list[Any] = [None] * processes()
    if rank() == 0:
        try:
            batch = next(coming, _END)
            if batch is not _END:
                parts = _parts(batch)
        except Exception as error:
            parts = [str(error) if isinstance(error, LaminaError) else said(error)] * processes()
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, parts if rank() == 0 else None, src=0)
    if isinstance(mine[0], str):
        raise TrainingError(mine[0])
    return mine[0]  # type: ignore[no-any-return]


def _parts(batch: Any) -> list[Share]:
    samples = batch_size(batch)
    if any(tensor.ndim and tensor.shape[0] != samples for tensor in tensors_in(batch)):
        raise TrainingError(
            f"a batch of {type(batch).__name__} cannot be divided among {processes()} processes: its tensors count other "
            "numbers of samples; pass a DataLoader over a data set with an index, of which each process fetches its part"
        )
    return [Share(_cut(batch, part), samples, weight) for part, weight in (_part(samples, n) for n in range(processes()))]


def _plain(index: Any) -> Any:
    return int(index) if isinstance(index, np.integer) or (isinstance(index, Tensor) and index.ndim == 0) else index


def _part(samples: int, number: int | None = None) -> tuple[slice, float]:
    """A process's samples of a batch of so many, and the weight of their mean."""
    size, number = processes(), rank() if number is None else number
    start, stop = samples * number // size, samples * (number + 1) // size
    if start == stop:
        return slice(0, 1), 0.0
    return slice(start, stop), size * (stop - start) / samples


def batch_size(batch: Any) -> int:
    """The number of samples: the first dimension of the first tensor; 1 where there is none, in an object of the user's own."""
    return next((tensor.shape[0] for tensor in tensors_in(batch) if tensor.ndim), 1)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def _cut(value: Any, part: slice) -> Any:
    if isinstance(value, Tensor):
        return value[part].clone() if value.ndim else value  # a view would be sent with all that it is a view of
    if isinstance(value, Mapping):
        return {key: _cut(item, part) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_cut(item, part) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value
