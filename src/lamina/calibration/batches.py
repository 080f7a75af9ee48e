"""Data: unlabelled batches, every fourth of which is held out, so that a damping can be chosen by what no fit has seen."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..errors import ExampleError
from ..values import Workload, input_of

HELD_OUT = 4
"""Of so many batches the last is held out; of so many items, where there are fewer batches."""

_MOST_ITEMS = 8
"""In a batch of a tensor: activations take memory too, and the more batches, the better their scatter is known."""


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """What the network is fed at a time."""

    workload: Workload
    items: int
    held_out: bool
    number: int
    """Which item of the data it was, from 0."""


@final
class Batches:
    """Reads a ``data`` argument.

    Args:
        data: An iterable of examples or (input, target) pairs; one tensor, whose first dimension is divided into batches; or
            one mapping or `Workload`, which is a batch.
        device: Where tensors are moved to.

    Raises:
        ExampleError: It is none of these.
    """

    def __init__(self, data: Any, device: torch.device) -> None:
        if isinstance(data, Tensor):
            if not data.ndim or not len(data):
                raise ExampleError("the data are a tensor without items, so there is nothing to calibrate on")
            data = torch.split(data, min(max(len(data) // HELD_OUT, 1), _MOST_ITEMS))
        elif isinstance(data, Mapping | Workload):
            data = [data]
        if isinstance(data, str) or not isinstance(data, Iterable):
            raise ExampleError(f"the data are a {type(data).__name__}; give batches, such as a loader, a list or a tensor")
        self.data, self.device = data, device
        self.again = not isinstance(data, Iterator)
        """Whether they can be iterated anew."""

    def __len__(self) -> int:
        """How many they say they are; 0 where they do not."""
        try:
            return len(self.data)  # type: ignore[arg-type]
        except TypeError:
            return 0

    def first(self) -> Workload:
        """The first one, which iteration begins with all the same.

        Raises:
            ExampleError: There is none.
        """
        items = iter(self.data)
        head = list(itertools.islice(items, 1))
        if not head:
            raise ExampleError(
                "the data hold no batch, so there is nothing to calibrate on: an iterator that was gone through is empty, "
                "so make it anew, or give a loader, a list or a tensor"
            )
        if not self.again:
            self.data = itertools.chain(head, items)
        return self._read(head[0])

    def __iter__(self) -> Iterator[Batch]:
        """The batches in their order."""
        items = iter(self.data)
        head = list(itertools.islice(items, HELD_OUT))
        if len(head) == HELD_OUT:
            for number, item in enumerate(itertools.chain(head, items)):
                workload = self._read(item)
                yield Batch(workload, items_of(workload), number % HELD_OUT == HELD_OUT - 1, number)
            return
        seen = 0
        for number, item in enumerate(head):
            workload = self._read(item)
            count = items_of(workload)
            for held_out in (False, True):
                chosen = [i for i in range(count) if ((seen + i) % HELD_OUT == HELD_OUT - 1) == held_out]
                if chosen:
                    yield Batch(part_of(workload, chosen, count), len(chosen), held_out, number)
            seen += count

    def _read(self, item: Any) -> Workload:
        workload = input_of(item)

        def here(tensor: Tensor) -> Tensor:
            tensor = tensor.detach().to(self.device)
            return tensor.clone() if tensor.is_inference() else tensor  # which autograd cannot keep

        return with_tensors(workload, here)


def items_of(workload: Workload) -> int:
    """Items of a batch: the length of its first argument, where that is a list, else of its first tensor's first dimension.

    Raises:
        ExampleError: There is nothing that could be counted.
    """
    first = next(iter((*workload.args, *workload.kwargs.values())), None)
    if isinstance(first, list) and first:
        return len(first)
    for tensor in workload.tensors:
        if tensor.ndim:
            return tensor.shape[0]
    raise ExampleError("a batch of the data holds no tensor whose first dimension could count its items")


def part_of(workload: Workload, chosen: list[int], items: int) -> Workload:
    """Some items of a batch."""
    if len(chosen) == items:
        return workload

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == items:
            return value[chosen]
        if isinstance(value, list) and len(value) == items:
            return [value[i] for i in chosen]
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(cut(item) for item in value)
        return value

    return rebuilt(workload, cut(workload.args), cut(workload.kwargs))


def with_tensors(workload: Workload, change: Callable[[Tensor], Tensor]) -> Workload:
    """A batch with every tensor changed, moved to a device say."""
    return rebuilt(workload, *tree_map_only(Tensor, change, (workload.args, workload.kwargs)))


def rebuilt(workload: Workload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Workload:
    """A batch with other arguments."""
    new = Workload(args, workload.weight)
    new.kwargs.update(kwargs)
    return new
