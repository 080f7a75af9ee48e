"""Rank from a compression ratio: the forms of a layer that are a given number of times smaller.

    α   ratio: weights before / weights after        β   rank out / rank in of a Tucker-2

arXiv 2309.03824, section 2.
"""

from __future__ import annotations

import math
from numbers import Real

from ..errors import GoalError
from ..forms import BlockTerm, Form, LowRank
from ..values import Geometry

_ALIGNMENTS = (64, 32, 16, 8)


def low_rank_at(layer: Geometry, ratio: float) -> int:
    """``R = ⌊O I / (α (I + O))⌋``; 0 where not even rank 1 is small enough."""
    I, O = layer.widths
    return math.floor(O * I / (ratio * (I + O)) + 1e-9)


def default_beta(layer: Geometry) -> float:
    """``β = max(0.8 O / I, 1)``, as MUSCO (Gusak et al., 2019) has it."""
    return max(0.8 * layer.out_channels / layer.in_channels, 1.0)


def tucker_at(layer: Geometry, ratio: float, beta: float | None = None) -> BlockTerm | None:
    """The Tucker-2 of a convolution at a ratio; None where no rank is small enough.

    ``r`` is the positive root of ``β k² r² + (I + β O) r − O I k² / α = 0``; the ranks are ``⌊r⌋`` and ``⌊β r⌋``. A side whose
    rank would not be below its channels stays whole, as does a side of which one channel would be left, and the other side's
    rank is found again without it.

    Args:
        layer: A convolution with a spatial kernel.
        ratio: α, at least 1.
        beta: β; by default `default_beta`.

    Raises:
        GoalError: β is not positive.
    """
    (I, O), k2 = layer.widths, layer.taps
    beta = default_beta(layer) if beta is None else beta
    if isinstance(beta, bool) or not (isinstance(beta, Real) and 0 < beta < math.inf):
        raise GoalError(f"β is {beta!r}; it is rank out / rank in, a positive number")
    target = O * I * k2 / ratio
    b = I + beta * O
    r = (math.sqrt(b * b + 4 * beta * k2 * target) - b) / (2 * beta * k2)
    rank_in, rank_out = math.floor(r + 1e-9), math.floor(beta * r + 1e-9)
    in_is_whole = rank_in >= I or (rank_in <= 1 < I) or I == 1
    out_is_whole = rank_out >= O or O == 1
    if not in_is_whole and not out_is_whole:
        return BlockTerm(rank_in, rank_out) if rank_out >= 1 else None
    if in_is_whole and not out_is_whole:
        t = math.floor(target / (I * k2 + O) + 1e-9)
        return BlockTerm(None, t) if 1 <= t < O else None
    if out_is_whole and not in_is_whole:
        s = math.floor(target / (I + O * k2) + 1e-9)
        return BlockTerm(s, None) if 1 <= s < I else None
    return None


def form_at(layer: Geometry, ratio: float, beta: float | None = None) -> Form | None:
    """The form of a layer at a ratio, smaller than the dense layer; None where there is none.

    At a ratio of 1, or just above, rounding can leave the form at break-even: then it is the next one below.
    """
    if layer.pointwise:
        rank = low_rank_at(layer, ratio)
        form: Form | None = LowRank(rank) if rank >= 1 else None
    else:
        form = tucker_at(layer, ratio, beta)
    if form is None:
        return None
    return next((step for step in form.descent() if step.parameters(layer) < layer.parameters), None)


def path(layer: Geometry, ratio: float, beta: float | None = None) -> tuple[Form, ...]:
    """The forms from the one at a ratio α down to the one at α + 1, one rank at a time, largest first.

    The window is a choice (the paper names none); it holds every rank that the paper prints.
    """
    start, end = form_at(layer, ratio, beta), form_at(layer, ratio + 1, beta)
    if start is None:
        return ()
    if end is None:
        return tuple(start.descent())
    above = [step for step in start.descent() if step.parameters(layer) > end.parameters(layer)]
    return (*above, end) if above else (start,)


def aligned(layer: Geometry, steps: tuple[Form, ...]) -> tuple[Form, ...]:
    """Forms between the ends of a path whose ranks are all multiples of 64, 32, 16 or 8, largest first.

    Kernels work in blocks of such sizes, so these stand at the foot of the steps of the staircase; both ranks of a Tucker-2
    must meet one, which they do not along the path unless β is 1.
    """
    if not steps:
        return ()
    most, least = steps[0].parameters(layer), steps[-1].parameters(layer)
    found = {step.cut_to(multiple) for step in steps for multiple in _ALIGNMENTS}
    fitting = {form for form in found if form is not None and least <= form.parameters(layer) <= most}
    return tuple(sorted(fitting, key=lambda form: -form.parameters(layer)))
