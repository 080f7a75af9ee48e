"""Patches along a few directions of the channels, of layers whose whole patches are too many: one pass more over the data.

    x   input (N, I, *map)      E   directions (p, I)      z = E x      y   the layer's output without its bias
    K   taps                    S   Σ z zᵀ of the patches of z, (p K, p K)      R   Σ y zᵀ, (O, p K)

A kernel of many taps sees an input that changes little from one tap to the next. A moment of channels takes each tap for
itself, and factors that are fitted by it lose up to thirty times as much as those fitted to patches (a pitch tracker's
convolution of 1,024 channels and 64 taps: 65,536 entries of a patch, 17 GB). But Tucker-2 with rank s reads s directions of the
channels alone, and those that the layer's whitened weight puts first are known by the moment of channels. Along p of them,
p ≥ s, patches are few, and R says of them what the whole layer answers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import final

import torch
from torch import Tensor

from ..factorize.weighted import leading_directions
from ..network.preserve import repeatable
from ..network.walk import Layer
from ..values import Geometry
from . import ranks
from .backward import Runner
from .calibration import LayerRecord, Moments
from .gram import Gram, Scatter, packed
from .passes import Found, Work
from .patches import Patches
from .recorder import Recorder

_MOST = 4096
"""Entries of a patch of z, at most: its moment is a matrix of so many rows, which is inverted for each fit."""
_ROWS = 4
"""Positions that are to be seen for each of them."""
_SHARE = 0.25
"""Of the memory, what such a moment may take in float64 while factors are fitted."""


@final
class AlongSums:
    """The sums of one layer.

    Args:
        geometry: The layer.
        directions: E.
        bias: The layer's.
        device: Where sums are kept.
        workspace: Bytes that may be copied at a time.
    """

    gradients: None = None
    """None are added up."""

    def __init__(
        self, geometry: Geometry, directions: Tensor, bias: Tensor | None, device: torch.device, workspace: int
    ) -> None:
        self.directions, self.bias = directions, bias
        self.patches = Patches(dataclasses.replace(geometry, in_channels=len(directions)), workspace)
        n = len(directions) * geometry.taps
        self.inputs = Gram(n, device=device)
        self.cross = torch.zeros(geometry.out_channels, n, dtype=torch.float64, device=device)
        self._total, self._scatter = torch.zeros(n, dtype=torch.float64, device=device), Scatter(n, device)

    def add_inputs(self, x: Tensor, y: Callable[[], Tensor], held_out: bool) -> None:
        """Take in what a layer was called with, and what it answered."""
        output = y()
        if x.ndim != 2 + len(self.patches.geometry.kernel):
            x, output = x[None], output[None]
        z = torch.tensordot(self.directions.to(x.device, x.dtype), x, dims=([1], [1])).movedim(0, 1)
        if self.bias is not None:
            output = output - self.bias.to(output.device, output.dtype).view(-1, *[1] * (output.ndim - 2))
        self.patches.add_patches([self.inputs], self._total, z, self._scatter)
        self.cross += self.patches.with_outputs(z, output).to(self.cross)

    def add_gradients(self, g: Tensor, held_out: bool) -> None:
        """None are asked for."""

    def tensors(self) -> dict[str, Tensor]:
        """What is kept of it."""
        return {"directions": self.directions.flatten(), "along": self.inputs.flat, "cross": self.cross.flatten()}

    @staticmethod
    def bytes(geometry: Geometry, p: int) -> int:
        """What such sums take."""
        n = p * geometry.taps
        return 8 * (packed(n) + geometry.out_channels * n + Scatter.size(n) + p * geometry.in_channels)


def with_directions(work: Work, found: Found, memory: float) -> None:
    """Add patches along directions to what was found of layers that are known by channels, where the data can be run again."""
    wanted = {name: p for name, (record, _) in found.items() if (p := _count(record, memory))} if work.batches.again else {}
    for number, names in enumerate(_in_turn(wanted, work.layers, memory), 1):
        sums = {name: _empty(work, name, *found[name], wanted[name]) for name in names}
        with ranks.together():
            _run(work, sums, f"looking along directions, pass {number}")
        ranks.added_up(t for name in sorted(sums) for t in (sums[name].inputs.flat, sums[name].cross))
        for name, each in sums.items():
            record, tensors = found[name]
            kept = {what: tensor.cpu() for what, tensor in each.tensors().items()}
            found[name] = record.model_copy(update={"directions": wanted[name]}), tensors | kept


def _count(record: LayerRecord, memory: float) -> int:
    """p, 0 where there is nothing to gain."""
    K = record.geometry.taps
    if record.inputs == "patches" or not record.geometry.patchable:
        return 0
    most = min(_MOST, record.rows // _ROWS, int((_SHARE * memory / 8) ** 0.5))
    return min(most // K, record.geometry.in_channels - 1)


def _in_turn(wanted: Mapping[str, int], layers: Mapping[str, Layer], memory: float) -> Iterator[list[str]]:
    """Layers whose sums fit half of the memory together."""
    some: list[str] = []
    taken = 0
    for name, p in wanted.items():
        size = AlongSums.bytes(layers[name].geometry, p)
        if some and taken + size > memory / 2:
            yield some
            some, taken = [], 0
        some.append(name)
        taken += size
    if some:
        yield some


def _empty(work: Work, name: str, record: LayerRecord, tensors: Mapping[str, Tensor], p: int) -> AlongSums:
    layer = work.layers[name]
    items = max(sum(work.sizes[:2]), 1)
    E = leading_directions(layer.weight.detach(), p, Moments(record, tensors, items).metric(patches=False))
    bias = None if layer.bias is None else layer.bias.detach()
    return AlongSums(layer.geometry, E.double().to(work.home), bias, work.home, int(work.workspace))


def _run(work: Work, sums: Mapping[str, AlongSums], what: str) -> None:
    """All batches once more, forward alone."""
    runner, recorder = Runner(work.runner.twin, None, work.runner.mask, work.runner.seed), Recorder(sums)
    runner.begin()
    with repeatable(runner.twin), recorder.recording(runner.twin):
        for batch in itertools.islice(work.batches, work.counted):
            work.shown.say(what, batch.number, work.counted or len(work.batches) or None)
            runner.run(recorder, batch)
