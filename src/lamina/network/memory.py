"""Where tensors lie in memory: which of them share it, and whether somebody still holds it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter


@final
@dataclass(frozen=True, slots=True)
class Place:
    """The bytes that a tensor reaches: those from ``start`` up to ``end`` of one storage."""

    storage: int
    start: int
    end: int

    def overlaps(self, other: Place) -> bool:
        """Whether a write into the one can be seen in the other."""
        return self.storage == other.storage and self.start < other.end and other.start < self.end


def place(tensor: Tensor) -> Place | None:
    """Where a tensor lies; None where it has no bytes of its own: empty, lazy, or of another layout."""
    if (
        isinstance(tensor, UninitializedBuffer | UninitializedParameter)
        or tensor.layout != torch.strided
        or tensor.numel() == 0
    ):
        return None
    try:
        storage = tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a subclass that only wraps others
        return None
    reach = 1 + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return Place(storage, start, start + reach * tensor.element_size())


def overlapping(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of two or more tensors that share bytes, also by way of a third one; a tensor that stands twice counts once."""
    stored: dict[int, list[tuple[Place, Tensor]]] = defaultdict(list)
    for tensor in {id(t): t for t in tensors}.values():
        if at := place(tensor):
            stored[at.storage].append((at, tensor))
    for entries in stored.values():
        entries.sort(key=lambda entry: (entry[0].start, entry[0].end))
        group, end = [entries[0][1]], entries[0][0].end
        for at, tensor in entries[1:]:
            if at.start < end:
                group.append(tensor)
            else:
                if len(group) > 1:
                    yield group
                group = [tensor]
            end = max(end, at.end)
        if len(group) > 1:
            yield group


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The tensors that a module itself holds: parameters, buffers and plain attributes."""
    own: list[Any] = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    return [value for value in own if isinstance(value, Tensor)]
