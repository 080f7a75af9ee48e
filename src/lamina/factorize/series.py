"""Series: the block term fits of one weight at growing group sizes, each written as the sum of what came before and a term.

    G₁ > G₂ > … > Gₙ   group counts, each dividing the one before      s, t   widths of the core, the same for all
    X_r   a factor of the fit at G_r      Δ_r   its term r      φ   expansion of a core to fewer, larger groups

    X_r = φ(X_{r−1}) + Δ_r,   so that   X_r = Σ_{m ≤ r} φ(Δ_m)

A core of many groups is a core of fewer groups with zeros in it: φ writes it so and changes no function. The 1×1 factors have
one shape at every group count and need no φ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from ..errors import RankError
from .block_term import BlockTerms, block_term, for_merging, refit
from .metric import on_sides
from .pure import pure

_NARROWEST = 0.2
"""How much less a 1×1 of full rank may pass along one direction than along another, where the core is to undo it."""


@final
@dataclass(frozen=True, slots=True)
class Series:
    """The terms of each factor, one for each group count: ``reduce`` ``(s, I)``, ``core`` ``(t, s / G_r, *kernel)``, ``expand``
    ``(O, t)``. A whole side has none.
    """  # noqa: D205 - the shapes belong to the first sentence

    groups: tuple[int, ...]
    reduce: list[Tensor]
    core: list[Tensor]
    expand: list[Tensor]

    def truncated(self, terms: int) -> BlockTerms:
        """The fit at ``groups[terms - 1]``: the sum of the first terms."""
        core = self.core[0]
        for (before, after), term in zip(pairwise(self.groups[:terms]), self.core[1:terms], strict=True):
            core = expand(core, before, after) + term
        reduce = sum(self.reduce[1:terms], self.reduce[0]) if self.reduce else None
        outer = sum(self.expand[1:terms], self.expand[0]) if self.expand else None
        return BlockTerms(reduce, core, outer, self.groups[terms - 1])


def expand(core: Tensor, groups_from: int, groups_to: int) -> Tensor:
    """φ: a grouped core written with fewer groups, the same function exactly.

    The filters of group i stand at offset ``(i g) mod g′`` of the larger group, all else is zero (arXiv 1912.00673, section 3).

    Args:
        core: ``(t, s / groups_from, *kernel)``.
        groups_from: Groups of the core.
        groups_to: Groups wanted, a divisor of ``groups_from``.

    Returns:
        ``(t, s / groups_to, *kernel)``; the core itself where the counts are equal. Gradients go through.

    Raises:
        RankError: ``groups_to`` does not divide ``groups_from``.
    """
    check_nested([groups_from, groups_to])
    merged = groups_from // groups_to
    if merged == 1:
        return core
    t, q, *kernel = core.shape
    wide = core.new_zeros(t, merged * q, *kernel)
    blocks(wide, groups_from, groups_to).copy_(core.unflatten(0, (groups_to, merged, -1)))  # type: ignore[no-untyped-call]
    return wide


def blocks(core: Tensor, groups_from: int, groups_to: int) -> Tensor:
    """The entries of a core that come from one with more groups, as a view: those that `expand` does not fill with zeros.

    Args:
        core: ``(t, s / groups_to, *kernel)``.
        groups_from: Groups of the core with more of them.
        groups_to: Groups of this one, a divisor of ``groups_from``.

    Returns:
        ``(groups_to, groups_from / groups_to, t / groups_from, s / groups_from, *kernel)``.
    """
    merged = groups_from // groups_to
    split: Tensor = core.unflatten(1, (merged, -1)).unflatten(0, (groups_to, merged, -1))  # type: ignore[no-untyped-call]
    # The diagonal over (group within the block, its offset) comes last.
    return split.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def check_nested(groups: Sequence[int]) -> None:
    """Raise `RankError` unless each group count divides the one before it."""
    for before, after in pairwise(groups):
        if before % after:
            raise RankError(f"group counts {before} and {after} do not nest: each count must divide the one before it")


@pure
def faithful_series(W: Tensor, rank_in: int | None, rank_out: int | None, groups: Sequence[int], *, seed: int = 0) -> Series:
    """The series of independent fits, as in arXiv 1912.00673, section 3.

    Nothing aligns one fit with the next, so the terms are as large as the factors themselves (about √2 times).

    Args:
        W: Weight, ``(O, I, *kernel)``.
        rank_in: ``s``; None leaves the input side whole.
        rank_out: ``t``; None leaves the output side whole.
        groups: Group counts, most groups first, each dividing the one before.
        seed: Of the fits.

    Returns:
        The terms, in float32 or better. Truncated at r they are the fit ``block_term(W, rank_in, rank_out, groups[r - 1])``.

    Raises:
        RankError: The group counts do not nest or do not divide the widths.
    """
    check_nested(groups)
    return _differences([block_term(W, rank_in, rank_out, count, seed=seed) for count in groups])


@pure
def nested_series(
    W: Tensor, rank_in: int | None, rank_out: int | None, groups: Sequence[int], *, anchor: float = 1e-2, seed: int = 0
) -> Series:
    """The series whose fits start from one another: each from the one before with neighbouring groups merged, and held to it.

    The terms of the first fit are put in an order in which neighbours gain from being merged. Each later fit minimises
    ``‖W − fit‖² + anchor ‖X − φ(X_prev)‖²``, so that its terms are corrections. A last fit of one group and full ranks is held
    to
    nothing: its core is what makes it exact.

    Args:
        W: Weight, ``(O, I, *kernel)``.
        rank_in: ``s``; None leaves the input side whole.
        rank_out: ``t``; None leaves the output side whole.
        groups: Group counts, most groups first, each dividing the one before.
        anchor: How strongly a fit is held to the one before, relative to the curvature of its problem.
        seed: Of the first fit.

    Returns:
        The terms, in float32 or better.

    Raises:
        RankError: The group counts do not nest or do not divide the widths.
    """
    check_nested(groups)
    fits = [for_merging(W, block_term(W, rank_in, rank_out, groups[0], seed=seed), groups[1:])]
    for count in groups[1:]:
        last = fits[-1]
        start = BlockTerms(last.reduce, expand(last.core, last.groups, count), last.expand, count)
        fits.append(_exact(W, start) or refit(W, start, anchor=anchor))
    return _differences(fits)


def _exact(W: Tensor, start: BlockTerms) -> BlockTerms | None:
    """The fit of one group and full ranks that is the weight itself, near a start; None where the ranks are not full.

    Square 1×1s can be undone, so the core alone closes the gap. What they squeeze almost to nothing the core would have to blow
    up, and rounding with it: such directions are widened first.
    """
    O, I = W.shape[:2]
    sides = (start.reduce, start.expand)
    if start.groups > 1 or any(side is not None and tuple(side.shape) != (n, n) for side, n in zip(sides, (I, O), strict=True)):
        return None
    reduce, wide = (None if side is None else _widened(side.double()) for side in sides)
    near, far = (None if side is None else torch.linalg.inv(side) for side in (reduce, wide))
    dtype, core = start.core.dtype, on_sides(W, near, far)
    return BlockTerms(
        reduce if reduce is None else reduce.to(dtype), core.to(dtype), wide if wide is None else wide.to(dtype), 1
    )


def _widened(matrix: Tensor) -> Tensor:
    U, sizes, Vh = torch.linalg.svd(matrix)
    widened: Tensor = (U * sizes.clamp_min(float(sizes[0]) * _NARROWEST)) @ Vh
    return widened


METHODS: dict[str, Callable[[Tensor, int | None, int | None, Sequence[int]], Series]] = {
    "nested": nested_series,
    "faithful": faithful_series,
}
"""The ways to a series, by the names that `lamina.layers.series` takes."""


def _differences(fits: list[BlockTerms]) -> Series:
    steps = list(pairwise(fits))
    core = [fits[0].core, *(after.core - expand(before.core, before.groups, after.groups) for before, after in steps)]
    sides: list[list[Tensor]] = []
    for values in ([fit.reduce for fit in fits], [fit.expand for fit in fits]):
        there = [value for value in values if value is not None]
        sides.append([*there[:1], *(after - before for before, after in pairwise(there))])
    return Series(tuple(fit.groups for fit in fits), sides[0], core, sides[1])
