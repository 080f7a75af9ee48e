"""Batches: which samples make each step, for this process, from any place in an epoch on.

The loader's batch is the batch of the whole training: several processes divide it, so that a training is the same with one of
them or with many. Two ways lead to that, and to going on in the middle of an epoch.

A `DataLoader` over a data set with an index (`Ordered`): process 0 draws the order of the epoch once, all batches of it; the
order is kept in the checkpoint, and each process fetches its own samples only. In worker processes every batch has a seed of
its own, so that what a data set draws at random does not depend on which worker fetched what before.

Anything else that can be iterated again and again (`Replayed`): a list of batches, a loader over a stream, an object of the
user's own. It is iterated anew from the random states with which the epoch began, and what was seen is skipped. Each process
sees all batches, which must be the same in all, and takes its part of them.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ..errors import TrainingError
from .distributed import from_first, processes, rank
from .random_states import random_states, seed_all, set_random_states


@final
@dataclass(frozen=True, slots=True)
class Share:
    """This process's part of one batch.

    ``samples`` counts the whole batch. ``weight`` is what the mean over this part must be multiplied with, so that the mean
    over the processes is the mean over the batch: 1 where all parts are equal, 0 where a batch has too few samples for all
    and this process computes on one of another's.
    """

    batch: Any
    samples: int
    weight: float


class Batches(ABC):
    """The batches of one epoch after the other."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches in the current epoch; before the first, as many as the loader promises."""

    @abstractmethod
    def start(self, epoch: int) -> None:
        """Begin an epoch anew."""

    @abstractmethod
    def rest(self, position: int) -> Iterator[Share]:
        """The batches of the current epoch from a position on. Whatever must be drawn to find the place is drawn at once."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The current epoch's order, or how to find it again, and the states of the loader's own generators."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back into an epoch that `state_dict` saw; `rest` is then called before `set_generators`."""

    @abstractmethod
    def set_generators(self) -> None:
        """Give the loader's own generators the states that were loaded."""


def batches(loader: Any, device: torch.device) -> Batches:
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
        return Ordered(loader)
    return Replayed(loader, device)


class _Draw(NamedTuple):
    """One batch to fetch: the samples, and where in the training it stands."""

    indices: list[Any]
    seed: tuple[int, ...]


class _Seeded(Dataset[Any]):
    """A data set as worker processes see it: seeded before every batch."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __getitems__(self, draw: _Draw) -> list[Any]:
        seed_all(int(np.random.SeedSequence(draw.seed).generate_state(1, np.uint64)[0] >> 1))
        fetch = getattr(self._dataset, "__getitems__", None)
        items: list[Any] = fetch(draw.indices) if fetch else [self._dataset[index] for index in draw.indices]
        return items


class _Order:
    """What a loader takes for its batch sampler: the batches still to come."""

    def __init__(self) -> None:
        self.draws: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.draws)

    def __len__(self) -> int:
        return len(self.draws)


@final
class Ordered(Batches):
    """A `DataLoader` over a data set with an index."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.order: list[list[Any]] | None = None
        self.seed = 0
        self._generators = _generators(loader)
        self._loaded: list[Tensor] = []
        self._coming = _Order()
        workers = loader.num_workers
        self._fetching: DataLoader[Any] = DataLoader(
            _Seeded(loader.dataset) if workers else loader.dataset,
            batch_sampler=self._coming,
            num_workers=workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    def __len__(self) -> int:
        return len(self.loader) if self.order is None else len(self.order)

    def start(self, epoch: int) -> None:
        """Draw the order of an epoch and its seed."""
        drawn: tuple[list[list[Any]], int] | None = None
        samplers: list[Any] = [self.loader.sampler, self.loader.batch_sampler]
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        if rank() == 0:
            assert self.loader.batch_sampler is not None
            order = [[_plain(index) for index in batch] for batch in self.loader.batch_sampler]
            drawn = order, int(torch.empty((), dtype=torch.int64).random_())
        self.order, self.seed = from_first(drawn)

    def rest(self, position: int) -> Iterator[Share]:
        """Fetch this process's samples of the batches from a position on."""
        assert self.order is not None
        parts = [(_part(len(batch)), batch) for batch in self.order[position:]]
        own: list[Any] = [batch[part.start : part.stop] for (part, _), batch in parts]
        if self.loader.num_workers:
            own = [_Draw(indices, (self.seed, position + i, rank())) for i, indices in enumerate(own)]
        self._coming.draws = own
        fetched = iter(self._fetching)
        return (Share(batch, len(indices), weight) for ((_, weight), indices), batch in zip(parts, fetched, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The order and seed of the epoch."""
        assert self.order is not None
        flat: Any = list(itertools.chain.from_iterable(self.order))
        if all(type(index) is int for index in flat):
            flat = torch.tensor(flat, dtype=torch.int64)
        return {
            "order": flat,
            "sizes": torch.tensor([len(batch) for batch in self.order]),
            "seed": self.seed,
            "generators": [generator.get_state() for generator in self._generators],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the order and seed of an epoch as they were."""
        flat = iter(state["order"].tolist() if isinstance(state["order"], Tensor) else state["order"])
        self.order = [list(itertools.islice(flat, size)) for size in state["sizes"].tolist()]
        self.seed = state["seed"]
        self._loaded = state["generators"]

    def set_generators(self) -> None:
        """Give the loader's own generators the states that were loaded."""
        for generator, content in zip(self._generators, self._loaded, strict=False):
            generator.set_state(content.cpu())


@final
class Replayed(Batches):
    """Anything else that can be iterated again and again."""

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self._generators = _generators(loader)
        self._began: dict[str, Any] | None = None
        self._began_generators: list[Tensor] = []
        self._loaded: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.loader)

    def start(self, epoch: int) -> None:
        """Note the random states with which the epoch begins."""
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)
        self._began = random_states(self.device)
        self._began_generators = [generator.get_state() for generator in self._generators]

    def rest(self, position: int) -> Iterator[Share]:
        """Iterate anew, skip what was seen, and take this process's part of the rest."""
        if position:
            assert self._began is not None
            set_random_states(self._began, self.device)
            for generator, content in zip(self._generators, self._began_generators, strict=True):
                generator.set_state(content.cpu())
        iterator = itertools.islice(iter(self.loader), len(self))
        skipped = sum(1 for _ in itertools.islice(iterator, position))
        if skipped < position:
            raise TrainingError(
                f"the loader yields {skipped} batches now; {position} were seen before the training was stopped"
            )
        return (_share(batch) for batch in iterator)

    def state_dict(self) -> dict[str, Any]:
        """The random states with which the epoch began, and those of the loader's own generators, then and now."""
        return {
            "began": self._began,
            "began generators": self._began_generators,
            "generators": [generator.get_state() for generator in self._generators],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the beginning of an epoch as it was."""
        self._began, self._began_generators = state["began"], state["began generators"]
        self._loaded = state["generators"]

    def set_generators(self) -> None:
        """Give the loader's own generators the states that were loaded."""
        for generator, content in zip(self._generators, self._loaded, strict=False):
            generator.set_state(content.cpu())


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators of the loader's own, looked for under the name ``generator`` in it and in its parts."""
    parts = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset", "collate_fn"))]
    found = [getattr(part, "generator", None) for part in parts]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _plain(index: Any) -> Any:
    return int(index) if isinstance(index, np.integer) or (isinstance(index, Tensor) and index.ndim == 0) else index


def _part(samples: int) -> tuple[slice, float]:
    """This process's samples of a batch of so many, and the weight of their mean."""
    size, number = processes(), rank()
    start, stop = samples * number // size, samples * (number + 1) // size
    if start == stop:
        return slice(0, 1), 0.0
    return slice(start, stop), size * (stop - start) / samples


def _share(batch: Any) -> Share:
    samples = batch_size(batch)
    part, weight = _part(samples)
    return Share(batch if processes() == 1 else _cut(batch, samples, part), samples, weight)


def batch_size(batch: Any) -> int:
    """The number of samples: the first dimension of the first tensor.

    Raises:
        TrainingError: There is no tensor with one.
    """
    for tensor in tensors_in(batch):
        if tensor.ndim:
            return tensor.shape[0]
    raise TrainingError(
        f"a batch holds no tensor whose first dimension could count the samples; it is a {type(batch).__name__}"
    )


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


def _cut(value: Any, samples: int, part: slice) -> Any:
    if isinstance(value, Tensor):
        return value[part] if value.ndim and value.shape[0] == samples else value
    if isinstance(value, Mapping):
        return {key: _cut(item, samples, part) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items: Sequence[Any] = [_cut(item, samples, part) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value
