"""What a layer multiplies its weight with: inputs at each of its positions, as columns, and the sums of their outer products.

    x   input (N, I, *map)     K   taps     P   positions of an output map     a, b   taps, as offsets in the padded input

A patch is what one output position reads, here tap after tap, with all channels of a tap in a row. So the moment of patches has
a block ``(I, I)`` for each pair of taps,

    S[(a, i), (b, j)] = Σ_{p ∈ P} x_i(p + a) x_j(p + b)

A transposed convolution is one of stride 1 on its input with zeros put between, read backwards: so the map is turned round.

At stride 1 that is the correlation of two channels at the offset b − a, summed over P + a. So pairs of one offset share all but
the border: 13 products for a 3×3 instead of 45, and nothing is copied K times. Both ways are exact; the cheaper one is taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from ..values import Geometry
from .gram import MOST_COLUMNS, Gram, Scatter, add_to, summed

_CONVOLVED: dict[int, tuple[Any, Any]] = {
    1: (F.conv1d, conv1d_weight),
    2: (F.conv2d, conv2d_weight),
    3: (F.conv3d, conv3d_weight),
}
Window = tuple[slice, ...]
"""A box of a padded map."""


@final
@dataclass(frozen=True, slots=True)
class Patches:
    """How a convolution reads its input."""

    geometry: Geometry
    workspace: int = 2**26
    """Bytes that may be copied at a time."""

    @property
    def taps(self) -> list[tuple[int, ...]]:
        """Offsets of the taps, in the order of ``W.flatten(1)``."""
        sides = zip(self.geometry.kernel, self.geometry.dilation, strict=True)
        return list(itertools.product(*(range(0, k * d, d) for k, d in sides)))

    @property
    def _stride(self) -> tuple[int, ...]:
        return (1,) * len(self.geometry.kernel) if self.geometry.transposed else self.geometry.stride

    @property
    def _reach(self) -> tuple[int, ...]:
        return tuple(d * (k - 1) for k, d in zip(self.geometry.kernel, self.geometry.dilation, strict=True))

    def padded(self, x: Tensor) -> Tensor:
        """The input as the kernel meets it, ``(N, *map, I)``: with channels last all that is cut out below are long runs."""
        padding = self.geometry.padding
        if self.geometry.transposed:
            return self._spread(x)
        # Where "same" cannot be even, the end has one more.
        sides = [(r // 2, r - r // 2) if padding == "same" else (p, p) for r, p in self._each_side()]
        amounts = [amount for side in reversed(sides) for amount in side]
        if padding == "valid" or not any(amounts):
            return x.movedim(1, -1).contiguous()
        if self.geometry.padding_mode == "zeros":
            return F.pad(x.movedim(1, -1), [0, 0, *amounts]).contiguous()
        return F.pad(x, amounts, mode=self.geometry.padding_mode).movedim(1, -1).contiguous()

    def _spread(self, x: Tensor) -> Tensor:
        """The input of a transposed convolution turned round, with zeros between and around its places."""
        dims = range(2, x.ndim)
        strides = self.geometry.stride
        between = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True)))
        between[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
        sides = zip(self._reach, self._each_side(), self.geometry.output_padding, strict=True)
        amounts = [[reach - p + more, reach - p] for reach, (_, p), more in sides]
        around = [amount for side in reversed(amounts) for amount in side]
        return F.pad(between.flip(*dims), around).movedim(1, -1).contiguous()

    def _each_side(self) -> list[tuple[int, int]]:
        padding = self.geometry.padding
        return list(zip(self._reach, self._reach if isinstance(padding, str) else padding, strict=True))

    def outputs(self, padded: Tensor) -> tuple[int, ...]:
        """Sides of the output map."""
        sides = zip(padded.shape[1:-1], self._reach, self._stride, strict=True)
        return tuple((side - reach - 1) // stride + 1 for side, reach, stride in sides)

    def _window(self, tap: tuple[int, ...], start: tuple[int, ...], stop: tuple[int, ...]) -> Window:
        """What a tap reads at the output positions from ``start`` to ``stop``."""
        return tuple(
            slice(a + s * first, a + s * (end - 1) + 1, s)
            for a, s, first, end in zip(tap, self._stride, start, stop, strict=True)
        )

    # ---- moments of patches ----

    def add_patches(self, grams: Sequence[Gram], total: Tensor, x: Tensor, scatter: Scatter) -> int:
        """Add the outer products of all patches to some sums, and the patches to another, ``(K I,)``; how many they were.

        The scatter takes in the patches too.
        """
        X = self.padded(x)
        P = self.outputs(X)
        if self._correlations_pay(X, P):
            self._add_correlations(grams, X, P)
            parts = [self._read_by(tap, X, P, range(P[0])).flatten(0, -2).T for tap in self.taps]
            total += torch.cat([summed(part, total.device) for part in parts])
            self._scatter(scatter, X)
        else:
            for columns in self.columns(X, P):
                add_to(grams, columns)
                scatter.take(columns)
                total += summed(columns, total.device)
        return len(X) * math.prod(P)

    def _scatter(self, scatter: Scatter, X: Tensor) -> None:
        """Let a scatter take in all patches uncopied: ``xᵀ Z`` is a convolution, ``Σ x (xᵀ Z)`` its weight's gradient."""
        kernel, maps = self.geometry.kernel, X.movedim(-1, 1)
        W = scatter.Z.to(X.device, X.dtype).view(*kernel, X.shape[-1], -1).movedim((-1, -2), (0, 1)).contiguous()
        convolved, of_weight = _CONVOLVED[len(kernel)]
        how = {"stride": self._stride, "dilation": self.geometry.dilation}
        back = of_weight(maps, W.shape, convolved(maps, W, **how), **how)
        scatter.batch += back.movedim((0, 1), (-1, -2)).reshape(scatter.batch.shape).to(scatter.batch)

    def with_outputs(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum over all positions of outputs times patches, ``(O, I K)`` in the order of ``W.flatten(1)``: uncopied too.

        Args:
            x: As `add_patches` takes it.
            y: What the layer answers, ``(N, O, *map)``.
        """
        kernel, X = self.geometry.kernel, self.padded(x).movedim(-1, 1)
        shape = (y.shape[1], X.shape[1], *kernel)
        how = {"stride": self._stride, "dilation": self.geometry.dilation}
        y = y.flip(*range(2, y.ndim)) if self.geometry.transposed else y  # as the input is turned round
        found: Tensor = _CONVOLVED[len(kernel)][1](X, shape, y, **how)
        return found.flatten(1)

    def columns(self, X: Tensor, P: tuple[int, ...]) -> Iterator[Tensor]:
        """All patches of a padded input with its output map, ``(K I, m)`` at a time."""
        I, K = X.shape[-1], len(self.taps)
        for items, rows in _pieces(len(X), range(P[0]), math.prod(P[1:]), self._most(I * K, X)):
            parts = [self._read_by(tap, X[items], P, rows) for tap in self.taps]
            yield (torch.stack(parts, -2) if K > 1 else parts[0]).reshape(-1, K * I).T

    def _read_by(self, tap: tuple[int, ...], X: Tensor, P: tuple[int, ...], rows: range) -> Tensor:
        """What a tap reads at the output positions of some rows, a view."""
        start, stop = (rows.start, *(0 for _ in P[1:])), (rows.stop, *P[1:])
        return X[(slice(None), *self._window(tap, start, stop))]

    def _most(self, n: int, X: Tensor) -> int:
        """Positions of n numbers that may be copied at a time."""
        return max(min(self.workspace // (n * X.element_size()), MOST_COLUMNS), 1)

    def _correlations_pay(self, X: Tensor, P: tuple[int, ...]) -> bool:
        """Whether products at offsets take clearly less than products of patches, and their sums fit the workspace."""
        if any(s != 1 for s in self._stride) or any(r >= p for r, p in zip(self._reach, P, strict=True)):
            return False
        K, offsets = len(self.taps), len(self._offsets())
        core = math.prod(p - r for p, r in zip(P, self._reach, strict=True))
        by_offset = offsets * core + K * (K + 1) // 2 * (math.prod(P) - core)
        held = (offsets + K) * X.shape[-1] ** 2 * X.element_size()
        return by_offset < 0.7 * K * (K + 1) / 2 * math.prod(P) and held <= self.workspace

    def _offsets(self) -> list[tuple[int, ...]]:
        """Each offset b − a of a tap from one that is not after it; that of a tap from itself comes first."""
        pairs = itertools.combinations_with_replacement(self.taps, 2)
        return list(dict.fromkeys(_apart(tap, other) for tap, other in pairs))

    def _add_correlations(self, grams: Sequence[Gram], X: Tensor, P: tuple[int, ...]) -> None:
        N, I, K, offsets = len(X), X.shape[-1], len(self.taps), self._offsets()
        # What every tap reads at some output position; the rest of P + a is a border of boxes.
        core = tuple(slice(r, p) for r, p in zip(self._reach, P, strict=True))
        width = math.prod(side.stop - side.start for side in core[1:])
        inner = X.new_zeros(I, len(offsets) * I)
        for items, rows in _pieces(N, range(core[0].start, core[0].stop), width, self._most(len(offsets) * I, X)):
            there = _beside(X[items], [(slice(rows.start, rows.stop), *core[1:])], offsets)
            inner.addmm_(there[:, :I].T, there)
        by_offset = dict(zip(offsets, inner.chunk(len(offsets), 1), strict=True))
        for a, tap in enumerate(self.taps):
            # All that a tap makes with itself and those after it lies in a row of the sum.
            offsets = [_apart(tap, other) for other in self.taps[a:]]
            row, boxes = torch.cat([by_offset[offset] for offset in offsets], 1), list(self._border(tap, P))
            outside = math.prod(P) - width * (core[0].stop - core[0].start)
            for items, _ in _pieces(N if boxes else 0, range(1), outside, self._most((K - a) * I, X)):
                there = _beside(X[items], boxes, offsets)
                row.addmm_(there[:, :I].T, there)
            for gram in grams:
                gram.add_at(a * I, a * I, row)

    def _border(self, tap: tuple[int, ...], P: tuple[int, ...]) -> Iterator[Window]:
        """Boxes, none of them empty, that make up what one tap reads outside the core."""
        for j, (a, r, p) in enumerate(zip(tap, self._reach, P, strict=True)):
            before = tuple(slice(r, p) for r, p in zip(self._reach[:j], P[:j], strict=True))
            after = tuple(slice(a, a + p) for a, p in zip(tap[j + 1 :], P[j + 1 :], strict=True))
            for side in (slice(a, r), slice(p, a + p)):
                if side.start < side.stop:
                    yield (*before, side, *after)

    # ---- moments of channels ----

    def add_channels(self, grams: Sequence[Gram], total: Tensor | None, x: Tensor, scatter: Scatter | None = None) -> int:
        """Add to some sums what `add_patches` adds, as the mean over the taps: ``(I, I)`` and ``(I,)``."""
        X = self.padded(x)
        P = self.outputs(X)
        reads = X.new_zeros(*X.shape[1:-1], 1)
        for tap in self.taps:
            reads[self._window(tap, (0,) * len(P), P)] += 1 / len(self.taps)
        for items, rows in _pieces(len(X), range(X.shape[1]), reads[0].numel(), self._most(X.shape[-1], X)):
            part, here = X[items, rows.start : rows.stop], reads[rows.start : rows.stop]
            # Positions that no tap reads add nothing.
            columns = (part * here.sqrt()).flatten(0, -2).T
            add_to(grams, columns)
            if scatter is not None:
                scatter.take(columns)
            if total is not None:
                total += summed((part * here).flatten(0, -2).T, total.device)
        return len(X) * math.prod(P)


def _pieces(items: int, rows: range, width: int, most: int) -> Iterator[tuple[slice, range]]:
    """Runs of items and of rows of a map that hold about so many positions, at least one row of one item."""
    together = max(most // max(len(rows) * width, 1), 1)
    tall = max(min(most // max(width, 1), len(rows)), 1)
    for n, first in itertools.product(range(0, items, together), range(0, len(rows), tall)):
        yield slice(n, n + together), rows[first : first + tall]


def _beside(X: Tensor, boxes: Sequence[Window], offsets: Sequence[tuple[int, ...]]) -> Tensor:
    """What lies in some boxes, moved by each of some offsets: ``(positions, offsets × I)``."""
    sides = [tuple(side.stop - side.start for side in box) for box in boxes]
    found = X.new_empty(len(X) * sum(map(math.prod, sides)), len(offsets), X.shape[-1])
    parts = found.split_with_sizes([len(X) * math.prod(each) for each in sides])
    for box, each, part in zip(boxes, sides, parts, strict=True):
        into = part.view(len(X), *each, *found.shape[1:])
        for number, offset in enumerate(offsets):
            into[..., number, :] = X[(slice(None), *_moved(box, offset))]
    return found.flatten(1)


def _moved(window: Window, offset: tuple[int, ...]) -> Window:
    return tuple(slice(side.start + d, side.stop + d) for side, d in zip(window, offset, strict=True))


def _apart(tap: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(b - a for a, b in zip(tap, other, strict=True))
