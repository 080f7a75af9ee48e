"""What a layer multiplies its weight with: inputs at each of its positions, as columns, and the sums of their outer products.

    x   input (N, I, *map)     K   taps     P   positions of an output map     a, b   taps, as offsets in the padded input

A patch is what one output position reads, I K numbers in the order of ``W.flatten(1)``. The moment of patches has a block for
each pair of taps,

    S[(i, a), (j, b)] = Σ_{p ∈ P} x_i(p + a) x_j(p + b)

At stride 1 that is the correlation of two channels at the offset b − a, summed over P + a. So pairs of one offset share all but
the border: 13 products for a 3×3 instead of 45, and nothing is copied K times. Both ways are exact; the cheaper one is taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..values import Geometry
from .gram import MOST_COLUMNS, Gram, summed

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
    def _reach(self) -> tuple[int, ...]:
        return tuple(d * (k - 1) for k, d in zip(self.geometry.kernel, self.geometry.dilation, strict=True))

    def padded(self, x: Tensor) -> Tensor:
        """The input as the kernel meets it."""
        padding = self.geometry.padding
        if padding == "valid":
            return x
        # Where "same" cannot be even, the end has one more.
        sides = [(r // 2, r - r // 2) if padding == "same" else (p, p) for r, p in self._each_side()]
        if not any(map(any, sides)):
            return x
        mode = "constant" if self.geometry.padding_mode == "zeros" else self.geometry.padding_mode
        return F.pad(x, [amount for side in reversed(sides) for amount in side], mode=mode)

    def _each_side(self) -> list[tuple[int, int]]:
        padding = self.geometry.padding
        return list(zip(self._reach, self._reach if isinstance(padding, str) else padding, strict=True))

    def outputs(self, padded: Tensor) -> tuple[int, ...]:
        """Sides of the output map."""
        sides = zip(padded.shape[2:], self._reach, self.geometry.stride, strict=True)
        return tuple((side - reach - 1) // stride + 1 for side, reach, stride in sides)

    def _window(self, tap: tuple[int, ...], start: tuple[int, ...], stop: tuple[int, ...]) -> Window:
        """What a tap reads at the output positions from ``start`` to ``stop``."""
        return tuple(
            slice(a + s * first, a + s * (end - 1) + 1, s)
            for a, s, first, end in zip(tap, self.geometry.stride, start, stop, strict=True)
        )

    # ---- moments of patches ----

    def add_patches(self, gram: Gram, total: Tensor, x: Tensor) -> int:
        """Add the outer products of all patches to a sum, and the patches to another, ``(I K,)``; how many they were."""
        # Whole rows of one channel in a run: what is cut out below is copied three to ten times as fast.
        X = self.padded(x).transpose(0, 1).contiguous()
        P = self.outputs(X)
        if self._correlations_pay(X, P):
            self._add_correlations(gram, X, P)
            for at, tap in enumerate(self.taps):
                inside = X[(slice(None), slice(None), *self._window(tap, (0,) * len(P), P))]
                total[at :: len(self.taps)] += summed(inside.flatten(1), total.device)
        else:
            for columns in self.columns(X, P):
                gram.add(columns)
                total += summed(columns, total.device)
        return X.shape[1] * math.prod(P)

    def columns(self, X: Tensor, P: tuple[int, ...]) -> Iterator[Tensor]:
        """All patches of a padded input ``(I, N, *map)`` with its output map, ``(I K, m)`` at a time."""
        I, N = X.shape[:2]
        most = self._most(I * len(self.taps), X)
        for items, rows in _pieces(N, range(P[0]), math.prod(P[1:]), most):
            start, stop = (rows.start, *(0 for _ in P[1:])), (rows.stop, *P[1:])
            parts = [X[(slice(None), items, *self._window(tap, start, stop))] for tap in self.taps]
            yield torch.stack([part.flatten(1) for part in parts], dim=1).flatten(0, 1)

    def _most(self, n: int, X: Tensor) -> int:
        """Columns of n numbers that may be copied at a time."""
        return max(min(self.workspace // (n * X.element_size()), MOST_COLUMNS), 1)

    def _correlations_pay(self, X: Tensor, P: tuple[int, ...]) -> bool:
        """Whether products at offsets take clearly less than products of patches, and their sums fit the workspace."""
        if any(s != 1 for s in self.geometry.stride) or any(r >= p for r, p in zip(self._reach, P, strict=True)):
            return False
        K = len(self.taps)
        core = math.prod(p - r for p, r in zip(P, self._reach, strict=True))
        by_offset = len(self._offsets()) * core + K * (K + 1) // 2 * (math.prod(P) - core)
        held = (len(self._offsets()) + K * (K + 1) // 2) * X.shape[0] ** 2 * X.element_size()
        return by_offset < 0.7 * K * (K + 1) / 2 * math.prod(P) and held <= 2 * self.workspace

    def _offsets(self) -> dict[tuple[int, ...], list[tuple[int, int]]]:
        """Each offset b − a of taps, the later from the earlier, and the pairs that have it."""
        found: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        taps = self.taps
        for a, b in itertools.combinations_with_replacement(range(len(taps)), 2):
            found.setdefault(tuple(q - p for p, q in zip(taps[a], taps[b], strict=True)), []).append((a, b))
        return found

    def _add_correlations(self, gram: Gram, X: Tensor, P: tuple[int, ...]) -> None:
        I, K, offsets = X.shape[0], len(self.taps), self._offsets()
        # What every tap reads at some output position; the rest of P + a is a border of boxes.
        core = tuple(slice(r, p) for r, p in zip(self._reach, P, strict=True))
        inner = {offset: X.new_zeros(I, I) for offset in offsets}
        outer = [X.new_zeros(I, (K - a) * I) for a in range(K)]
        most = self._most(I, X)
        sides = [side.stop - side.start for side in core]
        for items, rows in _pieces(X.shape[1], range(core[0].start, core[0].stop), math.prod(sides[1:]), most):
            box = (slice(rows.start, rows.stop), *core[1:])
            here = _cut(X[:, items], box)
            for offset, product in inner.items():
                product.addmm_(here, _cut(X[:, items], _moved(box, offset)).T)
        for a, tap in enumerate(self.taps):
            boxes = list(self._border(tap, P))
            width = (math.prod(P) - math.prod(sides)) * (len(self.taps) - a)
            for items, _ in _pieces(X.shape[1], range(1), width, most):
                if boxes:
                    there = [
                        torch.cat([_cut(X[:, items], _moved(box, _apart(tap, other))) for box in boxes], 1)
                        for other in self.taps[a:]
                    ]
                    outer[a].addmm_(there[0], torch.cat(there).T)
        pairs = {
            (a, b): inner[offset] + outer[a][:, (b - a) * I : (b - a + 1) * I]
            for offset, together in offsets.items()
            for a, b in together
        }
        del inner, outer
        for start, stop, block in gram.blocks():
            first, end = start // K, stop // K
            made = X.new_empty(end - first, K, I - first, K)
            for (a, b), product in pairs.items():
                made[:, a, :, b] = product[first:end, first:]
                if a != b:
                    made[:, b, :, a] = product.T[first:end, first:]
            block += made.view(stop - start, -1).to(block.device)

    def _border(self, tap: tuple[int, ...], P: tuple[int, ...]) -> Iterator[Window]:
        """Boxes, none of them empty, that make up what one tap reads outside the core."""
        for j, (a, r, p) in enumerate(zip(tap, self._reach, P, strict=True)):
            before = tuple(slice(r, p) for r, p in zip(self._reach[:j], P[:j], strict=True))
            after = tuple(slice(a, a + p) for a, p in zip(tap[j + 1 :], P[j + 1 :], strict=True))
            for side in (slice(a, r), slice(p, a + p)):
                if side.start < side.stop:
                    yield (*before, side, *after)

    # ---- moments of channels ----

    def add_channels(self, gram: Gram, total: Tensor, x: Tensor) -> int:
        """The same for the mean over the taps of a patch's channels, ``(I,)``: diagonal blocks of the moment of patches."""
        X = self.padded(x).transpose(0, 1)
        P = self.outputs(X)
        reads = X.new_zeros(X.shape[2:])
        for tap in self.taps:
            reads[self._window(tap, (0,) * len(P), P)] += 1 / len(self.taps)
        width = reads[0].numel()
        for items, rows in _pieces(X.shape[1], range(X.shape[2]), width, self._most(X.shape[0], X)):
            part, here = X[:, items, rows.start : rows.stop], reads[rows.start : rows.stop]
            # Positions that no tap reads add nothing.
            gram.add((part * here.sqrt()).flatten(1))
            total += summed((part * here).flatten(1), total.device)
        return X.shape[1] * math.prod(P)


def _pieces(items: int, rows: range, width: int, most: int) -> Iterator[tuple[slice, range]]:
    """Runs of items and of rows of a map that hold about so many positions, at least one row of one item."""
    together = max(most // max(len(rows) * width, 1), 1)
    tall = max(min(most // max(width, 1), len(rows)), 1)
    for n, first in itertools.product(range(0, items, together), range(0, len(rows), tall)):
        yield slice(n, n + together), rows[first : first + tall]


def _cut(X: Tensor, window: Window) -> Tensor:
    return X[(slice(None), slice(None), *window)].flatten(1)


def _moved(window: Window, offset: tuple[int, ...]) -> Window:
    return tuple(slice(side.start + d, side.stop + d) for side, d in zip(window, offset, strict=True))


def _apart(tap: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(b - a for a, b in zip(tap, other, strict=True))
