"""The sums of one layer, and how much memory they take.

n   length of what the layer's weight is multiplied with: K I for patches, I for channels      O   output channels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..values import Geometry, quantity
from .gram import Gram, Scatter, add_to, packed, summed
from .patches import Patches

_BYTES = 8
_SHARE = 0.75
"""Of the memory, what sums may take; the rest is for what is copied on the way."""


@final
@dataclass(frozen=True, slots=True)
class Shape:
    """Which moments of a layer are kept."""

    geometry: Geometry
    patches: bool
    gradients: bool

    @property
    def taps(self) -> int:
        """Taps that the moment of the inputs tells apart."""
        return self.geometry.taps if self.patches else 1

    @property
    def n(self) -> int:
        """Side of that moment."""
        return self.geometry.in_channels * self.taps

    @property
    def bytes(self) -> int:
        """What its sums take while they are made."""
        I, O = self.geometry.in_channels, self.geometry.out_channels
        numbers = packed(self.n) + packed(I) + self.n + Scatter.size(self.n)
        if self.gradients:
            numbers += 2 * packed(O) + Scatter.size(O)
        return _BYTES * numbers


@final
class Sums:
    """What is added up of one layer: over all batches, and over those held out, of which moments of channels are enough.

    Args:
        shape: Which moments.
        device: Where they are kept.
        workspace: Bytes that may be copied at a time.
    """

    def __init__(self, shape: Shape, device: torch.device, workspace: int) -> None:
        I, O = shape.geometry.in_channels, shape.geometry.out_channels
        self.shape, self.workspace = shape, workspace
        self.inputs, self.held_out = Gram(shape.n, device=device), Gram(I, device=device)
        self.total = torch.zeros(shape.n, dtype=torch.float64, device=device)
        self.scatter = Scatter(shape.n, device)
        self.rows = 0
        self.reached = torch.zeros(2, dtype=torch.float64, device=device)  # batches that called it, and whose gradients came
        self.gradients = Gram(O, device=device) if shape.gradients else None
        self.held_out_gradients = Gram(O, device=device) if shape.gradients else None
        self.gradient_scatter = Scatter(O, device) if shape.gradients else None
        self._rows_before, self._called, self._moved = 0, False, False

    def add_inputs(self, x: Tensor, y: Callable[[], Tensor], held_out: bool) -> None:
        """Take in what a layer was called with: ``(…, I)``, or ``(N, I, *map)`` for a convolution; what it answered is not."""
        self._called = True
        if not self.shape.geometry.kernel:
            columns = x.reshape(-1, x.shape[-1]).T
            add_to([self.inputs, *[self.held_out] * held_out], columns)
            self.scatter.take(columns)
            self.total += summed(columns, self.total.device)
            self.rows += columns.shape[1]
            return
        x = x if x.ndim == 2 + len(self.shape.geometry.kernel) else x[None]
        patches = Patches(self.shape.geometry, self.workspace)
        if self.shape.patches:
            self.rows += patches.add_patches([self.inputs], self.total, x, self.scatter)
            if held_out:
                patches.add_channels([self.held_out], None, x)
        else:  # of a single tap a patch is a channel of a position
            add = patches.add_patches if self.shape.geometry.taps == 1 else patches.add_channels
            self.rows += add([self.inputs, *[self.held_out] * held_out], self.total, x, self.scatter)

    def add_gradients(self, g: Tensor, held_out: bool) -> None:
        """Take in the gradient at an output, ``(…, O)`` or ``(N, O, *map)``."""
        assert self.gradients is not None
        assert self.held_out_gradients is not None
        assert self.gradient_scatter is not None
        self._moved = True
        if not self.shape.geometry.kernel:
            columns = g.reshape(-1, g.shape[-1]).T
        else:
            g = g if g.ndim == 2 + len(self.shape.geometry.kernel) else g[None]
            columns = g.movedim(1, -1).flatten(0, -2).T
        add_to([self.gradients, *[self.held_out_gradients] * held_out], columns)
        self.gradient_scatter.take(columns)

    def end_batch(self, items: int) -> tuple[bool, bool]:
        """Note how a batch has moved the sums; whether inputs and gradients are finite so far."""
        finite = self.scatter.end(items), True
        if self.gradient_scatter is not None:
            finite = finite[0], self.gradient_scatter.end(self.rows - self._rows_before)
        self.reached += self.reached.new_tensor([float(self._called), float(self._moved)])
        self._rows_before, self._called, self._moved = self.rows, False, False
        return finite

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is to be added up over processes."""
        yield from (self.inputs.flat, self.held_out.flat, self.total, self.reached, *self.scatter.parts)
        if self.gradients is not None and self.held_out_gradients is not None and self.gradient_scatter is not None:
            yield from (self.gradients.flat, self.held_out_gradients.flat, *self.gradient_scatter.parts)


def plan_passes(geometries: Mapping[str, Geometry], gradients: bool, memory: float, again: bool) -> list[dict[str, Shape]]:
    """Which layers' sums are made together, in the order of the layers, and of which moments.

    Patches wherever a layer's own sums fit three quarters of the memory. Where not all fit at once, there are as many passes
    over the data as it takes; over data that can be iterated only once there is one, and the patches that take least are kept.

    Raises:
        CalibrationError: Not even moments of channels fit.
    """

    def shape(name: str, patches: bool) -> Shape:
        return Shape(geometries[name], patches and geometries[name].patchable, gradients)

    room = _SHARE * memory
    shapes = {name: shape(name, True) for name in geometries}
    shapes = {name: s if s.bytes <= room else shape(name, False) for name, s in shapes.items()}
    for name, s in shapes.items():
        if s.bytes > room:
            raise CalibrationError(f"{name or 'the network'}: its moments take {_too_much(s.bytes, memory)}")
    if sum(s.bytes for s in shapes.values()) <= room:
        return [shapes]
    if again:
        return _packed(shapes, room)
    found = {name: shape(name, False) for name in geometries}
    left = room - sum(s.bytes for s in found.values())
    if left < 0:
        why = _too_much(room - left, memory)
        raise CalibrationError(f"the moments take {why}, or give data that can be iterated more than once")
    for name in sorted(shapes, key=lambda name: shapes[name].bytes):
        if (more := shapes[name].bytes - found[name].bytes) <= left:
            found[name], left = shapes[name], left - more
    return [found]


def _packed(shapes: Mapping[str, Shape], room: float) -> list[dict[str, Shape]]:
    """First fit, the largest first; then in the order of the layers."""
    bins: list[set[str]] = []
    for name in sorted(shapes, key=lambda name: -shapes[name].bytes):
        for names in bins:
            if sum(shapes[other].bytes for other in names) + shapes[name].bytes <= room:
                names.add(name)
                break
        else:
            bins.append({name})
    return [{name: s for name, s in shapes.items() if name in names} for names in bins]


def _too_much(bytes_: float, memory: float) -> str:
    return (
        f"{quantity(bytes_)}B, more than three quarters of {quantity(memory)}B: raise memory to {quantity(bytes_ / _SHARE)}B, "
        "or name fewer layers with include or skip"
    )
