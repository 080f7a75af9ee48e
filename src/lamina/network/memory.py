"""Where tensors lie in memory: which of them share it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

_LAZY = (UninitializedBuffer, UninitializedParameter)


@final
class Place(NamedTuple):
    """The bytes that a tensor reaches: those from ``start`` up to ``end`` of a device's memory."""

    device: torch.device
    start: int
    end: int

    def overlaps(self, other: Place) -> bool:
        """Whether a write into the one can be seen in the other."""
        return self.start < other.end and other.start < self.end and self.device == other.device


def devices_of(*models: nn.Module) -> list[torch.device]:
    """The devices on which parameters and buffers of some networks lie, that of the first parameter first."""
    tensors = (t for model in models for t in [*model.parameters(), *model.buffers()])
    return list(dict.fromkeys(tensor.device for tensor in tensors))


def place(tensor: Tensor) -> Place | None:
    """Where a tensor lies; None where it has no bytes of its own: empty, lazy, on the meta device, or of another layout."""
    if isinstance(tensor, _LAZY) or tensor.layout != torch.strided:
        return None
    try:
        start, reach = tensor.data_ptr(), tensor.numel()
        if not tensor.is_contiguous():
            reach = 1 + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
    except (RuntimeError, NotImplementedError):  # a subclass that only wraps others
        return None
    return Place(tensor.device, start, start + int(reach) * tensor.element_size()) if start and tensor.numel() else None


def whole_place(tensor: Tensor) -> Place | None:
    """Where the storage lies that a tensor is a part of."""
    at = place(tensor)
    if at is None:
        return None
    storage = tensor.untyped_storage()
    return Place(at.device, storage.data_ptr(), storage.data_ptr() + storage.nbytes())


def overlapping(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of two or more tensors that share bytes, also by way of a third one; a tensor that stands twice counts once."""
    placed = [(at, tensor) for tensor in {id(t): t for t in tensors}.values() if (at := place(tensor))]
    placed.sort(key=lambda entry: (str(entry[0].device), *entry[0][1:]))
    group: list[Tensor] = []
    last: Place | None = None
    for at, tensor in placed:
        if last and at.device == last.device and at.start < last.end:
            group.append(tensor)
            last = last._replace(end=max(last.end, at.end))
        else:
            if len(group) > 1:
                yield group
            group, last = [tensor], at
    if len(group) > 1:
        yield group


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The tensors that a module itself holds: parameters, buffers and plain attributes."""
    own: list[Any] = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    return [value for value in own if isinstance(value, Tensor)]
